"""Image files, spoiled: which way is decided by a seed and a number, so each can be made again."""

from __future__ import annotations

import itertools
import random
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MAGICS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\0\0\0\0WEBP",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"PK\3\4",
    b"%PDF",
)

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
_MAX_BYTES = 200_000

Mutator = Callable[[bytes, random.Random, Mapping[str, bytes]], bytes]


@dataclass(frozen=True, slots=True)
class Case:
    """One spoiled file."""

    number: int
    base: str
    """Name of the file that was spoiled."""
    steps: tuple[str, ...]
    """How, in order."""
    data: bytes


def pieces(data: bytes) -> list[bytes]:
    """Cut a file where its format has borders; at its sixteenths if it has none that is known."""
    borders: list[int] = [0]
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 12 <= len(data):
            borders.append(at)
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        borders += [m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]", data)]
    elif data.startswith(b"RIFF"):
        at = 12
        while at + 8 <= len(data):
            borders.append(at)
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + length + length % 2
    else:
        borders += [len(data) * i // 16 for i in range(1, 16)]
    borders = sorted({*borders, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


def _truncate(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    where = rng.randrange(4)
    if where == 0:
        return data[: rng.randrange(len(data) + 1)]
    if where == 1:
        return data[: rng.randrange(min(64, len(data)) + 1)]
    if where == 2:
        return data[: -rng.randrange(1, 17)]
    cut = pieces(data)
    return b"".join(cut[: rng.randrange(len(cut) + 1)]) + data[: rng.randrange(4)]


def _flip_bits(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    spoiled = bytearray(data)
    for _n in range(rng.choice((1, 1, 2, 4, 16))):
        # Headers decide more than pixels do.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 96)
        spoiled[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def _set_number(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    spoiled = bytearray(data)
    for _n in range(rng.choice((1, 1, 2, 3))):
        code = rng.choice(("<H", ">H", "<I", ">I", "<B"))
        size = struct.calcsize(code)
        if len(data) < size:
            return data
        number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.randrange(20_000)
        at = rng.randrange(min(len(data), rng.choice((64, 512, 10**9))) - size + 1)
        spoiled[at : at + size] = struct.pack(code, number % 256**size)
    return bytes(spoiled)


def _swap_pieces(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    cut = pieces(data)
    a, b = rng.randrange(len(cut)), rng.randrange(len(cut))
    cut[a], cut[b] = cut[b], cut[a]
    return b"".join(cut)


def _repeat_piece(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    cut = pieces(data)
    at = rng.randrange(len(cut))
    return b"".join(cut[:at] + [cut[at]] * rng.choice((2, 2, 3, 200)) + cut[at + 1 :])[:_MAX_BYTES]


def _drop_piece(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    cut = pieces(data)
    del cut[rng.randrange(len(cut))]
    return b"".join(cut)


def _splice(data: bytes, rng: random.Random, files: Mapping[str, bytes]) -> bytes:
    other = files[rng.choice(sorted(files))]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _borrow_piece(data: bytes, rng: random.Random, files: Mapping[str, bytes]) -> bytes:
    cut = pieces(data)
    other = files[rng.choice(sorted(files))] or b"\0"
    cut.insert(rng.randrange(len(cut) + 1), rng.choice(pieces(other)))
    return b"".join(cut)


def _wrong_magic(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    magic = rng.choice(MAGICS)
    return magic + (data if rng.random() < 0.3 else data[len(magic) :])


def _noise(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    n = rng.choice((1, 2, 8, 64, 1000))
    keep = at if rng.random() < 0.5 else at + n
    return data[:at] + rng.randbytes(n) + data[keep:]


def _zero_run(data: bytes, rng: random.Random, _: Mapping[str, bytes]) -> bytes:
    at, n = rng.randrange(len(data) + 1), rng.choice((4, 32, 256))
    return data[:at] + bytes((rng.choice((0, 0xFF)),)) * n + data[at + n :]


def _mend_crcs(data: bytes, _: random.Random, __: Mapping[str, bytes]) -> bytes:
    """Make the chunks of a PNG right again, so that what is wrong in them is looked at."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    whole, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        whole.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(whole) + data[at:]


_MUTATORS: tuple[Mutator, ...] = (
    _truncate,
    _flip_bits,
    _flip_bits,
    _set_number,
    _set_number,
    _swap_pieces,
    _repeat_piece,
    _drop_piece,
    _splice,
    _borrow_piece,
    _wrong_magic,
    _noise,
    _zero_run,
)


def case(seed: int, number: int, files: Mapping[str, bytes]) -> Case:
    """Make one spoiled file: the same for the same seed, number and files.

    Parameters
    ----------
    seed, number
        Of the campaign, and of the case in it.
    files
        What to spoil, by name.
    """
    rng = random.Random(f"{seed}/{number}")
    base = rng.choice(sorted(files))
    data, steps = files[base], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutator = rng.choice(_MUTATORS)
        data = mutator(data or b"\0", rng, files)
        steps.append(mutator.__name__.strip("_"))
    if rng.random() < 0.5:
        data = _mend_crcs(data, rng, files)
        steps.append("mend_crcs")
    return Case(number, base, tuple(steps), data)
