"""From ids to rows: hashes in sorted arrays, and a dictionary of the newest rows.

A Python string and a dictionary entry take 170 bytes and a microsecond for each id; a hash and a
row take 12 bytes, and are made by the million. The ids themselves stay in their mapped file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hashlens.types import MAX_ID_BYTES

_BLOCK_BYTES: Final = 1 << 20
"""Ids that are hashed at once, in bytes: a hash takes twenty times as much room for a moment."""

_MIN_RECENT_ROWS: Final = 1 << 15
_RECENT_SHARE: Final = 16
"""At most one row in so many is recent: merging then costs each row the same few steps."""


@dataclass(frozen=True, slots=True)
class StoredIds:
    """The ids of all rows, in the order of the rows."""

    data: NDArray[np.uint8]
    """One after the other, UTF-8, mapped; may be longer than they are."""
    records: NDArray[Any]
    """`layout.ROW`, shape ``[rows]``, mapped: where each ends."""

    def of(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the ids of rows, in the order of `rows`; int64, shape ``[n]``."""
        ends = self.records["id_end"]
        stops = ends[rows].tolist()
        starts = np.where(rows > 0, ends[rows - 1], 0).tolist()
        view = self.data.data
        return [str(view[lo:hi], "utf-8") for lo, hi in zip(starts, stops, strict=True)]

    def is_at(self, row: int, item_id: bytes) -> bool:
        """Tell whether a row has an id."""
        ends = self.records["id_end"]
        start = int(ends[row - 1]) if row else 0
        return self.data[start : int(ends[row])].tobytes() == item_id


@dataclass(frozen=True, slots=True)
class _State:
    """What a lookup reads; replaced as a whole."""

    rows: int
    """Rows below are in the arrays, the others in the dictionaries."""
    hashes: NDArray[np.uint32]
    """Ascending, shape ``[rows]``."""
    by_hash: NDArray[np.int64]
    """The row of each hash, ascending where hashes are equal."""
    latest: dict[str, int] = field(default_factory=dict)
    """The last recent row of an id."""
    former: dict[int, int] = field(default_factory=dict)
    """The recent row that the same id had before."""


class IdIndex:
    """Finds the last row that an id was given before a given row.

    One thread changes it; others look up at the same time without a lock. That is safe because
    nothing is ever taken back: the arrays of a state never change, and its dictionaries only gain
    rows that older versions skip.
    """

    def __init__(self) -> None:
        # Multilinear hashing with multipliers that nobody can know: whoever chooses the ids cannot
        # make them collide (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
        self._multipliers = np.frombuffer(os.urandom(8 * MAX_ID_BYTES), dtype=np.uint64)
        self._state = _State(0, np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int64))
        self._lock = threading.Lock()

    def build(self, stored: StoredIds, rows: int) -> None:
        """Index the first rows, unless that is done; others that need them wait."""
        if self._state.rows >= rows:
            return
        with self._lock:
            if self._state.rows < rows:
                self._state = self._merged(stored, rows)

    def extend(self, ids: Sequence[str], stored: StoredIds) -> None:
        """Add the ids of the next rows, all of them in `stored`; only after `build`."""
        state = self._state
        first = stored.records.shape[0] - len(ids)
        for row, item_id in enumerate(ids, first):
            before = state.latest.get(item_id)
            if before is not None:
                # First the way back, then the new row: a reader of an older version follows it.
                state.former[row] = before
            state.latest[item_id] = row
        rows = first + len(ids)
        if rows - state.rows > max(_MIN_RECENT_ROWS, state.rows // _RECENT_SHARE):
            self._state = self._merged(stored, rows)

    def last_rows(self, ids: Sequence[str], stored: StoredIds, limit: int) -> list[int | None]:
        """Return for each id the last row below `limit` that has it, or None."""
        state = self._state
        found: list[int | None] = []
        older: list[int] = []
        for position, item_id in enumerate(ids):
            row = state.latest.get(item_id)
            while row is not None and row >= limit:
                row = state.former.get(row)
            if row is None:
                older.append(position)
            found.append(row)
        if not older or not state.rows:
            return found
        # What cannot be an id is asked for, too, by who types it.
        encoded = [(i, ids[i].encode("utf-8", "surrogatepass")) for i in older]
        asked = [(i, data) for i, data in encoded if 0 < len(data) <= MAX_ID_BYTES]
        if not asked:
            return found
        hashes = self._hashes(
            np.frombuffer(b"".join([data for _, data in asked]), dtype=np.uint8),
            np.cumsum([len(data) for _, data in asked]),
        )
        starts = np.searchsorted(state.hashes, hashes, side="left").tolist()
        stops = np.searchsorted(state.hashes, hashes, side="right").tolist()
        for (position, data), start, stop in zip(asked, starts, stops, strict=True):
            if start < stop:
                rows = state.by_hash[start:stop]
                for row in rows[: np.searchsorted(rows, limit)][::-1].tolist():
                    if stored.is_at(row, data):
                        found[position] = row
                        break
        return found

    def misled(self, stored: StoredIds) -> NDArray[np.int64]:
        """Return the rows to which their ids do not lead; only after `build`.

        Takes 13 bytes for each row.
        """
        state = self._state
        rows = min(state.rows, len(stored.records))
        hashes = self._stored_hashes(stored, 0, rows)
        known = state.by_hash[state.by_hash < rows]
        leads = np.zeros(rows, dtype=np.bool_)
        in_order = np.flatnonzero(state.hashes[1:] < state.hashes[:-1]).size == 0
        if in_order:
            leads[known[hashes[known] == state.hashes[state.by_hash < rows]]] = True
        wrong = [np.flatnonzero(~leads)]
        recent = [(i, row) for i, row in list(state.latest.items()) if row < len(stored.records)]
        off = [row for item_id, row in recent if not stored.is_at(row, item_id.encode())]
        return np.concatenate([*wrong, np.array(off, dtype=np.int64)])

    def _merged(self, stored: StoredIds, rows: int) -> _State:
        """Return a state whose arrays have all of the first `rows`."""
        state = self._state
        hashes = self._stored_hashes(stored, state.rows, rows)
        order = np.argsort(hashes, kind="stable")
        hashes, added = hashes[order], order + state.rows
        if not state.rows:
            return _State(rows, hashes, added)
        # Behind what is there: rows of one hash stay ascending.
        places = np.searchsorted(state.hashes, hashes, side="right")
        return _State(
            rows,
            np.insert(state.hashes, places, hashes),
            np.insert(state.by_hash, places, added),
        )

    def _stored_hashes(self, stored: StoredIds, first: int, stop: int) -> NDArray[np.uint32]:
        """Return the hashes of the ids of rows: shape ``[stop - first]``."""
        ends = stored.records["id_end"][first:stop].astype(np.int64)
        begin = int(stored.records["id_end"][first - 1]) if first else 0
        hashes = np.empty(len(ends), dtype=np.uint32)
        row = 0
        while row < len(ends):
            until = max(int(np.searchsorted(ends, begin + _BLOCK_BYTES)), row + 1)
            end = int(ends[until - 1])
            hashes[row:until] = self._hashes(stored.data[begin:end], ends[row:until] - begin)
            row, begin = until, end
        return hashes

    def _hashes(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the hash of each id of `data`; none is empty."""
        starts = np.concatenate(([0], ends[:-1]))
        places = np.arange(len(data)) - np.repeat(starts, ends - starts)
        terms = self._multipliers[places] * (data + np.uint64(1))
        return (np.add.reduceat(terms, starts) >> np.uint64(32)).astype(np.uint32)
