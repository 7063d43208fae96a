"""What a stranger may send to the ports beside the main one, and to one with TLS."""

from __future__ import annotations

import random
import socket
import ssl
import time
from contextlib import ExitStack, suppress
from typing import Final

from tests.fuzz.http2 import (
    END_HEADERS,
    HEADERS,
    PREFACE,
    SETTINGS,
    Connection,
    call_headers,
    frame,
)
from tests.fuzz.noise import ATTACKS, Attack, gzip_bombs, times

_ALPN: Final = ["h2"]


def slow_http(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Hold connections with half a request, byte by byte, or a reply that is not read."""
    whole = f"GET {path} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
    with ExitStack() as stack:
        connections = [
            stack.enter_context(Connection(target, None, small=True)) for _ in times(100, scale)
        ]
        for i, connection in enumerate(connections):
            connection.send(whole if i % 3 == 0 else whole[:-2] if i % 3 == 1 else b"")
        for byte in whole[: len(times(30, scale))]:
            for connection in connections[2::3]:
                connection.send(bytes([byte]))
            time.sleep(0.05)


def large_http(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send lines, headers and bodies that are too long, too many, or no text."""
    head = f"GET {path} HTTP/1.1\r\n".encode()
    for text in (
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        head + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n",
        head + b"X: " + b"y" * 60_000 + b"\r\nY: " + b"z" * 60_000 + b"\r\n\r\n",
        b"POST " + head[4:] + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 100_000,
        b"GET /%ff%00?name[]=\xff HTTP/1.1\r\n\r\n",
        head + b"Accept: \xff\xfe, application/openmetrics-text;version=9;;=\r\n\r\n",
        head + b"Accept-Encoding: gzip, \0\r\n\r\n",
        b"\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
    ):
        for _ in times(10, scale):
            with Connection(target, None) as connection:
                connection.send(text)
                connection.read(0.2)


def half_handshakes(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send a part of a TLS handshake, or one with bits turned."""
    hello = _hello()
    with ExitStack() as stack:
        for i in times(300, scale):
            spoiled = bytearray(hello)
            if i % 2:
                for _ in range(rng.choice((1, 5))):
                    spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
            connection = stack.enter_context(Connection(target, None))
            connection.send(spoiled[: rng.randrange(1, len(spoiled))] if i % 3 == 0 else spoiled)
            if i % 7 == 0:
                connection.send(rng.randbytes(20_000))
        time.sleep(2 * scale)


def inside_tls(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Finish the handshake, and then send noise, half a request, or nothing."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(_ALPN)
    host, _, port = target.rpartition(":")
    with ExitStack() as stack:
        for i in times(100, scale):
            plain = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            with suppress(OSError):  # Also what TLS raises: the server may have closed it.
                secure = stack.enter_context(context.wrap_socket(plain))
                if i % 4 == 0:
                    continue
                begun = PREFACE + frame(SETTINGS, 0, 0, b"")
                if i % 4 == 1:
                    secure.sendall(rng.randbytes(rng.choice((1, 24, 20_000))))
                elif i % 4 == 2:
                    secure.sendall(begun + frame(HEADERS, END_HEADERS, 1, call_headers(path)))
                else:
                    for _ in range(20):
                        kind, flags = rng.randrange(10), rng.randrange(256)
                        begun += frame(kind, flags, rng.choice((0, 1, 3)), rng.randbytes(100))
                    secure.sendall(begun)
        time.sleep(2 * scale)


def _hello() -> bytes:
    """Return the first message of a TLS client."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(_ALPN)
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


RAW_ATTACKS: tuple[Attack, ...] = tuple(attack for attack in ATTACKS if attack is not gzip_bombs)
"""Those that need nobody who speaks gRPC at the other end."""

HTTP_ATTACKS: tuple[Attack, ...] = (*RAW_ATTACKS, slow_http, large_http)
TLS_ATTACKS: tuple[Attack, ...] = (*RAW_ATTACKS, half_handshakes, inside_tls)
