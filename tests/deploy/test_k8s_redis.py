"""The Redis of deploy/k8s, really started with its file, arguments, and the README's secrets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.deploy.k8s_readme import secrets
from tests.deploy.k8s_server import running_redis
from tests.deploy.manifests import BASE, K8S, ROOT, Cluster, Combination, render
from tests.support.redis_server import server_binaries

BINARIES = server_binaries()


def connect(port: int, **options: object) -> redis.Redis:
    options["retry"] = Retry(NoBackoff(), 0)
    return redis.Redis("127.0.0.1", port, protocol=2, socket_timeout=10, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name)
def test_it_starts_and_knows_who_may_do_what(binary: Path, tmp_path: Path) -> None:
    cluster = Cluster(render(BASE), secrets())
    password = secrets()["search-credentials"]["redis-password"]
    with running_redis(cluster, binary, tmp_path) as port:
        with connect(port) as probe:
            assert probe.ping()
            with pytest.raises(redis.exceptions.NoPermissionError):
                probe.get("hl:a")
        with connect(port, username="hashlens", password=password) as search:
            search.hset("hl:a", "b", "c")
            settings = search.config_get("append*")
            assert settings["appendonly"] == "yes"
            assert settings["appendfsync"] == "always"
            assert search.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            for forbidden in (("GET", "other"), ("FLUSHALL",), ("CONFIG", "SET", "dir", "/")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    search.execute_command(*forbidden)
        with (
            pytest.raises(redis.exceptions.AuthenticationError),
            connect(port, username="hashlens", password="wrong") as stranger,
        ):
            stranger.time()
    # Killed just now: what it acknowledged is on its volume.
    with (
        running_redis(cluster, binary, tmp_path) as port,
        connect(port, username="hashlens", password=password) as search,
    ):
        assert search.hget("hl:a", "b") == b"c"


def test_with_tls_it_wants_a_certificate(tmp_path: Path) -> None:
    binary = next((path for path in BINARIES if _speaks_tls(path)), None)
    if binary is None:
        pytest.skip("no Redis here speaks TLS")
    cluster = Cluster(render(Combination(BASE, ("tls",))), secrets())
    shown = tmp_path / "shown"
    shown.mkdir()
    for name, text in secrets()["search-tls"].items():
        (shown / name).write_text(text)
    with running_redis(cluster, binary, tmp_path) as port:
        # The name is not that of loopback; `test_k8s_readme` looks at the names.
        known = {"ssl": True, "ssl_ca_certs": str(shown / "ca.crt"), "ssl_check_hostname": False}
        pair = {"ssl_certfile": str(shown / "tls.crt"), "ssl_keyfile": str(shown / "tls.key")}
        with connect(port, **known, **pair) as probe:
            assert probe.ping()
        for others in ({}, known):
            with pytest.raises(redis.exceptions.ConnectionError), connect(port, **others) as bare:
                bare.ping()


def _speaks_tls(binary: Path) -> bool:
    # One that does looks for the certificate, which is not given.
    command = [str(binary), "--port", "0", "--tls-port", "1", "--save", ""]
    refusal = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return "Failed to configure TLS" in refusal.stdout


def test_its_user_may_do_what_operations_says() -> None:
    told = re.search(r"^ACL SETUSER hashlens .* ~hl:\* (.*)$", operations(), re.M)
    acl = secrets()["redis-acl"]["users.acl"]
    given = re.search(
        r"^user hashlens on #[0-9a-f]{64} resetchannels ~hl:\* -@all (.*)$", acl, re.M
    )
    assert told is not None
    assert given is not None
    assert given[1] == told[1]


def test_it_has_the_settings_of_the_embedded_server() -> None:
    from search_service.storage.embedded import SETTINGS

    text = (K8S / "base" / "redis.conf").read_text()
    found = dict(line.split(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    found["save"] = found["save"].strip('"')
    others = {"port", "unixsocketperm", "daemonize"}
    assert {name: found.get(name) for name in SETTINGS if name not in others} == {
        name: value for name, value in SETTINGS.items() if name not in others
    }
    # It turns strangers away by its users, and `default` has no password: see base/redis.conf.
    assert found["protected-mode"] == "no"


def operations() -> str:
    return (ROOT / "docs" / "operations.md").read_text()
