"""`hashlens health` and other commands before servers that are silent, closed, or know nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hashlens.cli.main import main
from tests.support.certificates import Authority

NOBODY = "127.0.0.1:1"


@contextmanager
def not_serving(credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Yield the address of a server that answers health and lets no call through."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def run(command: str, target: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        main, [command, "--search", target, "--encoder", target, *arguments], catch_exceptions=False
    )


def test_who_answers_is_not_away() -> None:
    with not_serving() as target:
        plain, verbose, call = (
            run("health", target),
            run("health", target, "-v"),
            run("collections", target),
        )
    assert plain.exit_code == verbose.exit_code == call.exit_code == 1
    assert "not serving" in plain.output
    assert "not serving" in verbose.output
    assert "away" not in plain.output + verbose.output
    assert "hashlens health -v" in plain.output
    assert "hashlens up" not in plain.output + verbose.output + call.output
    assert "does not serve. It is there" in call.output
    assert "hashlens health -v" in call.output


def test_who_does_not_answer_is_away() -> None:
    result = run("health", NOBODY)
    assert result.exit_code == 1
    assert "away" in result.output
    assert "Connection refused" in result.output
    assert "hashlens up" in result.output
    assert "--tls-ca" in result.output


@pytest.mark.parametrize("command", ["health", "collections"])
def test_an_authority_that_is_not_theirs_is_named(tmp_path: Path, command: str) -> None:
    pair = Authority(tmp_path).pair("server")
    other = Authority(tmp_path, "other")
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.cert.read_bytes())])
    with not_serving(credentials) as target:
        result = run(command, target, "--tls-ca", str(other.ca))
    assert result.exit_code == 1
    assert "CERTIFICATE_VERIFY_FAILED" not in result.output  # The last words are plainer.
    assert "unable to get local issuer certificate" in result.output
    for option in ("--tls-ca", "--tls-cert", "--tls-name"):
        assert option in result.output
