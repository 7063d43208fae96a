"""The rows of a collection's files at one version, for who compares or copies them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import DataLossError
from search_service.storage import layout
from search_service.storage.gather import gathered
from search_service.storage.id_index import StoredIds
from search_service.storage.rows import RowTable


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """Rows and tombstones, mapped; they stay as they are while the collection goes on."""

    seq: int
    """The last write that is in them."""
    generation: int
    rows_per_segment: int
    words: tuple[NDArray[np.uint64], ...]
    """The codes, one array per word, shape ``[rows]`` each."""
    records: NDArray[Any]
    """`layout.ROW`, shape ``[rows]``."""
    deaths: NDArray[Any]
    """`layout.DEATH`, shape ``[deaths]``."""
    ids: NDArray[np.uint8]
    payloads: NDArray[np.uint8]
    tags: NDArray[np.uint8]
    table: RowTable

    def rows_at(self, seq: int) -> int:
        """Return how many rows were written up to a version."""
        return bisect_right(self.records["seq"], seq)

    def deaths_at(self, seq: int) -> int:
        """Return how many rows had died up to a version."""
        return bisect_right(self.deaths["seq"], seq)

    def dead_at(self, seq: int) -> NDArray[np.bool_]:
        """Return which of the rows written up to a version had died by then."""
        flags = np.zeros(self.rows_at(seq), dtype=np.bool_)
        rows = self.deaths["row"][: self.deaths_at(seq)]
        flags[rows[rows < len(flags)]] = True
        return flags

    def find(self, ids: list[bytes], seq: int) -> list[int | None]:
        """Return for each id the row that it had at a version, or None."""
        texts = [item_id.decode(errors="surrogateescape") for item_id in ids]
        found = self.table.last_rows(texts, StoredIds(self.ids, self.records), self.rows_at(seq))
        return [None if row is None or self._was_dead(row, seq) else row for row in found]

    def packed(self, rows: NDArray[np.int64], n_bits: int) -> NDArray[np.uint8]:
        """Return the codes of rows, packed: uint8, shape ``[n, n_bytes]``, a copy."""
        return codes.from_words(np.stack([word[rows] for word in self.words]), n_bits)

    def ids_of(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """Return the ids of rows, joined, and their lengths."""
        return self._slices(self.ids, "id_end", rows)

    def payloads_of(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """Return the payloads of rows, joined, and their lengths."""
        return self._slices(self.payloads, "payload_end", rows)

    def tags_of(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """Return the tags of rows as they are stored, joined, and their lengths."""
        return self._slices(self.tags, "tags_end", rows)

    def with_extras(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which rows have a payload, tags or an expiry."""
        records, before = self.records[rows], self.records[np.maximum(rows - 1, 0)]
        first = rows == 0
        flags: NDArray[np.bool_] = records["expires_ms"] != 0
        for field in ("payload_end", "tags_end"):
            flags |= records[field] != np.where(first, np.uint64(0), before[field])
        return flags

    def extras_of(self, row: int) -> bytes:
        """Return what an item has beside its embedding, as Redis keeps it."""
        rows = np.array([row], dtype=np.int64)
        expires_ms = int(self.records["expires_ms"][row])
        return layout.pack_extras(self.payloads_of(rows)[0], self.tags_of(rows)[0], expires_ms)

    def _slices(
        self, data: NDArray[np.uint8], field: str, rows: NDArray[np.int64]
    ) -> tuple[bytes, NDArray[np.int64]]:
        ends = self.records[field][rows].astype(np.int64)
        starts = self.records[field][np.maximum(rows - 1, 0)].astype(np.int64)
        starts[rows == 0] = 0
        lengths = ends - starts
        if len(rows) and (int(lengths.min()) < 0 or int(ends.max()) > len(data)):
            raise DataLossError(f"the rows' {field} are out of order")
        return gathered(data, starts, lengths), lengths

    def _was_dead(self, row: int, seq: int) -> bool:
        if not self.table.is_dead(row):
            return False
        died = self.deaths["seq"][self.deaths["row"] == row]
        return bool(len(died)) and int(died[0]) <= seq
