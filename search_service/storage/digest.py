"""A digest of a collection's items at one version; `docs/format.md` defines it."""

from __future__ import annotations

import hashlib
import struct
import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import CancelledError
from search_service.storage.frozen import Frozen

_ROWS_AT_ONCE: Final = 1 << 15
_BYTES: Final = 16


def digest_of(frozen: Frozen, seq: int, n_bits: int, stop: threading.Event) -> bytes:
    """Return the digest of the items that were there at a version; 16 bytes.

    Column by column, so that it takes no Python object for an item.

    Raises
    ------
    CancelledError
        `stop` was set.
    """
    alive = np.flatnonzero(~frozen.dead_at(seq))
    columns: list[Any] = [hashlib.blake2b(digest_size=_BYTES) for _ in range(11)]
    for lo in range(0, len(alive), _ROWS_AT_ONCE):
        if stop.is_set():
            raise CancelledError("The check was stopped.")
        rows = alive[lo : lo + _ROWS_AT_ONCE]
        records = frozen.records[rows]
        parts: list[bytes | NDArray[Any]] = [
            records["seq"],
            frozen.packed(rows, n_bits),
            records["expires_ms"],
            records["feature_crc32"],
            records["flags"],
        ]
        for joined, lengths in (
            frozen.ids_of(rows),
            frozen.tags_of(rows),
            frozen.payloads_of(rows),
        ):
            parts += (lengths.astype("<u4"), joined)
        for column, part in zip(columns, parts, strict=True):
            column.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    whole = hashlib.blake2b(struct.pack("<QQ", seq, len(alive)), digest_size=_BYTES)
    for column in columns:
        whole.update(column.digest())
    return whole.digest()
