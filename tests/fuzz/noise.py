"""What a stranger may send to a port: noise, half a request, floods, and bombs.

Each attack is a function of a target, a method's path, a random generator and how much of it. None
looks at what the server answers, unless a typed refusal is due: that the server is well is for
`tests.fuzz.wire` to see.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Final

import grpc

from tests.fuzz.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Connection,
    call_headers,
    data_frames,
    frame,
    literal,
    message,
)

Attack = Callable[[str, str, random.Random, float], None]

_INITIAL_WINDOW: Final = 4
"""Identifier of SETTINGS_INITIAL_WINDOW_SIZE."""


def times(n: int, scale: float) -> range:
    """Return as much of n as is asked for, at least one."""
    return range(max(1, round(n * scale)))


def random_bytes(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send bytes without any sense, as the first or after a preface."""
    for i in times(200, scale):
        with Connection(target, None if i % 2 else ()) as connection:
            connection.send(rng.randbytes(rng.choice((1, 24, 500, 20_000))))
            if i % 5 == 0:
                connection.read(0.05)


def garbage_frames(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send frames whose kind, flags, stream and content are decided by chance."""
    for _ in times(200, scale):
        with Connection(target) as connection:
            if rng.random() < 0.5:
                connection.send(frame(HEADERS, END_HEADERS, 1, call_headers(path)))
            for _n in range(rng.randrange(1, 40)):
                kind = rng.choice((*range(10), rng.randrange(256)))
                stream = rng.choice((0, 1, 1, 3, 2, 2**31 - 1))
                size = rng.choice((0, 1, 4, 8, 100, 16_384))
                garbage = frame(kind, rng.randrange(256), stream, rng.randbytes(size))
                if not connection.send(garbage):
                    break


def broken_headers(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send header blocks with bits turned, and of a wrong HTTP/2 request."""
    whole = call_headers(path)
    wrong = [
        literal(b":method", b"GET") + literal(b":path", path.encode()),
        whole + literal(b":path", b"/again"),
        whole + literal(b"Upper-Case", b"x"),
        whole + literal(b"x", b"a\0b\r\nc"),
        whole + literal(b"grpc-timeout", b"99999999999999H"),
        whole + literal(b"grpc-timeout", b"-1S"),
        whole + literal(b"grpc-encoding", b"nothing"),
        whole + literal(b"bad-bin", b"!!not base64!!"),
        whole + literal(b"traceparent", b"00-" + b"z" * 5_000),
        whole + literal(b"authorization", b"Bearer \xff\xfe\0"),
        call_headers("no slash"),
        call_headers("/" * 5_000),
        call_headers(path + "\xff"),
        b"\x80",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ]
    for i in times(200, scale):
        block = bytearray(wrong[i % len(wrong)] if i < len(wrong) else whole)
        if i >= len(wrong):
            for _ in range(rng.choice((1, 3))):
                block[rng.randrange(len(block))] ^= 1 << rng.randrange(8)
        with Connection(target) as connection:
            connection.send(frame(HEADERS, END_HEADERS, 1, bytes(block)))
            connection.send(data_frames(1, message(rng.randbytes(20))))
            connection.read(0.02)


def http1(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Speak HTTP/1.1."""
    for text in (
        f"GET / HTTP/1.1\r\nHost: {target}\r\n\r\n",
        f"POST {path} HTTP/1.1\r\nContent-Type: application/grpc\r\nContent-Length: 5\r\n\r\nabcde",
        "GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
        "GET / HTTP/1.1\r\n" + "X: " + "y" * 1_000_000,
        "CONNECT 127.0.0.1:22 HTTP/1.1\r\n\r\n",
    ):
        with Connection(target, None) as connection:
            connection.send(text.encode())
            connection.read(0.3)


def half_open(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Hold many connections that say nothing, half a preface, or nothing behind it."""
    with ExitStack() as stack:
        for i in times(500, scale):
            connection = stack.enter_context(Connection(target, () if i % 3 == 0 else None))
            if i % 3 == 1:
                connection.send(PREFACE[:10])
        time.sleep(2 * scale)


def slow_requests(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send headers, or a message, byte by byte, and never the last."""
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(target)) for _ in times(100, scale)]
        whole = frame(HEADERS, END_HEADERS, 1, call_headers(path))
        for i, connection in enumerate(connections):
            connection.send(whole if i % 2 else frame(HEADERS, 0, 1, call_headers(path)))
            if i % 2:
                connection.send(frame(DATA, 0, 1, message(b"", length=1_000_000)))
        for _ in times(40, scale):
            for i, connection in enumerate(connections):
                connection.send(
                    frame(DATA, 0, 1, b"x") if i % 2 else frame(CONTINUATION, 0, 1, b"")
                )
            time.sleep(0.05)


def lying_lengths(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Announce messages that are larger than may be, or than what comes."""
    for length in (2**32 - 1, 2**31, 65 * 2**20, 10):
        for _ in times(20, scale):
            with Connection(target) as connection:
                connection.send(frame(HEADERS, END_HEADERS, 1, call_headers(path)))
                connection.send(data_frames(1, message(b"x" * 5, length=length)))
                connection.read(0.1)


def oversize_messages(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send what is announced, more than may be, as long as the server takes it."""
    for _ in times(4, scale):
        with Connection(target) as connection:
            connection.send(frame(HEADERS, END_HEADERS, 1, call_headers(path)))
            connection.send(frame(DATA, 0, 1, message(b"", length=100 * 2**20)))
            connection.socket.settimeout(0.5)
            for _n in range(6_400):
                if not connection.send(frame(DATA, 0, 1, bytes(16_384))):
                    break


def gzip_bombs(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send messages that unpack to much more than may be; each is to be refused."""
    unpacked = bytes(max(16, round(300 * scale)) << 20)
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(target, options, compression) as channel:
            try:
                channel.unary_unary(path)(unpacked, timeout=120)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    continue
                raise
            raise AssertionError("a message that unpacks to too much was taken")


def huge_metadata(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send megabytes of headers, in one block or many."""
    for size in (20_000, 1_000_000, 10_000_000):
        for _ in times(5, scale):
            with Connection(target) as connection:
                block = call_headers(path, (b"x-large", b"v" * size))
                parts = [block[i : i + 16_384] for i in range(0, len(block), 16_384)]
                connection.send(frame(HEADERS, 0, 1, parts[0]))
                for i, part in enumerate(parts[1:]):
                    last = END_HEADERS if i == len(parts) - 2 else 0
                    if not connection.send(frame(CONTINUATION, last, 1, part)):
                        break
                connection.read(0.1)


def continuation_flood(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Go on with a header block that never ends."""
    with Connection(target) as connection:
        connection.send(frame(HEADERS, 0, 1, call_headers(path)))
        part = b"".join(literal(b"x-%d" % i, b"v" * 100) for i in range(100))
        for _ in times(3_000, scale):
            if not connection.send(frame(CONTINUATION, 0, 1, part)):
                break


def header_table_bomb(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Name one large header of the receiver's table again and again, a byte each time."""
    for _ in times(10, scale):
        with Connection(target) as connection:
            large = literal(b"x-large", b"v" * 3_900, indexed=True)
            connection.send(frame(HEADERS, END_HEADERS, 1, call_headers(path) + large))
            for stream in range(3, 43, 2):
                # 62: the newest entry behind the static table.
                block = call_headers(path) + b"\xbe" * 15_000
                if not connection.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, block)):
                    break
            connection.read(0.1)


def rapid_reset(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Begin calls and take them back at once."""
    for _ in range(2):
        with Connection(target) as connection:
            headers = call_headers(path)
            body = message(b"")
            cancel = struct.pack(">I", 8)
            for i in times(5_000, scale):
                stream = 2 * i + 1
                sent = connection.send(
                    frame(HEADERS, END_HEADERS, stream, headers)
                    + (data_frames(stream, body) if i % 2 else b"")
                    + frame(RST_STREAM, 0, stream, cancel)
                )
                if not sent:
                    break


def many_streams(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Begin thousands of calls on one connection and leave them open."""
    with Connection(target) as connection:
        headers = call_headers(path)
        for i in times(3_000, scale):
            if not connection.send(frame(HEADERS, END_HEADERS, 2 * i + 1, headers)):
                break
        connection.read(1.0)


def frame_floods(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send what wants an answer, or does nothing, thousands of times."""
    floods: Iterable[bytes] = (
        frame(PING, 0, 0, bytes(8)),
        frame(SETTINGS, 0, 0, b""),
        frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW, 1) * 200),
        frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        frame(PRIORITY, 0, 5, bytes(5)),
        frame(GOAWAY, 0, 0, bytes(8)),
        frame(0xFA, 0, 0, bytes(100)),
        frame(DATA, 0, 1, b""),
    )
    for flood in floods:
        with Connection(target, small=True) as connection:
            connection.send(frame(HEADERS, END_HEADERS, 1, call_headers(path)))
            connection.socket.settimeout(1)
            for _ in times(200, scale):
                # Nothing is read: the answers have to wait somewhere, or not be made.
                if not connection.send(flood * 100):
                    break


def wrong_kinds(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Ask for what is not there, or as what it is not."""
    blocks = [
        call_headers("/hashlens.v1.EncoderService/Nothing"),
        call_headers("/nobody.Knows/It"),
        call_headers("/"),
        call_headers(path, content_type=b"application/json"),
        call_headers(path, content_type=b"text/html"),
        call_headers(path, content_type=b"application/grpc-web"),
        call_headers(path, content_type=b"application/grpc+json"),
    ]
    for block in blocks:
        for _ in times(10, scale):
            with Connection(target) as connection:
                connection.send(frame(HEADERS, END_HEADERS, 1, block))
                connection.send(data_frames(1, message(b"{}")))
                connection.read(0.05)


def never_read(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Make calls whose replies are never taken: no window is open for them."""
    with ExitStack() as stack:
        for _ in times(50, scale):
            connection = stack.enter_context(
                Connection(target, ((_INITIAL_WINDOW, 0),), small=True)
            )
            for stream in (1, 3, 5, 7):
                headers = call_headers(path, (b"grpc-timeout", b"3S"))
                connection.send(frame(HEADERS, END_HEADERS, stream, headers))
                connection.send(data_frames(stream, message(b"")))
        time.sleep(4 * scale)


ATTACKS: tuple[Attack, ...] = (
    random_bytes,
    garbage_frames,
    broken_headers,
    http1,
    half_open,
    slow_requests,
    lying_lengths,
    oversize_messages,
    gzip_bombs,
    huge_metadata,
    continuation_flood,
    header_table_bomb,
    rapid_reset,
    many_streams,
    frame_floods,
    wrong_kinds,
    never_read,
)
