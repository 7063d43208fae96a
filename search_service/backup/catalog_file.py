"""``catalog.bin``: what Redis keeps of each item, exported from a collection's files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from hashlens import codes
from hashlens.errors import DataLossError, PreconditionError
from search_service.backup.files import map_file
from search_service.storage import layout
from search_service.storage.manifest import FileState, Manifest

CATALOG: Final = "catalog.bin"
"""Its file name."""

_MAGIC = b"HLCATLOG"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")
_ITEM = struct.Struct("<QHI")
_ROWS_AT_ONCE = 1 << 12
_READ_BYTES = 1 << 20


class Entry(NamedTuple):
    """One item."""

    id: bytes
    raw: bytes
    """As it is in the file: sequence number, lengths, id, code, extras."""


def write(directory: Path, manifest: Manifest) -> FileState:
    """Export the alive items of the files in a directory; return the export's length and CRC-32.

    Takes a few megabytes of memory and a byte for each row. Not synced.

    Raises
    ------
    DataLossError
        The files are not what the manifest says.
    OSError
        The disk is full or broken, or there is an export already.
    """
    n, g = manifest.rows, manifest.generation
    code_bytes = codes.n_bytes(manifest.spec.n_bits)
    rows = map_file(directory / layout.rows_file(g), layout.ROW, n)
    words = [
        map_file(directory / layout.words_file(g, word), np.uint64, n)
        for word in range(codes.n_words(manifest.spec.n_bits))
    ]
    ids, payloads, tags = (
        map_file(directory / name, np.uint8, manifest.files[name].length).data
        for name in (layout.ids_file(g), layout.payloads_file(g), layout.tags_file(g))
    )
    alive = np.ones(n, dtype=bool)
    deaths = map_file(directory / layout.deaths_file(g), layout.DEATH, manifest.deaths)
    alive[deaths["row"].astype(np.int64)] = False
    length, crc32 = 0, 0
    with (directory / CATALOG).open("xb") as file:
        head = _HEAD.pack(_MAGIC, _VERSION, code_bytes, int(alive.sum()), manifest.seq)
        parts = [head]
        for first in range(0, n, _ROWS_AT_ONCE):
            chunk = rows[first : first + _ROWS_AT_ONCE].tolist()
            packed = np.stack([word[first : first + _ROWS_AT_ONCE] for word in words], axis=1)
            code_rows = packed.view(np.uint8)[:, :code_bytes]
            _, id_at, payload_at, tags_at, *_ = rows[first - 1].tolist() if first else (0,) * 4
            here = alive[first : first + _ROWS_AT_ONCE].tolist()
            for row, (seq, id_end, payload_end, tags_end, expires_ms, _, _) in enumerate(chunk):
                if here[row]:
                    extras = layout.pack_extras(
                        bytes(payloads[payload_at:payload_end]),
                        bytes(tags[tags_at:tags_end]),
                        expires_ms,
                    )
                    parts += (
                        _ITEM.pack(seq, id_end - id_at, len(extras)),
                        bytes(ids[id_at:id_end]),
                        code_rows[row].tobytes(),
                        extras,
                    )
                id_at, payload_at, tags_at = id_end, payload_end, tags_end
            data = b"".join(parts)
            file.write(data)
            length, crc32 = length + len(data), zlib.crc32(data, crc32)
            parts = []
        data = b"".join(parts)
        file.write(data)
        return FileState(length + len(data), zlib.crc32(data, crc32))


def read(path: Path, manifest: Manifest) -> Iterator[Entry]:
    """Read an export, an item at a time.

    Raises
    ------
    DataLossError
        It is not an export of such files.
    PreconditionError
        It is of another format version.
    """
    code_bytes = codes.n_bytes(manifest.spec.n_bits)
    with path.open("rb", buffering=_READ_BYTES) as file:
        head = file.read(_HEAD.size)
        if len(head) != _HEAD.size or not head.startswith(_MAGIC):
            raise DataLossError(f"{path} is no export of a catalogue")
        _, version, found_bytes, n_items, seq = _HEAD.unpack(head)
        if version != _VERSION:
            raise PreconditionError(f"{path} was written by another version of Hashlens")
        if (found_bytes, seq) != (code_bytes, manifest.seq):
            raise DataLossError(f"{path} is of other files")
        for _ in range(n_items):
            item = file.read(_ITEM.size)
            if len(item) != _ITEM.size:
                raise DataLossError(f"{path} is cut")
            _, id_bytes, extras_bytes = _ITEM.unpack(item)
            rest = file.read(id_bytes + code_bytes + extras_bytes)
            if len(rest) != id_bytes + code_bytes + extras_bytes:
                raise DataLossError(f"{path} is cut")
            yield Entry(rest[:id_bytes], item + rest)
        if file.read(1):
            raise DataLossError(f"{path} has bytes behind its end")
