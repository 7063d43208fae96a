"""One pass over the codes of a table with some queries, and guesses of what it will find."""

from __future__ import annotations

import math
from itertools import pairwise

import numba
import numpy as np
from numpy.typing import NDArray

from search_service.cancel import Cancel
from search_service.kernels import hamming, lists
from search_service.kernels.vectors import GROUP_ROWS
from search_service.snapshot import Snapshot

_SCAN_ROWS = 1 << 22
"""Rows of each thread between two looks at the cancel flag, a millisecond or two; of a batch fewer,
as each takes longer. A multiple of GROUP_ROWS."""

_SAMPLE_BLOCKS = 16

_SAMPLE_NEAR = 32
"""The automatic radius is guessed from so many rows that should be near enough for it: of more the
guess would be better, but take longer than it saves."""

_SAMPLE_ROWS = (1024, 1 << 14)
"""Fewest and most rows that are looked at for a guess."""

_LISTED_ROWS = 1 << 18
"""Rows that each thread is expected to list between two looks at the cancel flag."""

_GATHERED_ROWS = 1 << 18
"""Rows that are put together between two looks at the cancel flag."""

SPARE_ROWS = 1024
"""Room for so many rows more than a thread is expected to list."""

_NO_FLAGS = np.empty(0, dtype=np.uint8)


class Scratch:
    """Memory for one scan, kept for the next. Not for two scans at once."""

    def __init__(self) -> None:
        self._rows = np.empty(0, dtype=np.int64)
        self._row_bits = np.empty(0, dtype=np.uint16)

    def lists(
        self, n_parts: int, n_queries: int, room: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """Return arrays for `hamming.scan` to list rows in, shape as asked."""
        n = n_parts * n_queries * room
        if self._rows.shape[0] < n:
            rows, row_bits = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.uint16)
            self._rows, self._row_bits = rows, row_bits  # Both or, without the memory, neither.
        shape = (n_parts, n_queries, room)
        return self._rows[:n].reshape(shape), self._row_bits[:n].reshape(shape)


class Guesses:
    """What a few rows tell of where the nearest ones are.

    A wrong guess costs time and never an answer: what is too high lists rows that are not wanted,
    what is too low is noticed.
    """

    def __init__(
        self, snapshot: Snapshot, queries: NDArray[np.uint64], n_wanted: NDArray[np.int64]
    ) -> None:
        rows = snapshot.rows
        fewest_wanted = min((n for n in n_wanted.tolist() if n > 0), default=rows)
        n_sampled = sample_rows(rows, fewest_wanted)
        n_blocks, block_rows = _SAMPLE_BLOCKS, n_sampled // _SAMPLE_BLOCKS
        if rows <= 2 * n_sampled:
            n_blocks, block_rows = 1, rows
        counts = np.zeros((queries.shape[0], snapshot.n_bits + 1), dtype=np.int64)
        dead = _NO_FLAGS if snapshot.dead is None else snapshot.dead
        self._n_sampled = hamming.sample(
            snapshot.columns, queries, dead, rows, n_blocks, block_rows, counts
        )
        self._n_alive = snapshot.n_alive
        self._n_bits = snapshot.n_bits
        self._within = counts.cumsum(axis=1)

    @property
    def _is_exact(self) -> bool:
        return bool(self._n_sampled == self._n_alive)

    def ceiling(self, query: int, n_wanted: int) -> int:
        """Return a radius that most probably holds `n_wanted` rows, and not many more."""
        if n_wanted == 0:
            return 0
        expected = n_wanted * self._n_sampled / self._n_alive
        if not self._is_exact:
            expected += 3 * math.sqrt(expected) + 2
        return min(int(self._within[query].searchsorted(expected)), self._n_bits)

    def higher(self, query: int, ceiling: int) -> int:
        """Return a radius for who did not find enough within `ceiling`."""
        more = 4 * self._within[query, ceiling] + 16
        return min(max(int(self._within[query].searchsorted(more)), ceiling + 1), self._n_bits)

    def room(self, query: int, ceiling: int) -> int:
        """Return how many rows a thread will most probably find within a radius."""
        found = float(self._within[query, ceiling])
        if not self._is_exact:
            found += 3 * math.sqrt(found) + 2
            found *= self._n_alive / max(self._n_sampled, 1)
        return int(min(found, self._n_alive)) // numba.get_num_threads() + SPARE_ROWS


