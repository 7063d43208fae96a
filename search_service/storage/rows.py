"""Ids to rows and back, for the newest version and for all that are still being read."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import DataLossError
from hashlens.types import TagFilter
from search_service.snapshot import Snapshot, Texts, read_only
from search_service.storage import layout
from search_service.storage.arrays import Arrays
from search_service.storage.due import DueRows
from search_service.storage.id_index import IdIndex, StoredIds
from search_service.storage.layout import LogRecord
from search_service.storage.tag_index import TagIndex

_CHECK_BYTES: Final = 1 << 20


class RowTable:
    """Which rows each id has had, and which rows are dead.

    One thread changes it; `RowsAt` reads it at the same time without a lock. That is safe because
    nothing is ever taken back: a row keeps its id, and a flag that is to change is changed in a
    copy.

    Parameters
    ----------
    rows
        How many rows there are. Their ids are indexed by `index`, or when one is first looked up:
        until then a start need not wait for it.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.n_dead = 0
        self._rows_at_start = rows
        self._ids = IdIndex()
        self.tags = TagIndex()
        """Which rows have each tag."""
        self.due = DueRows()
        """Which rows have expired; for one thread."""
        self._dead: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        """1 where a row is dead; longer than the rows, so that appending needs no copy."""
        self._missing: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        """1 where a row's feature is missing; likewise."""

    def index(self, stored: StoredIds) -> None:
        """Index the ids of the rows that were there at first, unless that is done."""
        self._ids.build(stored, self._rows_at_start)

    def last_rows(self, ids: Sequence[str], stored: StoredIds, limit: int) -> list[int | None]:
        """Return for each id the last row below `limit` that has it, dead or alive, or None."""
        self.index(stored)
        return self._ids.last_rows(ids, stored, limit)

    def alive_rows(self, ids: Sequence[str], stored: StoredIds) -> list[int | None]:
        """Return for each id its row, or None if it has none that is alive."""
        found = self.last_rows(ids, stored, self.rows)
        return [None if row is None or self.is_dead(row) else row for row in found]

    def misled(self, stored: StoredIds) -> NDArray[np.int64]:
        """Return the rows that are not found by their ids: int64, none if all is well."""
        self.index(stored)
        return self._ids.misled(stored)

    def is_dead(self, row: int) -> bool:
        """Tell whether a row was deleted or replaced."""
        return row < len(self._dead) and bool(self._dead[row])

    def sort_out(
        self, records: Sequence[LogRecord], stored: StoredIds
    ) -> tuple[list[LogRecord], list[tuple[int, int]]]:
        """Return the writes that make rows, and (row, seq) of the rows that die."""
        puts: list[LogRecord] = []
        deaths: list[tuple[int, int]] = []
        rows_now: dict[str, int | None] = {}
        rows_before = self.alive_rows([record.id for record in records], stored)
        for record, row_before in zip(records, rows_before, strict=True):
            if record.op == layout.MARK:
                continue
            item_id = record.id
            row = rows_now.get(item_id, row_before)
            if row is not None:
                deaths.append((row, record.seq))
            if record.op == layout.PUT:
                rows_now[item_id] = self.rows + len(puts)
                puts.append(record)
            else:
                rows_now[item_id] = None
        return puts, deaths

    def extend(self, ids: Sequence[str], stored: StoredIds) -> None:
        """Add rows behind the last, alive; `stored` has them already."""
        self.index(stored)
        self._ids.extend(ids, stored)
        self.rows += len(ids)

    def kill(self, rows: NDArray[np.int64]) -> None:
        """Mark rows as dead, in a copy: versions that are being read keep their flags."""
        if len(rows) == 0:
            return
        self._dead = self._flagged(self._dead, rows)
        self.n_dead += len(rows)

    def lose(self, rows: NDArray[np.int64]) -> None:
        """Mark rows as without a feature, in a copy, as `kill` does."""
        if len(rows):
            self._missing = self._flagged(self._missing, rows)

    @property
    def n_missing(self) -> int:
        """How many alive rows have no feature."""
        missing = np.flatnonzero(self._missing[: self.rows])
        return len(missing) - int(np.count_nonzero(self._padded(self._dead)[missing]))

    def dead_flags(self) -> NDArray[np.uint8] | None:
        """Return 1 for each dead row, shape ``[rows]``, never changed again; None without any."""
        if self.n_dead == 0:
            return None
        self._dead = self._padded(self._dead)
        return read_only(self._dead[: self.rows])

    def has_feature_flags(self) -> NDArray[np.uint8] | None:
        """Return 0 for a row without a feature, else 1, shape ``[rows]``; None if all have one."""
        missing = self._missing[: self.rows]
        if not missing.any():
            return None
        return read_only(1 - self._padded(self._missing)[: self.rows])

    def _flagged(self, flags: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy, with room for more rows, in which `rows` are flagged."""
        copied = np.zeros(self.rows + max(self.rows // 4, 1024), dtype=np.uint8)
        copied[: len(flags)] = flags
        copied[rows] = 1
        return copied

    def _padded(self, flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return flags that reach to the last row at least."""
        rows = self.rows
        if len(flags) >= rows:
            return flags
        return np.concatenate((flags, np.zeros(rows - len(flags) + rows // 4, dtype=np.uint8)))


@dataclass(frozen=True, slots=True)
class RowsAt:
    """The ids and payloads of one snapshot."""

    table: RowTable
    rows: int
    dead: NDArray[np.uint8] | None
    ids: StoredIds
    payloads: NDArray[np.uint8]
    """All payloads, mapped."""
    tags: NDArray[np.uint8]
    """All tags, mapped."""

    def id_texts(self) -> Texts:
        """Return the ids of all rows as UTF-8, views."""
        return Texts(self.ids.data, self.ids.records["id_end"])

    def payload_texts(self) -> Texts:
        """Return the payloads of all rows, views."""
        return Texts(self.payloads, self.ids.records["payload_end"])

    def tag_texts(self) -> Texts:
        """Return the tags of all rows, as `layout.pack_tags` made them, views."""
        return Texts(self.tags, self.ids.records["tags_end"])

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the ids of rows, in the order of `rows`; int64, shape ``[n]``."""
        return self.ids.of(rows)

    def row_of(self, item_id: str) -> int | None:
        """Return the row that an id had in this version, or None."""
        row = self.table.last_rows([item_id], self.ids, self.rows)[0]
        if row is None or (self.dead is not None and self.dead[row]):
            return None
        return row

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Return the payloads of rows, in the order of `rows`; int64, shape ``[n]``. Copies."""
        return _slices(self.payload_texts(), rows)

    def tags_of(self, rows: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return the tags of rows, in the order of `rows`; int64, shape ``[n]``."""
        return [layout.unpack_tags(packed) for packed in _slices(self.tag_texts(), rows)]

    def expiries_of(self, rows: NDArray[np.int64]) -> list[int]:
        """Return when rows expire, in ms since 1970 or 0 for never; int64, shape ``[n]``."""
        expiries: list[int] = self.ids.records["expires_ms"][rows].tolist()
        return expiries

    def index_tags(self) -> bool:
        """Do some milliseconds of work for `passing`; tell whether it can be asked."""
        return self.table.tags.extend(self.tag_texts(), self.rows)

    def passing(self, wanted: TagFilter) -> NDArray[np.int64]:
        """Return the rows whose tags pass, dead ones too: int64, ascending; see `index_tags`."""
        return self.table.tags.passing(wanted, self.rows)

    def due(self, now_ms: int) -> NDArray[np.int64]:
        """Return the rows that are alive and have expired: int64; for one thread at a time."""
        return self.table.due.find(self.ids.records, self.dead, now_ms)


def rows_of(snapshot: Snapshot) -> RowsAt:
    """Return what a snapshot of the store's knows of its rows beside what is searched."""
    assert isinstance(snapshot.ids, RowsAt), "another's snapshot"
    return snapshot.ids


def _slices(texts: Texts, rows: NDArray[np.int64]) -> list[bytes]:
    stops = texts.ends[rows].tolist()
    starts = np.where(rows > 0, texts.ends[rows - 1], 0).tolist()
    view = texts.data.data
    return [bytes(view[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def load_table(directory: Path, arrays: Arrays) -> RowTable:
    """Check the ids in the files, and rebuild the tombstones in memory."""
    _check_ids(directory, arrays)
    table = RowTable(arrays.rows)
    dead = arrays.death_records()["row"].astype(np.int64)
    if dead.size and int(dead.max()) >= arrays.rows:
        raise DataLossError(f"a tombstone in {directory} has no row")
    table.kill(dead)
    table.lose(np.flatnonzero(arrays.records()["flags"] & layout.NO_FEATURE))
    return table


def _check_ids(directory: Path, arrays: Arrays) -> None:
    """Raise DataLossError unless each id is UTF-8: all are, and none begins inside a letter."""
    data = arrays.id_bytes()[: arrays.ends()[0]]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for first in range(0, len(data), _CHECK_BYTES):
            decoder.decode(data[first : first + _CHECK_BYTES].data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataLossError(f"the ids in {directory} are not text: {error}") from None
    starts = arrays.records()["id_end"][:-1]
    if ((data[starts] & 0xC0) == 0x80).any():
        raise DataLossError(f"the ids in {directory} are not text: one ends inside a letter")
