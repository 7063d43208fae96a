"""Encrypted connections, and certificates that change while they are used."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hashlens import Client, ClientConfig
from hashlens.errors import InvalidInputError
from hashlens.rpc import watched
from hashlens.rpc.channel import ChannelSecurity, connect, connect_aio
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.support.certificates import Authority, Mount, Pair
from tests.support.secured import N_PARTS, SecuredServer
from tests.support.services import wait_until


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are seen at once: the next look is never far."""
    monkeypatch.setattr(watched, "LOOK_S", 0.0)


def ask(server: SecuredServer, security: ChannelSecurity, target: str = "") -> None:
    """Make one call on a connection of its own."""
    with connect(target or server.target, [], security) as channel:
        enc_grpc.EncoderServiceStub(channel).GetModel(enc.GetModelRequest(), timeout=10)


def refused(server: SecuredServer, security: ChannelSecurity, target: str = "") -> str:
    """The reason why there is no connection."""
    with pytest.raises(grpc.RpcError) as caught:
        ask(server, security, target)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.entries.of == []
    return str(caught.value.details())


def shake_hands(
    server: SecuredServer, authority: Authority, adjust: Callable[[ssl.SSLContext], None]
) -> tuple[Any, str | None]:
    """Return the server's certificate and the version of TLS."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    adjust(context)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.getpeercert(), secure.version()


def serial_of(server: SecuredServer, authority: Authority) -> str:
    certificate, _ = shake_hands(server, authority, lambda context: None)
    return str(certificate["serialNumber"])


def test_who_is_let_in(authority: Authority, tmp_path: Path) -> None:
    pair = authority.pair("server", "localhost", "search.example")
    other = Authority(tmp_path, "other")
    with SecuredServer(listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key) as server:
        # A name may stand for two addresses, and what is told is what the last one tried said.
        by_number = f"127.0.0.1:{server.port}"
        assert "CERTIFICATE_VERIFY_FAILED" in refused(server, other.security(), by_number)
        # Of a public authority it is not.
        assert "CERTIFICATE_VERIFY_FAILED" in refused(server, ChannelSecurity(tls=True), by_number)
        assert refused(server, ChannelSecurity())
        # The certificate does not have this name, but that one.
        assert "127.0.0.1" in refused(server, authority.security(), by_number)
        ask(server, authority.security(tls_name="search.example"), by_number)
        ask(server, authority.security())
        # A certificate that is not asked for does no harm.
        ask(server, authority.security(other.pair("client")))


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    pair = authority.pair("server", expired=True)
    with SecuredServer(listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key) as server:
        by_number = f"127.0.0.1:{server.port}"
        assert "CERTIFICATE_VERIFY_FAILED" in refused(server, authority.security(), by_number)


def test_a_client_has_to_show_a_certificate(authority: Authority, tmp_path: Path) -> None:
    pair = authority.pair("server")
    strangers = Authority(tmp_path, "strangers")
    with SecuredServer(
        listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=authority.ca
    ) as server:
        assert refused(server, authority.security())
        assert refused(server, authority.security(strangers.pair("stranger")))
        assert refused(server, authority.security(authority.pair("late", expired=True)))
        ask(server, authority.security(authority.pair("client")))


@pytest.mark.parametrize(
    ("version", "is_spoken"),
    [("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)],
)
def test_only_new_tls_is_spoken(authority: Authority, version: str, is_spoken: bool) -> None:
    def only(context: ssl.SSLContext) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # Ours would not speak the old ones either, unless it is told to.
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion[version]

    pair = authority.pair("server")
    with SecuredServer(listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key) as server:
        if is_spoken:
            spoken = shake_hands(server, authority, only)[1]
            assert spoken is not None
            assert spoken.replace(".", "_") == version
        else:
            with pytest.raises(OSError):  # noqa: PT011 - the end of the connection, or an alert
                shake_hands(server, authority, only)


def test_a_pair_that_is_none_stops_the_start(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.pair("server"), authority.pair("other")
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00 no certificate, but hunter2")
    for options, words in (
        ({"tls_cert": pair.cert, "tls_key": other.key}, "no certificate and its private key"),
        ({"tls_cert": junk, "tls_key": pair.key}, "no certificate and its private key"),
        ({"tls_cert": pair.cert, "tls_key": tmp_path / "none"}, "cannot be read"),
        (
            {"tls_cert": pair.cert, "tls_key": pair.key, "tls_client_ca": junk},
            "holds no certificates",
        ),
    ):
        with (
            pytest.raises(InvalidInputError, match=words) as caught,
            SecuredServer(listen="127.0.0.1:0", **options),
        ):
            pass
        assert "hunter2" not in str(caught.value)


def test_a_key_with_a_password_is_refused_without_asking(
    authority: Authority, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization

    pair = authority.pair("server")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    pair.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with (
        pytest.raises(InvalidInputError, match="without a password"),
        SecuredServer(listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key),
    ):
        pass


@pytest.mark.usefixtures("quick_looks")
def test_a_broken_new_certificate_is_logged_and_the_old_one_stays(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pair, other = authority.pair("server"), authority.pair("other")
    with SecuredServer(listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key) as server:
        first = serial_of(server, authority)
        whole = pair.cert.read_bytes()
        for broken in (other.cert.read_bytes(), whole[:200], b""):
            caplog.clear()
            pair.cert.write_bytes(broken)
            assert serial_of(server, authority) == first
            ask(server, authority.security())
            assert caplog.text.count("stays in use") == 1
        # The key of the one that waited arrives.
        pair.cert.write_bytes(other.cert.read_bytes())
        pair.key.write_bytes(other.key.read_bytes())
        assert serial_of(server, authority) != first
        ask(server, authority.security())
        assert "read again" in caplog.text


@pytest.mark.usefixtures("quick_looks")
def test_who_signs_clients_can_change(authority: Authority, tmp_path: Path) -> None:
    pair = authority.pair("server")
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(old.pem)
    olds, news = authority.security(old.pair("a")), authority.security(new.pair("b"))
    with SecuredServer(
        listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=trusted
    ) as server:
        ask(server, olds)
        trusted.write_bytes(old.pem + new.pem)
        ask(server, olds)
        ask(server, news)
        trusted.write_bytes(new.pem)
        ask(server, news)
        with pytest.raises(grpc.RpcError):
            ask(server, olds)


class Rotation:
    """Changes the certificates of both ends in turn, each in another way."""

    def __init__(self, authority: Authority, directory: Path) -> None:
        self._authority = authority
        self.server = Mount(directory / "server", authority.pair("first"))
        self.client = authority.pair("client")
        self.n = 0

    def step(self) -> None:
        self.n += 1
        self.server.swap(self._authority.pair(f"server-{self.n}"))
        fresh = self._authority.pair("fresh")
        # In place, one after the other, with a time in which they do not fit.
        self.client.cert.write_bytes(fresh.cert.read_bytes())
        time.sleep(0.05)
        self.client.key.write_bytes(fresh.key.read_bytes())


@pytest.fixture
def rotation(authority: Authority, tmp_path: Path) -> Rotation:
    return Rotation(authority, tmp_path)


@pytest.fixture
def rotating_server(
    rotation: Rotation, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SecuredServer]:
    monkeypatch.setattr(watched, "LOOK_S", 0.1)
    pair: Pair = rotation.server.pair
    with SecuredServer(
        listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=authority.ca
    ) as server:
        yield server


def test_certificates_change_under_load_without_a_failed_call(
    rotation: Rotation, rotating_server: SecuredServer, authority: Authority
) -> None:
    server, security = rotating_server, authority.security(rotation.client)
    over = threading.Event()
    channels: list[Any] = []

    def ask_on_one_channel() -> int:
        n = 0
        with connect(server.target, [], security) as channel:
            channels.append(channel)
            stub = enc_grpc.EncoderServiceStub(channel)
            while not over.is_set():
                stub.GetModel(enc.GetModelRequest(), timeout=20)
                n += 1
        return n

    def all_use_a_new_one(n: int) -> bool:
        """Whether every channel was opened anew so often; or a call has failed."""
        done = any(call.done() for call in calls)
        return done or (len(channels) == 4 and all(len(each._older) >= n for each in channels))

    def ask_on_new_channels() -> int:
        n = 0
        # Opened with what the files hold at the moment, which is a pair or is waited for.
        while not over.is_set():
            try:
                ask(server, security)
            except InvalidInputError:
                time.sleep(0.01)
            n += 1
        return n

    async def ask_from_a_loop() -> int:
        async with connect_aio(server.target, [], security) as channel:
            stub = enc_grpc.EncoderServiceStub(channel)

            async def caller() -> int:
                n = 0
                while not over.is_set():
                    await stub.GetModel(enc.GetModelRequest(), timeout=20)
                    n += 1
                return n

            return sum(await asyncio.gather(*(caller() for _ in range(4))))

    def show_client_certificate() -> str:
        def with_certificate(context: ssl.SSLContext) -> None:
            context.load_cert_chain(rotation.client.cert, rotation.client.key)

        certificate, _ = shake_hands(server, authority, with_certificate)
        return str(certificate["serialNumber"])

    served = {show_client_certificate()}
    with ThreadPoolExecutor(6) as pool:
        try:
            calls = [pool.submit(ask_on_one_channel) for _ in range(4)]
            calls.append(pool.submit(ask_on_new_channels))
            calls.append(pool.submit(asyncio.run, ask_from_a_loop()))
            for changes in range(6):
                time.sleep(0.4)
                rotation.step()
                wait_until(
                    lambda: show_client_certificate() not in served,
                    within_s=20,
                    what="the new certificate is served",
                )
                served.add(show_client_certificate())
                wait_until(
                    lambda n=changes + 1: all_use_a_new_one(n),
                    within_s=20,
                    what="every channel shows the new certificate",
                )
        finally:
            over.set()
        # Whatever failed is raised here.
        assert all(call.result(30) > 10 for call in calls[:4])
        assert all(call.result(30) > 1 for call in calls[4:])
    assert len(served) == 7


def test_a_stream_ends_where_it_began(
    rotation: Rotation, rotating_server: SecuredServer, authority: Authority
) -> None:
    server, security = rotating_server, authority.security(rotation.client)
    with connect(server.target, [], security) as channel:
        search = spb_grpc.SearchServiceStub(channel)
        encoder = enc_grpc.EncoderServiceStub(channel)
        parts = iter(search.StreamBall(spb.StreamBallRequest(), timeout=30))
        next(parts)
        first: Any = channel
        before = first.current()
        rotation.step()
        time.sleep(0.2)
        encoder.GetModel(enc.GetModelRequest(), timeout=20)
        assert first.current() is not before
        del before
        server.go_on()
        assert len(list(parts)) == N_PARTS - 1


async def _stream_through_a_change(
    rotation: Rotation, server: SecuredServer, security: ChannelSecurity
) -> int:
    async with connect_aio(server.target, [], security) as channel:
        search = spb_grpc.SearchServiceStub(channel)
        encoder = enc_grpc.EncoderServiceStub(channel)
        call = search.StreamBall(spb.StreamBallRequest(), timeout=30)
        n = 0
        async for _ in call:
            n += 1
            if n == 1:
                await asyncio.to_thread(rotation.step)
                await asyncio.sleep(0.2)
                await encoder.GetModel(enc.GetModelRequest(), timeout=20)
                assert len(channel._ending) == 1
                server.go_on()
        return n


def test_an_awaited_stream_ends_where_it_began(
    rotation: Rotation, rotating_server: SecuredServer, authority: Authority
) -> None:
    security = authority.security(rotation.client)
    n = asyncio.run(_stream_through_a_change(rotation, rotating_server, security))
    assert n == N_PARTS


def test_closing_ends_the_calls_of_older_channels(
    rotation: Rotation, rotating_server: SecuredServer, authority: Authority
) -> None:
    security = authority.security(rotation.client)
    channel: Any = connect(rotating_server.target, [], security)
    parts = iter(spb_grpc.SearchServiceStub(channel).StreamBall(spb.StreamBallRequest()))
    next(parts)
    rotation.step()
    time.sleep(0.2)
    channel.current()
    channel.close()
    with pytest.raises(grpc.RpcError) as caught:
        list(parts)
    assert caught.value.code() is grpc.StatusCode.CANCELLED


def test_a_client_says_what_is_wrong(authority: Authority, tmp_path: Path) -> None:
    pair = authority.pair("server")
    with SecuredServer(listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key) as server:
        config = ClientConfig(security=Authority(tmp_path, "other").security())
        # A name may stand for two addresses, and what is told is what the last one tried said.
        there = server.target.replace("localhost", "127.0.0.1")
        with Client(there, there, config=config) as client:
            (state,) = client.health()
            assert not state.serving
            assert "CERTIFICATE_VERIFY_FAILED" in state.detail
        config = ClientConfig(security=authority.security())
        with Client(server.target, server.target, config=config) as client:
            assert client.health()[0].serving
    for options, field in (
        ({"tls_cert": pair.cert}, "tls_key"),
        ({"tls_name": "x"}, "tls_name"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            ChannelSecurity(**options)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(InvalidInputError, match="cannot be read"):
        Client(config=ClientConfig(security=ChannelSecurity(tls_ca=tmp_path / "none")))
