"""The bytes that are stored: rows on disk, records in the log, buckets in Redis.

`docs/format.md` is the specification; this module is its only implementation. All numbers are
little-endian.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from hashlens import codes
from hashlens.errors import DataLossError
from hashlens.types import CollectionSpec, FeatureDtype

FORMAT_VERSION: Final = 1
"""Of the files and the keys; a reader refuses any other."""

ROW: Final = np.dtype(
    [
        ("seq", "<u8"),
        ("id_end", "<u8"),
        ("payload_end", "<u8"),
        ("tags_end", "<u8"),
        ("expires_ms", "<u8"),
        ("feature_crc32", "<u4"),
        ("flags", "<u4"),
    ]
)
"""One row of ``rows-<g>.rec``, 48 bytes. An id, a payload, tags begin where the row before ends."""

NO_FEATURE: Final = 1
"""In `ROW` flags: the row's feature is missing; zeros stand in its place, and their CRC-32."""

DEATH: Final = np.dtype([("row", "<u8"), ("seq", "<u8")])
"""One tombstone of ``dead-<g>.u64``, 16 bytes: which row, and the write that killed it."""

PUT: Final = 1
"""The log record writes an item."""

DELETE: Final = 2
"""The log record removes an item."""

MARK: Final = 3
"""The log record changes nothing; it takes room, so that the log can be trimmed up to it."""

_RECORD = struct.Struct("<BHII")
_EXTRAS = struct.Struct("<QH")
_GENERATION = re.compile(r"(?:codes|rows|ids|payloads|tags|dead|features)-(\d+)\..+")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FILE = re.compile(r"[a-z]{2,16}-[0-9]{1,9}(\.[a-z0-9]{1,12}){1,2}")
_BUCKET_ENTRIES = 128
_MAX_BUCKETS = 1 << 24
_MAX_SEGMENT_ROWS = 1 << 17


class LogRecord(NamedTuple):
    """One entry of the log."""

    seq: int
    """Its place in the order of writes, from 1 without holes."""
    op: int
    """`PUT`, `DELETE` or `MARK`."""
    id: str
    code: bytes
    payload: bytes
    tags: bytes
    """As `pack_tags` made them."""
    expires_ms: int
    """When the item removes itself, in milliseconds since 1970; 0: never."""
    feature: bytes
    """Little-endian numbers; empty for a collection of codes only."""
    raw: bytes
    """As it was read."""


def is_safe_name(name: str) -> bool:
    """Tell whether a name may become a directory and a part of Redis keys."""
    return _NAME.fullmatch(name) is not None


def is_safe_file(name: str) -> bool:
    """Tell whether a name may be that of a file of rows, and leads to nowhere else."""
    return _FILE.fullmatch(name) is not None


def pack_put(item_id: bytes, code: bytes, extras: bytes, feature: bytes | memoryview) -> bytes:
    """Return the log record of a written item; `extras` as `pack_extras` made them."""
    header = _RECORD.pack(PUT, len(item_id), len(extras), len(feature))
    return b"".join((header, item_id, code, extras, feature))


def pack_extras(payload: bytes, tags: bytes, expires_ms: int) -> bytes:
    """Return what an item has beside its embedding; empty if it has nothing."""
    if not payload and not tags and not expires_ms:
        return b""
    return b"".join((_EXTRAS.pack(expires_ms, len(tags)), tags, payload))


def unpack_extras(extras: bytes) -> tuple[bytes, bytes, int]:
    """Return payload, tags and expiry; ValueError if they are not what `pack_extras` makes."""
    if not extras:
        return b"", b"", 0
    if len(extras) < _EXTRAS.size:
        raise ValueError("extras are cut")
    expires_ms, tags_bytes = _EXTRAS.unpack_from(extras)
    payload_at = _EXTRAS.size + tags_bytes
    if payload_at > len(extras):
        raise ValueError("tags are cut")
    tags = extras[_EXTRAS.size : payload_at]
    unpack_tags(tags)
    return extras[payload_at:], tags, expires_ms


def pack_tags(tags: Sequence[str]) -> bytes:
    """Return tags as they are stored: a length byte before each; sorted, each once."""
    encoded = sorted({tag.encode() for tag in tags})
    return b"".join([bytes((len(tag),)) + tag for tag in encoded])


def unpack_tags(packed: bytes) -> tuple[str, ...]:
    """Return tags; ValueError if they are not what `pack_tags` makes."""
    found: list[bytes] = []
    at = 0
    while at < len(packed):
        end = at + 1 + packed[at]
        tag = packed[at + 1 : end]
        if end > len(packed) or not tag or (found and tag <= found[-1]):
            raise ValueError("tags are cut or out of order")
        found.append(tag)
        at = end
    return tuple([tag.decode() for tag in found])


def pack_delete(item_id: bytes) -> bytes:
    """Return the log record of a removed item."""
    return _RECORD.pack(DELETE, len(item_id), 0, 0) + item_id