class Scan:
    """One pass over the codes with some queries."""

    def __init__(
        self,
        snapshot: Snapshot,
        queries: NDArray[np.uint64],
        *,
        ceilings: list[int],
        n_wanted: NDArray[np.int64],
        room: int,
        scratch: Scratch,
        cancel: Cancel,
        first_row: int = 0,
    ) -> None:
        self._first_row = first_row
        self._cancel = cancel
        n_queries, n_parts = queries.shape[0], numba.get_num_threads()
        self._states = np.zeros((n_parts, n_queries, hamming.N_STATE), dtype=np.int64)
        self._states[:, :, hamming.CEILING] = ceilings
        self._states[:, :, hamming.NEAREST_MISSED] = hamming.NEVER
        self._counts = np.zeros((n_parts, n_queries, snapshot.n_bits + 1), dtype=np.int64)
        self._rows, self._row_bits = scratch.lists(n_parts, n_queries, room)
        self._run(snapshot, queries, n_wanted, cancel)
        self._balls = np.empty((n_queries, snapshot.n_bits + 1), dtype=np.int64)
        self._summary = np.empty((n_queries, 2), dtype=np.int64)
        lists.settle(self._states, self._counts, self._balls, self._summary)

    def ball(self, query: int) -> NDArray[np.int64]:
        """Return how many rows there are within each radius up to the query's ceiling."""
        return self._balls[query, : self._summary[query, 0] + 1]

    def has_all(self, query: int, radius_bits: int) -> bool:
        """Tell whether all rows within a radius are listed."""
        return bool(self._summary[query, 1] > radius_bits)

    def room_for(self, query: int, radius_bits: int) -> int:
        """Return how many rows within a radius a part has at most."""
        return int(self._counts[:, query, : radius_bits + 1].sum(axis=1).max())

    def rows(
        self, query: int, radius_bits: int, n: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """Return the `n` rows within a radius, and their distances.

        Raises
        ------
        CancelledError, DeadlineError
            As the scan's `cancel` says.
        """
        self._cancel.check()
        if n > _GATHERED_ROWS:
            return self._many_rows(query, radius_bits, n)
        rows = np.empty(n, dtype=np.int64)
        row_bits = np.empty(n, dtype=np.uint16)
        found = lists.gather(
            self._states, self._rows, self._row_bits, query, radius_bits, rows, row_bits
        )
        assert found == n, "scan counts and lists differently"
        return rows, row_bits

    def _many_rows(
        self, query: int, radius_bits: int, n: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """Do as `rows`, with looks at the cancel flag."""
        rows = np.empty(n, dtype=np.int64)
        row_bits = np.empty(n, dtype=np.uint16)
        done = 0
        for part in range(self._states.shape[0]):
            n_stored = int(self._states[part, query, hamming.N_STORED])
            for lo in range(0, n_stored, _GATHERED_ROWS):
                self._cancel.check()
                place = slice(lo, min(lo + _GATHERED_ROWS, n_stored))
                bits = self._row_bits[part, query, place]
                near = np.flatnonzero(bits <= radius_bits)
                to = slice(done, done + near.shape[0])
                rows[to] = self._rows[part, query, place][near]
                row_bits[to] = bits[near]
                done += near.shape[0]
        assert done == n, "scan counts and lists differently"
        return rows, row_bits

    def _run(
        self,
        snapshot: Snapshot,
        queries: NDArray[np.uint64],
        n_wanted: NDArray[np.int64],
        cancel: Cancel,
    ) -> None:
        n_parts = self._states.shape[0]
        first_row = self._first_row
        n_groups = (snapshot.rows - first_row) // GROUP_ROWS
        edges = [first_row + n_groups * part // n_parts * GROUP_ROWS for part in range(n_parts)]
        edges.append(snapshot.rows)
        groups = np.empty((n_parts, hamming.BLOCK_GROUPS + 1), dtype=np.int64)
        members = np.empty((n_parts, hamming.BLOCK_GROUPS + 1), dtype=np.uint64)
        dead = _NO_FLAGS if snapshot.dead is None else snapshot.dead
        # Listing a row takes longer than passing it by. How many there will be is what room is for.
        part_rows = max(edges[-1] - edges[-2], 1)
        listed_share = min(max(self._rows.shape[2], 1) / part_rows, 1.0)
        rows = min(_SCAN_ROWS, int(_LISTED_ROWS / listed_share)) // queries.shape[0]
        step = max(rows // GROUP_ROWS, 1) * GROUP_ROWS
        for done in range(0, edges[-1] - edges[-2], step):  # The last part is the longest.
            cancel.check()
            starts = [min(edge + done, end) for edge, end in pairwise(edges)]
            stops = [min(start + step, end) for start, end in zip(starts, edges[1:], strict=True)]
            hamming.scan(
                snapshot.columns,
                queries,
                dead,
                np.array(starts, dtype=np.int64),
                np.array(stops, dtype=np.int64),
                n_wanted,
                self._states,
                self._counts,
                self._rows,
                self._row_bits,
                groups,
                members,
            )
        cancel.check()


def sample_rows(rows: int, n_wanted: int) -> int:
    """Return how many rows to look at to guess the radius that holds `n_wanted` of them."""
    fewest, most = _SAMPLE_ROWS
    return min(max(_SAMPLE_NEAR * rows // max(n_wanted, 1), fewest), most)
