"""The protos without this repository, and the client in Go that is made of them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from encoder_service.bench.pictures import make_pictures
from hashlens import Client, Item
from tests.support.certificates import Authority, Pair
from tests.support.secured import SecuredServer
from tests.support.services import both_services

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "go"
BUILD_S = 550
RUN_S = 120
IMPORT = re.compile(r'^import (?:public )?"([^"]+)";', re.MULTILINE)

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="there is no Go here")


def common_protos() -> Path:
    """Where googleapis-common-protos has google/rpc/status.proto."""
    spec = importlib.util.find_spec("google.rpc")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))).parent.parent


@pytest.fixture(scope="module")
def protos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protos alone, in a folder of their own."""
    folder = tmp_path_factory.mktemp("protos")
    for path in (ROOT / "protos").rglob("*.proto"):
        copy = folder / path.relative_to(ROOT / "protos")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


def test_the_protos_compile_alone(protos: Path, tmp_path: Path) -> None:
    files = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    assert "hashlens/v1/search_service.proto" in files
    for name in files:
        for imported in IMPORT.findall((protos / name).read_text()):
            # Ours, or one that every gRPC user can have.
            assert imported in files or imported.startswith(("google/protobuf/", "google/rpc/"))
    made = tmp_path / "set"
    # -I: nothing of this repository is on the path.
    command = [sys.executable, "-I", "-m", "grpc_tools.protoc", "-I."]
    includes = [f"-I{resources.files('grpc_tools') / '_proto'}", f"-I{common_protos()}"]
    subprocess.run(
        [*command, *includes, f"--descriptor_set_out={made}", *files],
        cwd=protos,
        check=True,
        timeout=RUN_S,
    )
    found = descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes())
    services = {service.name for file in found.file for service in file.service}
    assert services == {"EncoderService", "SearchService", "ReplicaService"}


