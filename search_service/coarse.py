"""The coarse stage: a query's code to the pool of rows within a Hamming radius."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from search_service import margins
from search_service.cancel import Cancel
from search_service.kernels import hamming
from search_service.snapshot import Snapshot

_SCAN_ROWS = 1 << 22
"""Rows between two looks at the cancel flag, a few milliseconds; a multiple of GROUP_ROWS."""

_NO_WORDS = np.empty(0, dtype=np.uint64)
_NO_FLAGS = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The rows near a query's code."""

    rows: NDArray[np.int64]
    """Shape ``[n]``, ascending."""
    hamming_bits: NDArray[np.uint16]
    """Their distances, shape ``[n]``."""
    threshold_bits: int
    """The radius of the ball."""
    histogram: NDArray[np.int64]
    """Rows of the complete ball at each distance, shape ``[threshold_bits + 1]``."""
    truncated: bool
    """Whether `rows` is less than the complete ball."""

    def radius_of(self, n: int) -> int:
        """Return the smallest radius within which the ball has `n` rows, or all if it has fewer."""
        within = np.cumsum(self.histogram)
        return int(np.searchsorted(within, min(n, within[-1])))


class Scratch:
    """Memory for the distances of one scan, kept for the next. Not for two scans at once."""

    def __init__(self) -> None:
        self._distances = np.empty(0, dtype=np.uint16)
        self._nearest = np.empty(0, dtype=np.uint16)

    def for_rows(self, rows: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Return arrays for `hamming.scan`: one entry per row, one per group of rows."""
        n_groups = -(-rows // hamming.GROUP_ROWS)
        if self._nearest.shape[0] < n_groups:
            room = n_groups + n_groups // 4  # tables grow; do not allocate at each write
            self._nearest = np.empty(room, dtype=np.uint16)
            self._distances = np.empty(room * hamming.GROUP_ROWS, dtype=np.uint16)
        return self._distances[:rows], self._nearest[:n_groups]


def find_pool(
    snapshot: Snapshot,
    query: NDArray[np.uint64],
    *,
    radius_bits: int | None,
    n_wanted: int,
    max_rows: int | None,
    scratch: Scratch,
    cancel: Cancel,
    weights: NDArray[np.uint8] | None = None,
) -> Pool:
    """Find the rows within a Hamming radius of a query.

    Parameters
    ----------
    snapshot
        What to search.
    query
        The code as 64-bit words: uint64, shape ``[n_words]``.
    radius_bits
        The pool is all alive rows within it. None: the smallest radius whose ball holds
        `n_wanted` alive rows, or all if there are fewer (0 if there are none).
    n_wanted
        See `radius_bits`; not used if that is given.
    max_rows
        Keep at most so many, the first by (distance, asymmetric distance, row). None: keep all.
    scratch
        Working memory.
    cancel
        Polled between blocks.
    weights
        What each bit weighs in the asymmetric distance, see `search_service.margins`: uint8, shape
        ``[n_bits]``. None: nothing, so that the first by (distance, row) are kept.

    Returns
    -------
    Pool

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    distances, nearest = scratch.for_rows(snapshot.rows)
    _scan(snapshot, query, distances, nearest, cancel)

    n_wanted = min(n_wanted, snapshot.n_alive)
    ceiling_bits = (
        _ceiling(nearest, n_wanted, snapshot.n_bits) if radius_bits is None else radius_bits
    )
    within = np.cumsum(_histogram(distances, nearest, ceiling_bits))
    threshold_bits = int(np.searchsorted(within, n_wanted)) if radius_bits is None else radius_bits
    ball = within[: threshold_bits + 1]

    truncated = False
    edge_bits = threshold_bits
    if max_rows is not None and ball[-1] > max_rows:
        truncated = True
        edge_bits = int(np.searchsorted(ball, max_rows))
    rows, hamming_bits = _collect(distances, nearest, edge_bits, int(ball[edge_bits]))
    if max_rows is not None and rows.shape[0] > max_rows:
        at_edge = np.flatnonzero(hamming_bits == edge_bits)
        if weights is not None:
            asymmetric = margins.distances_to(snapshot, rows[at_edge], query, weights, cancel)
            at_edge = at_edge[_farthest(asymmetric, rows.shape[0] - max_rows)]
        surplus = at_edge[max_rows - rows.shape[0] :]
        rows, hamming_bits = np.delete(rows, surplus), np.delete(hamming_bits, surplus)
    return Pool(rows, hamming_bits, threshold_bits, np.diff(ball, prepend=0), truncated)


def _farthest(distances: NDArray[np.uint32], n: int) -> NDArray[np.int64]:
    """Return the positions of the last `n` by (distance, position), in no order; `n` above 0."""
    edge = np.partition(distances, -n)[-n]
    beyond = np.flatnonzero(distances > edge)
    tied = np.flatnonzero(distances == edge)
    return np.concatenate([beyond, tied[beyond.size - n :]])


def _scan(
    snapshot: Snapshot,
    query: NDArray[np.uint64],
    distances: NDArray[np.uint16],
    nearest: NDArray[np.uint16],
    cancel: Cancel,
) -> None:
    n_words = len(snapshot.words)
    unused = (_NO_WORDS,) * (hamming.MAX_WORDS - n_words)
    dead = _NO_FLAGS if snapshot.dead is None else snapshot.dead
    for lo in range(0, snapshot.rows, _SCAN_ROWS):
        cancel.check()
        part = slice(lo, lo + _SCAN_ROWS)
        groups = slice(lo // hamming.GROUP_ROWS, (lo + _SCAN_ROWS) // hamming.GROUP_ROWS)
        words = tuple(column[part] for column in snapshot.words) + unused
        hamming.scan(words, n_words, query, dead[part], distances[part], nearest[groups])
    cancel.check()


def _ceiling(nearest: NDArray[np.uint16], n_wanted: int, n_bits: int) -> int:
    """Return a radius whose ball surely holds `n_wanted` rows, though a smaller one may do.

    Each group of rows has at least one as near as its nearest. So a radius within which there are
    `n_wanted` groups is enough, and only the groups, few as they are, have to be counted. Where
    there are fewer groups than that, every row has to be: all are within `n_bits`.
    """
    groups_within = np.cumsum(np.bincount(nearest, minlength=n_bits + 1)[: n_bits + 1])
    return min(int(np.searchsorted(groups_within, n_wanted)), n_bits)


def _histogram(
    distances: NDArray[np.uint16], nearest: NDArray[np.uint16], ceiling_bits: int
) -> NDArray[np.int64]:
    counts = np.zeros((numba.get_num_threads(), ceiling_bits + 1), dtype=np.int64)
    hamming.tally(distances, nearest, ceiling_bits, counts)
    total: NDArray[np.int64] = counts.sum(axis=0)
    return total


def _collect(
    distances: NDArray[np.uint16], nearest: NDArray[np.uint16], radius_bits: int, n_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    rows = np.empty(n_rows, dtype=np.int64)
    hamming_bits = np.empty(n_rows, dtype=np.uint16)
    n_found = hamming.collect(distances, nearest, radius_bits, rows, hamming_bits)
    assert n_found == n_rows, "tally and collect disagree"
    return rows, hamming_bits
