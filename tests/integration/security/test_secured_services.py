"""Both services with everything on: mTLS, tokens, a Redis with a login; and no secret anywhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from encoder_service.model.checkpoint import default_checkpoint_path
from hashlens import AsyncClient, ChannelSecurity, Client, ClientConfig, Item
from hashlens.cli.main import main
from hashlens.errors import (
    DeadlineError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from hashlens.rpc.channel import connect
from hashlens.rpc.limits import MAX_MESSAGE_BYTES
from hashlens.types import Encoded
from tests.integration.security.redis_guard import PASSWORD, GuardedRedis
from tests.support.certificates import Authority, Pair
from tests.support.redis_server import server_binaries
from tests.support.services import ServiceProcess, wait_until

pytestmark = pytest.mark.slow

AWAY = (UnavailableError, DeadlineError)

SECRETS = {
    "admin": "hunter2-admin-" + "a" * 32,
    "write": "hunter2-write-" + "w" * 32,
    "read": "hunter2-read-" + "r" * 32,
    "encoder": "hunter2-encoder-" + "e" * 32,
    "peer": "hunter2-peer-" + "p" * 32,
    "unknown": "hunter2-unknown-" + "u" * 32,
}


@dataclass
class Secured:
    """An encoder and two search replicas that trust nobody."""

    folder: Path
    authority: Authority
    client: Pair
    redis: GuardedRedis
    processes: dict[str, ServiceProcess] = field(default_factory=dict)

    def token(self, name: str) -> Path:
        path = self.folder / f"{name}.token"
        path.write_text(SECRETS[name] + "\n")
        return path

    def security(self, token: str | None) -> ChannelSecurity:
        return ChannelSecurity(
            tls_ca=self.authority.ca,
            tls_cert=self.client.cert,
            tls_key=self.client.key,
            token_file=None if token is None else self.token(token),
        )

    def connect(self, token: str | None, search: str = "a") -> Client:
        return Client(
            self.processes[search].target,
            self.processes["encoder"].target,
            config=ClientConfig(security=self.security(token)),
        )

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def run(self, *arguments: str, token: str | None = "admin") -> Result:
        """Run a command of ours, which learns all it needs from the environment."""
        environment = {
            "HASHLENS_SEARCH": self.processes["a"].target,
            "HASHLENS_ENCODER": self.processes["encoder"].target,
            "HASHLENS_TLS_CA": str(self.authority.ca),
            "HASHLENS_TLS_CERT": str(self.client.cert),
            "HASHLENS_TLS_KEY": str(self.client.key),
        }
        if token is not None:
            environment["HASHLENS_TOKEN_FILE"] = str(self.token(token))
        return CliRunner().invoke(main, arguments, env=environment)


def _options(**values: object) -> list[str]:
    return [part for k, v in values.items() for part in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder)
    with ExitStack() as stack:
        guarded = stack.enter_context(GuardedRedis(server_binaries()[0]))
        guarded.guard()
        found = Secured(folder, authority, authority.pair("client"), guarded)
        encoder_tokens, search_tokens = folder / "encoder.tokens", folder / "search.tokens"
        encoder_tokens.write_text(
            f"read {SECRETS['encoder']} search\nread {SECRETS['read']}\nread {SECRETS['write']}\n"
            f"admin {SECRETS['admin']}\n"
        )
        search_tokens.write_text(
            f"admin {SECRETS['peer']} replicas\nread {SECRETS['read']} web\n"
            f"write {SECRETS['write']}\nadmin {SECRETS['admin']}\n"
        )
        (folder / "password").write_text(PASSWORD)
        served = authority.pair("served")
        tls = _options(tls_cert=served.cert, tls_key=served.key, tls_client_ca=authority.ca)
        found.processes["encoder"] = stack.enter_context(
            ServiceProcess(
                "encoder_service",
                *tls,
                *("--access-log", "--reflection"),
                *_options(tokens=encoder_tokens, log_level="debug", log_format="json"),
                log=folder / "encoder.log",
            )
        )
        for name in ("a", "b"):
            found.processes[name] = ServiceProcess(
                "search_service",
                *tls,
                "--access-log",
                *_options(
                    tokens=search_tokens,
                    data_dir=folder / name,
                    encoder=found.processes["encoder"].target,
                    encoder_tls_ca=authority.ca,
                    encoder_tls_cert=served.cert,
                    encoder_tls_key=served.key,
                    encoder_token_file=found.token("encoder"),
                    peer_tls_ca=authority.ca,
                    peer_token_file=found.token("peer"),
                    redis_url=guarded.url,
                    redis_username="hashlens",
                    redis_password_file=folder / "password",
                    log_level="debug",
                ),
                log=folder / f"{name}.log",
            )
        stack.enter_context(found.processes["a"])
        yield found
        if hasattr(found.processes["b"], "process"):
            found.processes["b"].stop()


def test_pictures_go_in_and_are_found(secured: Secured, images: list[bytes]) -> None:
    with secured.connect("write") as client:
        client.create_collection("photos", expected_rows=1000)
        items = [Item(id=f"{i}", image=image) for i, image in enumerate(images[:20])]
        assert client.upsert("photos", items).n_written == 20
        assert all(isinstance(result, Encoded) for result in client.encode_stream(images[:9]))
        assert all(isinstance(result, int) for result in client.upsert_stream("photos", items))
        with pytest.raises(PermissionDeniedError, match="scope admin"):
            client.drop_collection("photos")
        # This client reads its own writes; from here on, so does every other.
        client.collection("photos")
    with secured.connect("read") as client:
        assert client.search("photos", image=images[3], k=1).hits[0].id == "3"
        with pytest.raises(PermissionDeniedError, match="scope write; the token web has read"):
            client.upsert("photos", items)
        assert all(state.serving for state in client.health())
    for token in (None, "unknown"):
        with secured.connect(token) as client:
            with pytest.raises(UnauthenticatedError):
                client.collections()
            with pytest.raises(UnauthenticatedError):
                client.model()
            with pytest.raises(UnauthenticatedError):
                list(client.upsert_stream("photos", items))
            assert all(state.serving for state in client.health())


def test_nothing_is_read_of_what_a_stranger_sends(secured: Secured) -> None:
    """Not even how long it is: that would be another refusal."""
    for name, method in (
        ("encoder", "/hashlens.v1.EncoderService/Encode"),
        ("a", "/hashlens.v1.SearchService/Upsert"),
        ("a", "/hashlens.v1.ReplicaService/ReadFile"),
    ):
        options = [("grpc.max_send_message_length", -1)]
        target = secured.processes[name].target
        with connect(target, options, secured.security(None)) as channel:
            for request in (
                b"\xff",
                b"\xff" * MAX_MESSAGE_BYTES,
                b"\xff" * (MAX_MESSAGE_BYTES + 99),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(request, timeout=30)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, caught.value


def test_the_asynchronous_client_knows_as_much(secured: Secured, images: list[bytes]) -> None:
    async def ask() -> str:
        async with AsyncClient(
            secured.processes["a"].target,
            secured.processes["encoder"].target,
            config=ClientConfig(security=secured.security("read")),
        ) as client:
            result = await client.search("photos", image=images[5], k=1)
            parts = [
                part async for part in client.stream_ball("photos", radius_bits=0, image=images[5])
            ]
            assert parts
            return result.hits[0].id

    assert asyncio.run(ask()) == "5"


def test_a_replica_copies_over_tls_with_its_token(secured: Secured, images: list[bytes]) -> None:
    """The log of what was written is gone, so it has to."""
    with secured.connect("admin") as client:
        client.compact("photos", deadline_s=60.0)
    secured.processes["b"].start()

    def finds() -> bool:
        with secured.connect("read", "b") as client:
            try:
                return client.search("photos", image=images[3], k=1).hits[0].id == "3"
            except (*AWAY, LookupError):
                return False

    wait_until(finds, within_s=60, what="the second replica has a copy")
    assert "from localhost" in secured.logs() or "from 127.0.0.1" in secured.logs()


def test_the_commands_learn_it_from_options_and_environment(secured: Secured) -> None:
    found = secured.run("collections", "--json", token="read")
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)[0]["name"] == "photos"
    assert secured.run("health").exit_code == 0
    assert secured.run("verify", "photos").exit_code == 0
    denied = secured.run("drop", "photos", "--yes", token="write")
    assert denied.exit_code == 1
    assert "scope admin" in denied.output
    unknown = secured.run("collections", token=None)
    assert unknown.exit_code == 1
    assert "--token-file" in unknown.output
    options = _options(
        search=secured.processes["a"].target,
        encoder=secured.processes["encoder"].target,
        tls_ca=secured.authority.ca,
        tls_cert=secured.client.cert,
        tls_key=secured.client.key,
        token_file=secured.token("read"),
    )
    assert CliRunner().invoke(main, ["collections", *options]).exit_code == 0
    plain = CliRunner().invoke(main, ["collections", *options[:4]])
    assert plain.exit_code == 1
    assert "--tls-ca" in plain.output


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_secret_is_in_a_log_or_a_command_line(secured: Secured, images: list[bytes]) -> None:
    """Whatever goes wrong; no test of the services comes after it, for what it breaks."""
    lines = [
        Path(f"/proc/{process.process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for process in secured.processes.values()
    ]
    assert all("--listen" in line for line in lines)
    said = []
    with secured.connect("admin") as client, secured.connect("unknown") as stranger:
        for broken in (
            lambda: stranger.collections(),
            lambda: client.upsert("none", [Item(id="x", image=b"")]),
            lambda: client.search("photos", image=b"no picture"),
        ):
            with pytest.raises(Exception, match=r".") as caught:
                broken()
            said += [str(caught.value), repr(caught.value)]
        # The login is taken away, with all connections.
        with secured.redis.admin() as admin:
            admin.execute_command("ACL", "SETUSER", "hashlens", "resetpass", ">hunter2-other")
            admin.execute_command("CLIENT", "KILL", "USER", "hashlens")
        with pytest.raises(AWAY) as away:
            client.upsert("photos", [Item(id="x", image=images[0])], deadline_s=2.0)
        said.append(str(away.value))
        (secured.folder / "password").unlink()
        with pytest.raises(AWAY):
            client.upsert("photos", [Item(id="x", image=images[0])], deadline_s=2.0)
        # So is the encoder's key, and its file of tokens becomes nonsense.
        (secured.folder / "served.key").write_text("hunter2")
        (secured.folder / "encoder.tokens").write_text(f"read,{SECRETS['encoder']}\n")
        wait_until(
            lambda: (client.model(), "the tokens in" in secured.logs())[1],
            within_s=20,
            what="the encoder says that its tokens cannot be read",
        )
        os.kill(secured.processes["encoder"].process.pid, 9)
        with pytest.raises(AWAY):
            client.search("photos", image=images[0], deadline_s=3.0)
    secured.processes["a"].stop()
    log = secured.logs()
    assert "stays in use" in log
    assert "Traceback" not in log
    for text in (log, *lines, *said, repr(secured.security("read"))):
        assert "hunter2" not in text


def refusal(module: str, folder: Path, **options: object) -> str:
    """What a service says that does not start."""
    process = ServiceProcess(module, *_options(**options), log=folder / "log")
    with pytest.raises(AssertionError, match="did not start"):
        process.start()
    assert process.process.returncode == 1
    text = (folder / "log").read_text()
    assert "Traceback" not in text
    return text.rpartition("cannot start: ")[2]


def test_a_file_of_tokens_that_is_none_stops_the_start(tmp_path: Path) -> None:
    key = Authority(tmp_path).pair("a").key
    said = refusal("search_service", tmp_path, tokens=key, data_dir=tmp_path / "data")
    assert said.startswith(f"the tokens in {key}: line 1 ")
    assert "PRIVATE KEY" not in said


def test_a_checkpoint_that_was_changed_stops_the_start(tmp_path: Path) -> None:
    data = bytearray(default_checkpoint_path().read_bytes())
    sha256 = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    said = refusal("encoder_service", tmp_path, checkpoint=path, checkpoint_sha256=sha256)
    assert said.startswith(f"{path}: its SHA-256 is {hashlib.sha256(data).hexdigest()}, not the")
