"""Who may call what, over the wire; and where a server may listen, and a token be sent."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hashlens import Client, ClientConfig
from hashlens.errors import InvalidInputError, PermissionDeniedError, UnauthenticatedError
from hashlens.rpc import watched
from hashlens.rpc.addresses import is_loopback
from hashlens.rpc.channel import ChannelSecurity
from hashlens.rpc.scopes import Scope, scope_of
from hashlens.rpc.server_config import ServerConfig
from hashlens.rpc.status import error_of_call
from search_service.config import SearchConfig
from tests.support.secured import METHODS, SecuredServer, path_of

TOKENS = {scope: scope.name.lower() + "-" + "x" * 32 for scope in Scope}
HUGE = b"\xff" * (48 << 20)

Metadata = tuple[tuple[str, str | bytes], ...]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(
        "".join(f"{scope.name.lower()} {token} {scope.name}\n" for scope, token in TOKENS.items())
    )
    return path


@pytest.fixture
def server(tokens: Path) -> Iterator[SecuredServer]:
    with SecuredServer(listen="127.0.0.1:0", tokens=tokens, reflection=True) as running:
        yield running


@pytest.fixture
def channel(server: SecuredServer) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as opened:
        yield opened


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def call(
    channel: grpc.Channel, path: str, metadata: Metadata, request: bytes = b"", kind: str = ""
) -> grpc.RpcError | None:
    """Call a method with bytes as its request; return how that failed, None if it did not."""
    kind = kind or "unary_unary"
    method = getattr(channel, kind)(path)
    given: Any = iter([request]) if kind.startswith("stream") else request
    try:
        reply = method(given, timeout=20, metadata=metadata)
        if kind.endswith("stream"):
            next(reply, None)
            reply.cancel()
    except grpc.RpcError as failure:
        return failure
    return None


def kind_of(method: MethodDescriptor) -> str:
    ends = (method.client_streaming, method.server_streaming)
    return "_".join("stream" if streams else "unary" for streams in ends)


def test_each_scope_allows_its_methods_and_no_others(
    server: SecuredServer, channel: grpc.Channel
) -> None:
    n_refused = 0
    for method in METHODS:
        path = path_of(method)
        needed = scope_of(path)
        assert needed is not None
        for scope, token in TOKENS.items():
            server.entries.of.clear()
            failure = call(channel, path, bearer(token), kind=kind_of(method))
            if scope >= needed:
                # Most are not there, which is told to who may ask.
                assert failure is None or failure.code() is grpc.StatusCode.UNIMPLEMENTED, path
                assert f"handler of {path}" in server.entries.of
                continue
            n_refused += 1
            assert failure is not None
            assert failure.code() is grpc.StatusCode.PERMISSION_DENIED, path
            assert server.entries.of == []
            error = error_of_call(failure)
            assert isinstance(error, PermissionDeniedError)
            assert f"scope {needed.name.lower()}; the token {scope.name}" in error.message
            assert token not in error.message
    assert n_refused > len(METHODS) / 2


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ((), "wants to know who calls"),
        (bearer(""), "none of this server's"),
        (bearer("x" * 32), "none of this server's"),
        (bearer(TOKENS[Scope.READ] + "x"), "none of this server's"),
        (bearer("x" * 6000), "none of this server's"),
        ((("authorization", "Basic dXNlcjpwYXNz"),), "as `Bearer TOKEN`"),
        ((("authorization", TOKENS[Scope.ADMIN]),), "as `Bearer TOKEN`"),
        (bearer(TOKENS[Scope.ADMIN]) * 2, "given once"),
        (bearer("x" * 32) + bearer(TOKENS[Scope.ADMIN]), "given once"),
        ((("authorization-bin", b"Bearer x"),), "wants to know who calls"),
        ((("token", TOKENS[Scope.ADMIN]),), "wants to know who calls"),
    ],
)
def test_who_is_not_known_is_refused(
    server: SecuredServer, channel: grpc.Channel, metadata: Metadata, words: str
) -> None:
    paths = [*map(path_of, METHODS), "/hashlens.v1.SearchService/Nothing", "/no.Service/Here"]
    for path in paths:
        failure = call(channel, path, metadata)
        assert failure is not None
        assert failure.code() is grpc.StatusCode.UNAUTHENTICATED, path
        error = error_of_call(failure)
        assert isinstance(error, UnauthenticatedError)
        assert words in error.message
    assert server.entries.of == []


def test_a_scheme_is_known_in_any_case(channel: grpc.Channel) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        metadata = (("authorization", f"{scheme} {TOKENS[Scope.READ]}"),)
        assert call(channel, "/hashlens.v1.EncoderService/GetModel", metadata) is None


def test_a_method_that_is_not_there_is_unimplemented_for_who_is_known(
    channel: grpc.Channel,
) -> None:
    for path in ("/hashlens.v1.SearchService/Nothing", "/no.Service/Here"):
        failure = call(channel, path, bearer(TOKENS[Scope.READ]))
        assert failure is not None
        assert failure.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_stream"])
def test_nothing_is_read_of_what_a_stranger_sends(
    server: SecuredServer, channel: grpc.Channel, kind: str
) -> None:
    path = "/hashlens.v1.SearchService/Upsert"
    for metadata, code in (
        ((), grpc.StatusCode.UNAUTHENTICATED),
        (bearer(TOKENS[Scope.READ]), grpc.StatusCode.PERMISSION_DENIED),
    ):
        # Above the limit, too: the one that would be noticed when it is read.
        for request in (b"\xff garbage", HUGE, HUGE + HUGE):
            failure = call(channel, path, metadata, request, kind)
            assert failure is not None
            assert failure.code() is code, failure
    assert server.entries.of == []
    failure = call(channel, path, bearer(TOKENS[Scope.WRITE]), b"\xff garbage")
    assert failure is not None
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"request of {path}" in server.entries.of


def test_health_is_for_everybody(channel: grpc.Channel) -> None:
    for metadata in ((), bearer("wrong")):
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10, metadata=metadata
        )
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_is_off_and_asks_for_a_token_when_on(
    channel: grpc.Channel, tokens: Path
) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    def names(channel: grpc.Channel, metadata: Metadata) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=10, metadata=metadata)
        return {service.name for service in reply.list_services_response.service}

    found = names(channel, bearer(TOKENS[Scope.READ]))
    assert {"hashlens.v1.EncoderService", "grpc.health.v1.Health"} <= found
    with pytest.raises(grpc.RpcError) as caught:
        names(channel, ())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with (
        SecuredServer(listen="127.0.0.1:0") as other,
        grpc.insecure_channel(other.address) as open_channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        names(open_channel, ())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not ServerConfig().reflection


def test_tokens_change_while_calls_come(
    server: SecuredServer, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 0.05)
    shown = tmp_path / "token"
    shown.write_text(TOKENS[Scope.READ])
    config = ClientConfig(security=ChannelSecurity(token_file=shown))

    def settle() -> None:
        time.sleep(0.1)  # Two looks.

    with Client(server.address, server.address, config=config) as client:
        settle()  # Those that were set before the patch are a second away.
        time.sleep(watched.LOOK_S + 1.0)
        client.model()
        tokens.write_text(f"read {'n' * 32}\n")
        settle()
        with pytest.raises(UnauthenticatedError):
            client.model()
        # The client's own file is read again, too.
        shown.write_text("n" * 32 + "\n")
        settle()
        client.model()
        tokens.write_text("nonsense\n")
        settle()
        client.model()


def test_a_file_of_tokens_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    for content, words in ((None, "cannot be read"), (b"read x\n", "line 1"), (b"", "no token")):
        if content is not None:
            path.write_bytes(content)
        with (
            pytest.raises(InvalidInputError, match=words),
            SecuredServer(listen="127.0.0.1:0", tokens=path),
        ):
            pass


LOOPBACK = ["127.0.0.1:0", "127.1.2.3:80", "[::1]:0", "localhost:0"]
PUBLIC = [
    *("0.0.0.0:0", "[::]:0", "192.168.1.2:1", "10.0.0.1:1", "8.8.8.8:1", "[2001:db8::1]:1"),
    *("search.example:1", "localhost.example:1", "LOCALHOST.:1", "::1:0", "127.1:0", "0:0", "*:0"),
    *("unix:/tmp/a:1", "ipv4:127.0.0.1:1", "dns:///localhost:1", "2130706433:1", "[127.0.0.2:1"),
    "[::ffff:8.8.8.8]:1",
]


@pytest.mark.parametrize("listen", PUBLIC)
def test_listening_in_the_open_is_refused(listen: str, tmp_path: Path) -> None:
    for config in (ServerConfig, SearchConfig):
        with pytest.raises(InvalidInputError, match=r"--tls-cert .* or say --insecure") as caught:
            config(listen=listen)
        assert caught.value.field == "listen"
        config(listen=listen, insecure=True)
        config(listen=listen, tls_cert=tmp_path / "crt", tls_key=tmp_path / "key")


@pytest.mark.parametrize("listen", LOOPBACK)
def test_listening_for_this_machine_is_the_default(listen: str) -> None:
    ServerConfig(listen=listen)
    assert is_loopback(ServerConfig().listen)
    assert is_loopback(SearchConfig().listen)


@pytest.mark.parametrize("listen", [address for address in LOOPBACK if address.endswith(":0")])
def test_what_passes_for_loopback_is_not_reached_from_elsewhere(listen: str) -> None:
    with SecuredServer(listen=listen) as server:
        local = socket.gethostbyname_ex(socket.gethostname())[2]
        elsewhere = [address for address in local if not address.startswith("127.")]
        for address in elsewhere:
            with pytest.raises(OSError):  # noqa: PT011 - nobody listens there
                socket.create_connection((address, server.port), timeout=1).close()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_an_open_server_says_so(listen: str, caplog: pytest.LogCaptureFixture) -> None:
    with SecuredServer(listen=listen, insecure=True):
        pass
    assert "is not encrypted" in caplog.text
    assert "--tokens" in caplog.text


def test_a_token_is_not_sent_in_the_open(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("hunter2" * 6)
    security = ChannelSecurity(token_file=path)
    several = "ipv4:127.0.0.1:1,127.0.0.2:1"
    for target in (*(set(PUBLIC) - {"ipv4:127.0.0.1:1"}), f"{several},192.0.2.1:1"):
        with pytest.raises(InvalidInputError, match="to read") as caught:
            Client(target, "127.0.0.1:1", config=ClientConfig(security=security))
        assert "hunter2" not in str(caught.value)
    for target in (*LOOPBACK, several):
        Client(target, target, config=ClientConfig(security=security)).close()
    for safe in (
        ChannelSecurity(token_file=path, insecure=True),
        ChannelSecurity(token_file=path, tls=True),
    ):
        Client(PUBLIC[4], PUBLIC[4], config=ClientConfig(security=safe)).close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tls_cert": Path("a")}, "tls_key"),
        ({"tls_key": Path("a")}, "tls_key"),
        ({"tls_client_ca": Path("a")}, "tls_client_ca"),
        ({"peer_tls_ca": Path("a")}, "peer_tls_ca"),
        ({"encoder_tls_cert": Path("a")}, "encoder_tls_key"),
        ({"encoder_tls_name": "a"}, "encoder_tls_name"),
        ({"peer_tls_name": "a"}, "peer_tls_name"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SearchConfig(**options)
    assert caught.value.field == field


def test_a_token_for_this_machine_goes_to_no_proxy(
    server: SecuredServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKENS[Scope.READ])
    config = ClientConfig(security=ChannelSecurity(token_file=path))
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("grpc_proxy", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        proxy.settimeout(0.2)
        with Client(server.address, server.address, config=config) as client:
            client.model()
        with pytest.raises(TimeoutError):
            proxy.accept()
