"""The nearest of all rows by Euclidean distance, block by block: what two stages are held to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import Embedding
from search_service import fine
from search_service.cancel import Cancel
from search_service.features import with_feature
from search_service.kernels import select
from search_service.snapshot import Snapshot

_BLOCK_BYTES = 32 << 20
"""Features that are read at a time: milliseconds in memory, a fraction of a second from disk."""

_BLOCK_ROWS = 1 << 18
"""Most rows at a time, however narrow their features."""

_ROOM = 4096
"""Rows that are held, whatever `k`, before the worst are thrown out."""


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The nearest rows, best first."""

    rows: NDArray[np.int64]
    """Shape ``[n]``."""
    ids: list[str]
    hamming_bits: NDArray[np.uint16]
    """Shape ``[n]``."""
    distances: NDArray[np.float32]
    """Euclidean, shape ``[n]``; see `search_service.kernels.euclidean` for the exact definition."""


class ExhaustiveScan:
    """Compares a query with all alive rows that have a feature, and keeps the `k` nearest.

    The order is that of a two-stage answer: (Euclidean distance, Hamming distance, id). However
    many rows there are, and however many are alike, a few times `k` and a block are held.

    Parameters
    ----------
    snapshot
        What to scan; it has features.
    query
        A code as long as the snapshot's, and a finite feature as wide.
    k
        How many to keep, at least 1.
    """

    def __init__(self, snapshot: Snapshot, query: Embedding, k: int) -> None:
        self._snapshot = snapshot
        self._k = k
        self._vector = np.ascontiguousarray(query.feature, dtype=np.float32)
        packed = np.frombuffer(query.code, dtype=np.uint8)[np.newaxis]
        self._words = codes.as_words(packed)[:, 0]
        row_bytes = snapshot.dim * snapshot.feature_dtype.n_bytes
        self._block_rows = min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // row_bytes))
        self._room = max(_ROOM, 2 * k)
        self._keys = np.empty(0, dtype=np.uint64)
        self._rows = np.empty(0, dtype=np.int64)
        self._edge = np.iinfo(np.uint64).max
        """Rows with a larger key are not among the nearest."""

    @property
    def blocks(self) -> range:
        """The first row of each block; `scan` wants them all, in any order."""
        return range(0, self._snapshot.rows, self._block_rows)

    def scan(self, first_row: int, cancel: Cancel) -> None:
        """Compare the query with the rows of one block.

        Parameters
        ----------
        first_row
            One of `blocks`.
        cancel
            Polled within the block; the scan is of no use after it raised.

        Raises
        ------
        CancelledError, DeadlineError
            As `cancel` says.
        """
        rows = self._comparable(first_row, cancel)
        distances = fine.distances_to(self._snapshot, rows, self._vector, cancel)
        keys = select.euclidean_keys(distances, self._hamming_bits(rows))
        near = keys <= self._edge
        self._keys = np.concatenate([self._keys, keys[near]])
        self._rows = np.concatenate([self._rows, rows[near]])
        if self._keys.shape[0] > self._room:
            self._throw_out()

    def nearest(self) -> Nearest:
        """Return the nearest rows of the blocks scanned; fewer than `k` if there are fewer."""
        chosen, ids = select.k_smallest(
            self._keys, self._k, lambda i: self._snapshot.ids_of(self._rows[i])
        )
        keys = self._keys[chosen]
        return Nearest(
            rows=self._rows[chosen],
            ids=ids,
            hamming_bits=(keys & np.uint64(0xFFFF)).astype(np.uint16),
            distances=(keys >> np.uint64(16)).astype(np.uint32).view(np.float32),
        )

    def _comparable(self, first_row: int, cancel: Cancel) -> NDArray[np.int64]:
        """Return the block's rows that are alive and have a feature."""
        snapshot = self._snapshot
        stop = min(first_row + self._block_rows, snapshot.rows)
        rows = np.arange(first_row, stop, dtype=np.int64)
        if snapshot.dead is not None:
            rows = rows[snapshot.dead[first_row:stop] == 0]
        has_feature = with_feature(snapshot, rows, cancel)
        return rows if has_feature is None else rows[has_feature]

    def _hamming_bits(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        bits = np.zeros(rows.shape[0], dtype=np.uint16)
        for column, word in zip(self._snapshot.words, self._words, strict=True):
            bits += np.bitwise_count(column[rows] ^ word)
        return bits

    def _throw_out(self) -> None:
        """Keep the `k` nearest; ids are read only where they decide."""
        n_kept = self._k
        edge = np.partition(self._keys, n_kept - 1)[n_kept - 1]
        kept = np.flatnonzero(self._keys < edge)
        tied = np.flatnonzero(self._keys == edge)
        n_wanted = n_kept - kept.size
        if n_wanted < tied.size:
            ids = self._snapshot.ids_of(self._rows[tied])
            tied = tied[sorted(range(tied.size), key=ids.__getitem__)[:n_wanted]]
        kept = np.concatenate([kept, tied])
        self._keys, self._rows, self._edge = self._keys[kept], self._rows[kept], int(edge)
