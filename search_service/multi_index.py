"""Answers small radii without reading every code: multi-index hashing over most of a table.

Source: Norouzi, Punjani, Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012;
`search_service.kernels.multi_index` has the argument why nothing is missed.

An index never decides what the answer is, only how fast it comes. A table that grows is indexed
piece by piece; rows behind the last piece are scanned as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numba
import numpy as np
from numpy.typing import NDArray

from search_service.kernels import multi_index as kernels
from search_service.snapshot import Snapshot

MIN_ROWS = 1 << 20
"""Fewer rows are scanned before an index could have been asked."""

_BUILD_ROWS = 1 << 22
"""Rows between two looks at whether building is still wanted."""

_MAX_FLIPS = 1 << 14
"""Most values of one substring that are tried."""

_MAX_WIDTH = 26
"""Bits of the widest substring: its table of starts takes 256 MB."""

# What the work costs, in nanoseconds on one core; `hashlens bench coarse` shows whether it holds.
_LOOKUP_NS = 12.0
"""One value of a substring: two places in memory that no cache holds."""
_CANDIDATE_NS = 12.0
"""One row: its code, somewhere in memory."""
_CALL_NS = 15_000.0
"""Whatever there is to do."""
_SCAN_NS = 0.25
"""One 64-bit word of one row, when codes are read one after the other."""

_NO_FLAGS = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """Rows within a radius, of those that are indexed."""

    rows: NDArray[np.int64]
    """Ascending, shape ``[n]``."""
    hamming_bits: NDArray[np.uint16]
    counts: NDArray[np.int64]
    """Rows at each distance, shape ``[radius_bits + 1]``."""
    n_compared: int
    """Codes that were looked at."""


class _Piece:
    """An index of consecutive rows; it does not change."""

    def __init__(self, snapshot: Snapshot, start: int, stop: int, should_stop: Callable[[], bool]):
        self.start, self.stop = start, stop
        self.first_bits, self.widths = substrings(snapshot.n_bits, stop - start)
        m = self.widths.shape[0]
        self.starts = np.zeros((m, (1 << int(self.widths.max())) + 2), dtype=np.uint32)
        self.rows = np.empty((m, stop - start), dtype=np.uint32)
        for table, (first_bit, width) in enumerate(
            zip(self.first_bits.tolist(), self.widths.tolist(), strict=True)
        ):
            place = (snapshot.columns, first_bit, width)
            for lo in range(start, stop, _BUILD_ROWS):
                if should_stop():
                    raise InterruptedError
                kernels.count(*place, lo, min(lo + _BUILD_ROWS, stop), self.starts[table])
            kernels.add_up(self.starts[table])
            for lo in range(start, stop, _BUILD_ROWS):
                if should_stop():
                    raise InterruptedError
                hi = min(lo + _BUILD_ROWS, stop)
                kernels.place(*place, start, lo, hi, self.starts[table], self.rows[table])

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.rows.nbytes

    def plan(self, radius_bits: int) -> _Plan | None:
        """Return what has to be tried for a radius; None if that is too much."""
        m = self.widths.shape[0]
        a, b = divmod(radius_bits, m)
        reaches = np.array([a if table <= b else a - 1 for table in range(m)], dtype=np.int64)
        widest = int(self.widths.max())
        if sum(math.comb(widest, bits) for bits in range(a + 1)) > _MAX_FLIPS:
            return None
        flips, within = _flips(widest, a)
        n_flips = np.array([within[reach] if reach >= 0 else 0 for reach in reaches.tolist()])
        return _Plan(reaches, n_flips, flips)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    reaches: NDArray[np.int64]
    n_flips: NDArray[np.int64]
    flips: NDArray[np.uint32]


class MultiIndex:
    """An index of the first rows of one append-only table; it does not change.

    Parameters
    ----------
    pieces
        Of consecutive rows, the first from row 0.
    """

    def __init__(self, pieces: tuple[_Piece, ...] = ()) -> None:
        self._pieces = pieces

    @property
    def rows(self) -> int:
        """How many rows are indexed, from the first."""
        return self._pieces[-1].stop if self._pieces else 0

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return sum(piece.nbytes for piece in self._pieces)

    def extended(
        self, snapshot: Snapshot, should_stop: Callable[[], bool] = lambda: False
    ) -> MultiIndex:
        """Return an index of all rows of a later version of the table.

        Pieces that are no longer than what comes behind them are made anew together with it, so
        that there are few, and each row is indexed again a few times at most.

        Parameters
        ----------
        snapshot
            Of the same table, with as many rows at least.
        should_stop
            Polled; may be called from another thread's point of view at any time.

        Raises
        ------
        InterruptedError
            `should_stop` said so.
        """
        kept = list(self._pieces)
        start = self.rows
        while kept and kept[-1].stop - kept[-1].start <= snapshot.rows - start:
            start = kept.pop().start
        return MultiIndex((*kept, _Piece(snapshot, start, snapshot.rows, should_stop)))

    def cost_ns(self, query: NDArray[np.uint64], radius_bits: int) -> float:
        """Estimate how long `find` would take, from how many rows it would have to look at.

        That number is exact, so crowded codes, whose values have many rows, are seen for what they
        are.

        Returns
        -------
        float
            Nanoseconds; infinite if too many values would have to be tried.
        """
        total = 0.0
        for piece in self._pieces:
            plan = piece.plan(radius_bits)
            if plan is None:
                return math.inf
            total += _CALL_NS + _LOOKUP_NS * float(plan.n_flips.sum())
            total += _CANDIDATE_NS * self._n_candidates(piece, plan, query)
        return total

    def find(self, snapshot: Snapshot, query: NDArray[np.uint64], radius_bits: int) -> Near:
        """List the alive indexed rows within a radius.

        Parameters
        ----------
        snapshot
            A version of the table that has all rows which are indexed.
        query
            The code as 64-bit words: uint64, shape ``[n_words]``.
        radius_bits
            Such that `cost_ns` is finite.
        """
        counts = np.zeros(radius_bits + 1, dtype=np.int64)
        dead = _NO_FLAGS if snapshot.dead is None else snapshot.dead
        rows, row_bits, n_compared = [], [], 0
        for piece in self._pieces:
            plan = piece.plan(radius_bits)
            assert plan is not None, "cost_ns was not asked"
            room = self._n_candidates(piece, plan, query)
            some_rows, some_bits = np.empty(room, np.int64), np.empty(room, np.uint16)
            n = kernels.find(
                snapshot.columns,
                query,
                dead,
                piece.start,
                radius_bits,
                piece.first_bits,
                piece.widths,
                plan.n_flips,
                plan.reaches,
                plan.flips,
                piece.starts,
                piece.rows,
                some_rows,
                some_bits,
                counts,
            )
            order = np.argsort(some_rows[:n])
            rows.append(some_rows[:n][order])
            row_bits.append(some_bits[:n][order])
            n_compared += room
        return Near(np.concatenate(rows), np.concatenate(row_bits), counts, n_compared)

    def _n_candidates(self, piece: _Piece, plan: _Plan, query: NDArray[np.uint64]) -> int:
        return int(
            kernels.n_candidates(
                query, piece.first_bits, piece.widths, plan.n_flips, plan.flips, piece.starts
            )
        )


def compile_kernels() -> None:
    """Compile now what the first search by an index would have to wait for."""
    for kernel in (kernels.count, kernels.add_up, kernels.place):
        kernel.compile()
    kernels.n_candidates.compile()
    kernels.find.compile()


def scan_cost_ns(rows: int, n_words: int) -> float:
    """Estimate how long it takes to compare all codes."""
    return _CALL_NS + _SCAN_NS * rows * n_words / numba.get_num_threads()


def index_bytes(n_bits: int, rows: int) -> int:
    """Return how much memory an index of so many rows takes, in one piece."""
    _, widths = substrings(n_bits, rows)
    return 4 * len(widths) * (rows + (1 << int(widths.max())) + 2)


def substrings(n_bits: int, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a code into parts of about ``log2(rows)`` bits, so that a value has about one row.

    Returns
    -------
    first_bits, widths
        int64, shape ``[m]``; wider parts first.
    """
    width = min(max(int(math.log2(max(rows, 2))), 4), _MAX_WIDTH)
    m = -(-n_bits // width)
    widths = np.array([n_bits // m + (i < n_bits % m) for i in range(m)], dtype=np.int64)
    return np.cumsum(widths) - widths, widths


@lru_cache(maxsize=64)
def _flips(width: int, reach: int) -> tuple[NDArray[np.uint32], list[int]]:
    """Return the values with up to `reach` bits set, fewest first, and how many up to each."""
    values: list[int] = []
    within = []
    for bits in range(reach + 1):
        values += [sum(1 << i for i in chosen) for chosen in combinations(range(width), bits)]
        within.append(len(values))
    return np.array(values, dtype=np.uint32), within
