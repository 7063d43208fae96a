"""Frames of HTTP/2, right and wrong, written by hand: a library would not write the wrong ones."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, _, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(
    10
)
END_STREAM, END_HEADERS = 0x1, 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _integer(value: int, prefix_bits: int) -> bytes:
    """Return an integer as HPACK writes it, its first byte's upper bits zero."""
    most = 2**prefix_bits - 1
    if value < most:
        return bytes([value])
    out, value = bytearray([most]), value - most
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def literal(name: bytes, value: bytes, *, indexed: bool = False) -> bytes:
    """Return one header, spelt out; `indexed`: kept in the receiver's table."""
    first = b"\x40" if indexed else b"\0"
    return first + _integer(len(name), 7) + name + _integer(len(value), 7) + value


def call_headers(path: str, *extra: tuple[bytes, bytes], content_type: bytes = b"") -> bytes:
    """Return the header block of a gRPC call."""
    fields: Iterable[tuple[bytes, bytes]] = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", content_type or b"application/grpc"),
        *extra,
    )
    return b"".join(literal(name, value) for name, value in fields)


def message(data: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Return a gRPC message with its prefix, which may lie about the length."""
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


def data_frames(stream: int, payload: bytes, *, end: bool = True) -> bytes:
    """Return a payload in frames of the usual size."""
    parts = [payload[i : i + 16_384] for i in range(0, len(payload), 16_384)] or [b""]
    return b"".join(
        frame(DATA, END_STREAM if end and i == len(parts) - 1 else 0, stream, part)
        for i, part in enumerate(parts)
    )


class Connection:
    """A connection that says what it is told to.

    Parameters
    ----------
    target
        ``host:port``.
    settings
        The client's: (identifier, value); None sends neither preface nor settings.
    """

    def __init__(
        self, target: str, settings: tuple[tuple[int, int], ...] | None = (), *, small: bool = False
    ) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.socket()
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self.socket.settimeout(10)
        self.socket.connect((host, int(port)))
        if settings is not None:
            body = b"".join(struct.pack(">HI", *setting) for setting in settings)
            self.send(PREFACE + frame(SETTINGS, 0, 0, body))

    def send(self, data: bytes) -> bool:
        """Send all; tell whether the server still takes it."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def read(self, within_s: float = 5.0, *, until: bytes = b"") -> bytes:
        """Return what comes until the server closes, `until` is seen, or the time is over."""
        ends_s, got = time.monotonic() + within_s, b""
        while (left_s := ends_s - time.monotonic()) > 0:
            self.socket.settimeout(left_s)
            try:
                part = self.socket.recv(65_536)
            except OSError:
                break
            got += part
            if not part or (until and until in got):
                break
        return got

    def close(self) -> None:
        """Close it."""
        with suppress(OSError):
            self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