def execute(
    *command: str | Path, cwd: Path, timeout_s: float = RUN_S
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "PYTHON": sys.executable, "GOFLAGS": "-mod=readonly"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass(frozen=True)
class GoClient:
    """The program, built."""

    binary: Path

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return execute(self.binary, *arguments, cwd=self.binary.parent)


@pytest.fixture(scope="module")
def go_client(protos: Path, tmp_path_factory: pytest.TempPathFactory) -> GoClient:
    """Generate and build it outside of the repository."""
    folder = tmp_path_factory.mktemp("go") / "client"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("hashlensv1"))
    fetched = execute("go", "mod", "download", cwd=folder, timeout_s=BUILD_S)
    if fetched.returncode and "checksum" not in fetched.stderr:
        pytest.skip(f"the modules cannot be had here: {fetched.stderr.strip()[-200:]}")
    assert fetched.returncode == 0, fetched.stderr
    for command in (["./generate.sh", str(protos)], ["go", "vet", "."], ["go", "build", "."]):
        ended = execute(*command, cwd=folder, timeout_s=BUILD_S)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return GoClient(folder / "hashlens-search")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Both services; returns where they are."""
    folder = tmp_path_factory.mktemp("services")
    with both_services(folder) as (encoder, search):
        yield encoder.target, search.target


@needs_go
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_go_client_finds_what_ours_finds(
    go_client: GoClient, services: tuple[str, str], tmp_path: Path
) -> None:
    encoder, search = services
    images = make_pictures("garment", 60, 3)
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(images[7])
    with Client(search, encoder) as client:
        client.create_collection("photos")
        client.upsert("photos", [Item(id=f"{i}.jpg", image=v) for i, v in enumerate(images)])
        answer = client.search("photos", image=images[7], k=5)
    ended = go_client("-encoder", encoder, "-search", search, "-k", "5", picture)
    assert ended.returncode == 0, ended.stderr
    *hits, receipt = [line.split("\t") for line in ended.stdout.splitlines()]
    assert hits[0][0] == "7.jpg"
    assert hits == [
        [hit.id, f"{hit.hamming_bits} bits", f"{hit.distance:.4f}"] for hit in answer.hits
    ]
    assert receipt[0].startswith("exact: true, within ")
    assert receipt[0].endswith(f"pool: {answer.receipt.pool_size}")


@needs_go
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_go_client_says_what_fails(
    go_client: GoClient, services: tuple[str, str], tmp_path: Path
) -> None:
    encoder, search = services
    where = ("-encoder", encoder, "-search", search)
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(make_pictures("garment", 1, 3)[0])
    absent = go_client(*where, "-collection", "absent", picture)
    assert (absent.returncode, absent.stdout) == (1, "")
    assert "search absent: rpc error: code = NotFound" in absent.stderr
    picture.write_bytes(b"no image")
    spoiled = go_client(*where, picture)
    assert "picture.jpg: rpc error: code = InvalidArgument" in spoiled.stderr
    token = tmp_path / "token"
    token.write_text("0" * 32)
    # Nobody else shall read it.
    bare = go_client(*where, "-token-file", token, picture)
    assert bare.returncode == 1
    assert "the credentials require transport level security" in bare.stderr


@dataclass(frozen=True)
class Credentials:
    """Files of a server with tokens and of its clients; the picture is none, and never read."""

    authority: Authority
    server: Pair
    client: Pair
    tokens: Path
    right: Path
    wrong: Path
    picture: Path


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    folder = tmp_path_factory.mktemp("credentials")
    authority = Authority(folder)
    tokens, right, wrong, picture = (folder / n for n in ("tokens", "right", "wrong", "picture"))
    tokens.write_text(f"read {'1' * 32} reader\n")
    right.write_text("1" * 32 + "\n")
    wrong.write_text("2" * 32 + "\n")
    picture.write_bytes(b"any")
    pairs = authority.pair("server"), authority.pair("client", "client")
    return Credentials(authority, *pairs, tokens, right, wrong, picture)


@needs_go
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_go_client_shows_its_token_over_tls(go_client: GoClient, known: Credentials) -> None:
    with SecuredServer(
        listen="127.0.0.1:0",
        tls_cert=known.server.cert,
        tls_key=known.server.key,
        tokens=known.tokens,
    ) as server:
        where = ("-encoder", server.target, "-search", server.target, "-tls-ca", known.authority.ca)
        let_in = go_client(*where, "-token-file", known.right, known.picture)
        assert "code = Unimplemented" in let_in.stderr
        refused = go_client(*where, "-token-file", known.wrong, known.picture)
        assert "code = Unauthenticated" in refused.stderr


@needs_go
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_go_client_shows_a_certificate(go_client: GoClient, known: Credentials) -> None:
    with SecuredServer(
        listen="127.0.0.1:0",
        tls_cert=known.server.cert,
        tls_key=known.server.key,
        tls_client_ca=known.authority.ca,
        tokens=known.tokens,
    ) as server:
        where = ("-encoder", server.target, "-search", server.target, "-token-file", known.right)
        ca = ("-tls-ca", known.authority.ca)
        cert, key = ("-tls-cert", known.client.cert), ("-tls-key", known.client.key)
        let_in = go_client(*where, *ca, *cert, *key, known.picture)
        assert "code = Unimplemented" in let_in.stderr
        without = go_client(*where, *ca, known.picture)
        assert "code = Unavailable" in without.stderr
        halves = go_client(*where, *ca, *cert, known.picture)
        assert "-tls-cert and -tls-key go together" in halves.stderr
        # Else the certificate would be left out, and the token sent to anybody.
        no_authority = go_client(*where, *cert, *key, "-insecure", known.picture)
        assert "-tls-cert needs -tls-ca" in no_authority.stderr


@needs_go
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_go_client_shows_its_token_without_tls_if_told(
    go_client: GoClient, known: Credentials
) -> None:
    with SecuredServer(listen="127.0.0.1:0", tokens=known.tokens) as server:
        where = ("-encoder", server.target, "-search", server.target)
        let_in = go_client(*where, "-insecure", "-token-file", known.right, known.picture)
        assert "code = Unimplemented" in let_in.stderr
        refused = go_client(*where, "-insecure", "-token-file", known.wrong, known.picture)
        assert "code = Unauthenticated" in refused.stderr
        not_told = go_client(*where, "-token-file", known.right, known.picture)
        assert "the credentials require transport level security" in not_told.stderr
