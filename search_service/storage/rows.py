"""Ids to rows and back, for the newest version and for all that are still being read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search_service.snapshot import Texts, read_only


@dataclass(slots=True)
class RowTable:
    """Which row each id has, which it had before, and which rows are dead.

    One thread changes it; `RowsAt` reads it at the same time without a lock. That is safe because
    nothing is ever taken back: a row keeps its id, an id its former rows, and a flag that is to
    change is changed in a copy.
    """

    ids: list[str] = field(default_factory=list)
    latest: dict[str, int] = field(default_factory=dict)
    """The last row each id was given, dead or alive."""
    former: dict[int, int] = field(default_factory=dict)
    """The row that the same id had before, for rows that are not their id's first."""
    n_dead: int = 0
    _dead: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    """1 where a row is dead; longer than the rows, so that appending needs no copy."""

    def alive_row(self, item_id: str) -> int | None:
        """Return the row of an id, or None if it has none that is alive."""
        row = self.latest.get(item_id)
        return None if row is None or self.is_dead(row) else row

    def is_dead(self, row: int) -> bool:
        """Tell whether a row was deleted or replaced."""
        return row < len(self._dead) and bool(self._dead[row])

    def extend(self, ids: Iterable[str]) -> None:
        """Add rows behind the last, alive."""
        for item_id in ids:
            row = len(self.ids)
            self.ids.append(item_id)
            before = self.latest.get(item_id)
            if before is not None:
                # First the way back, then the new row: a reader of an older version follows it.
                self.former[row] = before
            self.latest[item_id] = row

    def kill(self, rows: NDArray[np.int64]) -> None:
        """Mark rows as dead, in a copy: versions that are being read keep their flags."""
        if len(rows) == 0:
            return
        dead = np.zeros(len(self.ids) + max(len(self.ids) // 4, 1024), dtype=np.uint8)
        dead[: len(self._dead)] = self._dead
        dead[rows] = 1
        self._dead = dead
        self.n_dead += len(rows)

    def dead_flags(self) -> NDArray[np.uint8] | None:
        """Return 1 for each dead row, shape ``[rows]``, never changed again; None without any."""
        rows = len(self.ids)
        if self.n_dead == 0:
            return None
        if len(self._dead) < rows:
            self._dead = np.concatenate(
                (self._dead, np.zeros(rows - len(self._dead) + rows // 4, dtype=np.uint8))
            )
        return read_only(self._dead[:rows])


@dataclass(frozen=True, slots=True)
class RowsAt:
    """The ids and payloads of one snapshot."""

    table: RowTable
    rows: int
    dead: NDArray[np.uint8] | None
    records: NDArray[Any]
    """`layout.ROW`, shape ``[rows]``, mapped."""
    id_bytes: NDArray[np.uint8]
    """All ids, mapped."""
    payloads: NDArray[np.uint8]
    """All payloads, mapped."""

    def id_texts(self) -> Texts:
        """Return the ids of all rows as UTF-8, views."""
        return Texts(self.id_bytes, self.records["id_end"])

    def payload_texts(self) -> Texts:
        """Return the payloads of all rows, views."""
        return Texts(self.payloads, self.records["payload_end"])

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the ids of rows, in the order of `rows`; int64, shape ``[n]``."""
        ids = self.table.ids
        return [ids[row] for row in rows.tolist()]

    def row_of(self, item_id: str) -> int | None:
        """Return the row that an id had in this version, or None."""
        row = self.table.latest.get(item_id)
        while row is not None and row >= self.rows:
            row = self.table.former.get(row)
        if row is None or (self.dead is not None and self.dead[row]):
            return None
        return row

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Return the payloads of rows, in the order of `rows`; int64, shape ``[n]``. Copies."""
        ends = self.records["payload_end"]
        stops = ends[rows].tolist()
        starts = np.where(rows > 0, ends[rows - 1], 0).tolist()
        view = self.payloads.data
        return [bytes(view[start:stop]) for start, stop in zip(starts, stops, strict=True)]
