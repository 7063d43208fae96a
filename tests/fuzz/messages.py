"""Requests of every method: bytes by chance, and well-formed ones whose fields mean harm."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from hashlens.v1 import encoder_service_pb2, replica_service_pb2, search_service_pb2

_FILES = (encoder_service_pb2, search_service_pb2, replica_service_pb2)

_COLLECTIONS: Final = ("fuzz", "fuzz", "fuzz", "none", "", "../etc", "a" * 300, "\x00", "{x}", "é")
_IDS: Final = ("a", "b", "", "\x00", "x" * 600, "../../etc/passwd", "é\u202e", "hl:{fuzz}:log")
_FLOATS: Final = (0.0, -1.0, 1e308, float("nan"), float("inf"))
_MAX_DEPTH: Final = 4


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    path: str
    """As in HTTP/2."""
    descriptor: MethodDescriptor

    @property
    def request(self) -> type[Message]:
        """The class of its requests."""
        return GetMessageClass(self.descriptor.input_type)


def methods(service: str) -> list[Method]:
    """Return a service's methods, by the service's full name."""
    for file in _FILES:
        for found in file.DESCRIPTOR.services_by_name.values():
            if found.full_name == service:
                return [Method(f"/{service}/{m.name}", m) for m in found.methods]
    raise KeyError(service)


def hostile(method: Method, rng: random.Random) -> bytes:
    """Return a request that is well-formed, its values odd."""
    message = method.request()
    _fill(message, rng, 0)
    return message.SerializeToString()


def noise(method: Method, rng: random.Random) -> bytes:
    """Return bytes that may be no message: of chance, nested without end, or a spoiled request."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.choice((1, 2, 10, 1_000)))
    if kind == 1:
        return b"\x0b" * rng.choice((50, 1_000, 100_000))  # Groups in groups, never closed.
    if kind == 2:
        return _nested(rng.choice((50, 200, 5_000)))
    if kind == 3:  # A length that is a lie.
        return b"\x0a" + rng.choice((b"\xff\xff\xff\xff\x07", b"\xff" * 10, b"\x80" * 9 + b"\1"))
    data = bytearray(hostile(method, rng) or b"\0")
    for _ in range(rng.choice((1, 3, 10))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def requests(method: Method, seed: int, n: int) -> Iterator[bytes]:
    """Yield requests, the same for the same seed."""
    rng = random.Random(f"{seed}{method.path}")
    for i in range(n):
        yield noise(method, rng) if i % 3 == 0 else hostile(method, rng)


def _nested(depth: int) -> bytes:
    body = b""
    for _ in range(depth):
        body = b"\x12" + _varint(len(body)) + body
    return body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def _fill(message: Message, rng: random.Random, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.3 or (field.message_type and depth >= _MAX_DEPTH):
            continue
        if field.is_repeated:
            _fill_repeated(message, field, rng, depth)
        elif field.message_type:
            _fill(getattr(message, field.name), rng, depth + 1)
            if rng.random() < 0.2:
                getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, _value(field, rng))


def _fill_repeated(
    message: Message, field: FieldDescriptor, rng: random.Random, depth: int
) -> None:
    values = getattr(message, field.name)
    n = rng.choice((0, 1, 1, 2, 5, 300))
    if field.message_type and field.message_type.GetOptions().map_entry:
        return
    for _ in range(n):
        if field.message_type:
            _fill(values.add(), rng, depth + 1)
        else:
            values.append(_value(field, rng))


def _value(field: FieldDescriptor, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_STRING:
        names = _COLLECTIONS if field.name in ("collection", "name") else _IDS
        return rng.choice(names)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return _bytes(field.name, rng)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 77, -1, 2**31 - 1))
    signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    least = -most - 1 if signed else 0
    # Small ones most of the time: past the first check is where the others are.
    return rng.choice((0, 1, 1, 2, 8, 48, 48, 256, 1_000, most, most - 1, least, 2**31 - 1))


def _bytes(name: str, rng: random.Random) -> bytes:
    if name == "bits":
        return rng.choice((bytes(6), b"\xff" * 6, b"", bytes(7), bytes(64)))
    if name == "values":
        halves = struct.pack("<256e", *([1.0] * 256))
        return rng.choice((halves, bytes(512), b"\xff" * 512, b"", bytes(3), bytes(4 * 48)))
    return rng.choice((b"", b"\0", rng.randbytes(30), b"x" * 3_000))