def pack_expire(item_id: bytes, seq: int) -> bytes:
    """Return what removes an item unless it was written again since `seq`."""
    return seq.to_bytes(8, "little") + pack_delete(item_id)


def pack_mark(filling_bytes: int) -> bytes:
    """Return the log record of a mark."""
    return _RECORD.pack(MARK, 0, 0, filling_bytes) + bytes(filling_bytes)


def unpack_record(seq: int, raw: bytes, n_bits: int, feature_bytes: int) -> LogRecord:
    """Read a log record.

    Parameters
    ----------
    seq
        Its sequence number, for the error message.
    raw
        As `pack_put`, `pack_delete` or `pack_mark` made it.
    n_bits, feature_bytes
        What the collection's items have.

    Raises
    ------
    DataLossError
        It is not such a record, or not of such a collection.
    """
    try:
        op, id_bytes, extras_bytes, found_bytes = _RECORD.unpack_from(raw)
        if op == MARK:
            if id_bytes or extras_bytes or len(raw) != _RECORD.size + found_bytes:
                raise ValueError("a mark with content")
            return LogRecord(seq, MARK, "", b"", b"", b"", 0, b"", raw)
        id_end = _RECORD.size + id_bytes
        code_end = id_end + (codes.n_bytes(n_bits) if op == PUT else 0)
        extras_end = code_end + extras_bytes
        expected_bytes = feature_bytes if op == PUT else 0
        if op not in (PUT, DELETE) or found_bytes != expected_bytes:
            raise ValueError("unknown operation or wrong feature length")
        if not id_bytes or extras_end + found_bytes != len(raw):
            raise ValueError("wrong length")
        if op == PUT and n_bits % 8 and raw[code_end - 1] >> n_bits % 8:
            raise ValueError("bits behind the code's end")
        if op == DELETE and extras_bytes:
            raise ValueError("a delete with extras")
        payload, tags, expires_ms = unpack_extras(raw[code_end:extras_end])
        return LogRecord(
            seq,
            op,
            raw[_RECORD.size : id_end].decode(),
            raw[id_end:code_end],
            payload,
            tags,
            expires_ms,
            raw[extras_end:],
            raw,
        )
    except (struct.error, ValueError) as error:
        raise DataLossError(
            f"Log entry {seq} is not a record of this collection ({error}). "
            "Drop the collection and index again."
        ) from None


def bucket_of(item_id: bytes, n_buckets: int) -> int:
    """Return the bucket of an id; `n_buckets` is a power of two."""
    return zlib.crc32(item_id) & (n_buckets - 1)


def n_buckets_for(expected_rows: int) -> int:
    """Return the power of two of buckets that gives each 64 to 128 of the expected rows."""
    wanted = -(-expected_rows // _BUCKET_ENTRIES)
    return min(1 << max(wanted - 1, 0).bit_length(), _MAX_BUCKETS)


def feature_bytes(spec: CollectionSpec) -> int:
    """Return the length of one stored feature, in bytes; 0 for codes only."""
    return spec.dim * spec.feature_dtype.n_bytes


def record_bytes(spec: CollectionSpec) -> int:
    """Return about how long a log record is, in bytes, without its payload."""
    return _RECORD.size + 32 + codes.n_bytes(spec.n_bits) + feature_bytes(spec)


def rows_per_segment(spec: CollectionSpec, segment_bytes: int) -> int:
    """Return how many features share a file: a power of two, at least one."""
    row_bytes = max(feature_bytes(spec), 1)
    return 1 << min(max(segment_bytes // row_bytes, 1), _MAX_SEGMENT_ROWS).bit_length() - 1


def words_file(generation: int, word: int) -> str:
    """Return the name of the file of one 64-bit word of all codes."""
    return f"codes-{generation}.w{word}.u64"


def rows_file(generation: int) -> str:
    """Return the name of the file of `ROW` records."""
    return f"rows-{generation}.rec"


def ids_file(generation: int) -> str:
    """Return the name of the file of ids, UTF-8 without separators."""
    return f"ids-{generation}.bin"


def payloads_file(generation: int) -> str:
    """Return the name of the file of payloads, without separators."""
    return f"payloads-{generation}.bin"


def tags_file(generation: int) -> str:
    """Return the name of the file of tags, as `pack_tags` makes them, without separators."""
    return f"tags-{generation}.bin"


def deaths_file(generation: int) -> str:
    """Return the name of the file of `DEATH` records."""
    return f"dead-{generation}.u64"


def features_file(generation: int, segment: int, dtype: FeatureDtype) -> str:
    """Return the name of one segment of features."""
    return f"features-{generation}.s{segment:05d}.{dtype.value}"


def generation_of(name: str) -> int | None:
    """Return the generation that a file belongs to by its name, or None if it has none."""
    found = _GENERATION.fullmatch(name)
    return None if found is None else int(found[1])
