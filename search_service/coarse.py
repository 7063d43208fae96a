"""The coarse stage: a query's code to the pool of rows within a Hamming radius."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from search_service import margins
from search_service.cancel import Cancel
from search_service.kernels import hamming, lists
from search_service.multi_index import MultiIndex, scan_cost_ns
from search_service.scan import SPARE_ROWS, Guesses, Scan, Scratch, sample_rows
from search_service.snapshot import Snapshot

_SERIAL_BYTES = 1 << 21
"""Codes of a table that one thread has compared before others are awake."""

_SERIAL_ROOM = 1 << 14
"""Rows that such a search has room for at least; one with more takes the usual way."""

_MAX_LISTED = 1 << 23
"""Most rows that a thread has room for at a time; a batch that takes more is cut."""

INDEX_SHARE = 0.5
"""An index is asked if that takes at most this share of what a scan would: both are estimates."""

_TRIAL_SHARE = 0.05
"""What may be spent on an index that may not find enough, as a share of the scan."""

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
    n_compared: int
    """Codes that were looked at to find them."""

    def radius_of(self, n: int) -> int:
        """Return the smallest radius within which the ball has `n` rows, or all if it has fewer."""
        within = np.cumsum(self.histogram)
        return int(np.searchsorted(within, min(n, within[-1])))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Wanted:
    """One query's pool, as it is asked for."""

    query: NDArray[np.uint64]
    """The code as 64-bit words, shape ``[n_words]``."""
    radius_bits: int | None
    """The pool is all alive rows within it. None: the smallest radius whose ball holds `n_rows`
    alive rows, or all if there are fewer (0 if there are none)."""
    n_rows: int
    """See `radius_bits`; not used if that is given."""
    max_rows: int | None = None
    """Keep at most so many, the first by (distance, asymmetric distance, row). None: keep all."""
    weights: NDArray[np.uint8] | None = None
    """What each bit weighs in the asymmetric distance, see `search_service.margins`: shape
    ``[n_bits]``. None: nothing, so that the first by (distance, row) are kept."""


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
    """Find the rows within a Hamming radius of one query; see `find_pools` and `Wanted`."""
    wanted = Wanted(
        query=query, radius_bits=radius_bits, n_rows=n_wanted, max_rows=max_rows, weights=weights
    )
    return find_pools(snapshot, [wanted], scratch=scratch, cancel=cancel)[0]


def find_pools(
    snapshot: Snapshot,
    wanted: Sequence[Wanted],
    *,
    scratch: Scratch,
    cancel: Cancel,
    index: MultiIndex | None = None,
) -> list[Pool]:
    """Find the rows within a Hamming radius of each query, in one pass over the codes for all.

    A query that the index answers sooner than a pass would is answered by it.

    Parameters
    ----------
    snapshot
        What to search.
    wanted
        The queries.
    scratch
        Working memory.
    cancel
        Polled between blocks.
    index
        Of the first rows of the snapshot's table, no more than it has. None: scan all.

    Returns
    -------
    list of Pool
        One per query, each as if it had been asked for alone.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    if not wanted:
        return []
    cancel.check()
    if snapshot.few is not None:
        few = snapshot.few
        pools_of_few = find_pools(few.codes, wanted, scratch=scratch, cancel=cancel)
        return [replace(pool, rows=few.rows[pool.rows]) for pool in pools_of_few]
    if len(wanted) == 1 and _is_small(snapshot):
        found = _find_serially(snapshot, wanted[0], scratch)
        if found is not None:
            cancel.check()
            return [_cut(snapshot, wanted[0], found, found.ball.shape[0] - 1, cancel)]
    queries = np.stack([one.query for one in wanted])
    n_rows = np.array(
        [min(one.n_rows, snapshot.n_alive) if one.radius_bits is None else 0 for one in wanted],
        dtype=np.int64,
    )
    pools: dict[int, Pool] = {}
    if index is not None:
        for i, one in enumerate(wanted):
            pool = _from_index(snapshot, index, one, int(n_rows[i]), scratch, cancel)
            if pool is not None:
                pools[i] = pool
    pending = [i for i in range(len(wanted)) if i not in pools]
    if not pending:
        return [pools[i] for i in range(len(wanted))]
    guesses = Guesses(snapshot, queries, n_rows)
    ceilings = [
        guesses.ceiling(i, int(n_rows[i])) if one.radius_bits is None else one.radius_bits
        for i, one in enumerate(wanted)
    ]
    rooms = {i: guesses.room(i, ceilings[i]) for i in pending}
    while pending:
        part = _as_fit(pending, rooms)
        scan = Scan(
            snapshot,
            queries[part],
            ceilings=[ceilings[i] for i in part],
            n_wanted=n_rows[part],
            room=max(rooms[i] for i in part),
            scratch=scratch,
            cancel=cancel,
        )
        for place, i in enumerate(part):
            cancel.check()
            ball = scan.ball(place)
            if ball[-1] < n_rows[i]:  # Guessed too low.
                ceilings[i] = guesses.higher(i, ceilings[i])
                rooms[i] = guesses.room(i, ceilings[i])
                continue
            asked = wanted[i].radius_bits
            threshold_bits = int(ball.searchsorted(n_rows[i])) if asked is None else asked
            if scan.has_all(place, threshold_bits):
                found = _Found(ball, partial(scan.rows, place), snapshot.n_alive)
                pools[i] = _cut(snapshot, wanted[i], found, threshold_bits, cancel)
                pending.remove(i)
            else:  # There was no room for all; now it is known how much it takes.
                ceilings[i] = threshold_bits
                rooms[i] = scan.room_for(place, threshold_bits)
    return [pools[i] for i in range(len(wanted))]


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Rows near a query, wherever they came from."""

    ball: NDArray[np.int64]
    """Rows within each radius, as far as that is known."""
    rows: Callable[[int, int], tuple[NDArray[np.int64], NDArray[np.uint16]]]
    """Takes a radius and how many rows are within it; returns them, ascending, and distances."""
    n_compared: int


def compile_kernels() -> None:
    """Compile now what a search of a large table would have to wait for."""
    for compiled in (hamming.scan, hamming.sample, hamming.find, lists.settle, lists.gather):
        compiled.compile()


def _is_small(snapshot: Snapshot) -> bool:
    return 8 * len(snapshot.words) * snapshot.rows <= _SERIAL_BYTES


def _find_serially(snapshot: Snapshot, wanted: Wanted, scratch: Scratch) -> _Found | None:
    """Search a small table in one call of one thread; None if it has to be done otherwise."""
    n_wanted = 0 if wanted.radius_bits is not None else min(wanted.n_rows, snapshot.n_alive)
    room = min(snapshot.rows, max(4 * n_wanted, _SERIAL_ROOM))
    rows, row_bits = (one[0, 0] for one in scratch.lists(1, 1, room))
    counts = np.empty(snapshot.n_bits + 1, dtype=np.int64)
    radius_bits = hamming.find(
        snapshot.columns,
        wanted.query[np.newaxis],
        _NO_FLAGS if snapshot.dead is None else snapshot.dead,
        snapshot.rows,
        snapshot.n_alive,
        -1 if wanted.radius_bits is None else wanted.radius_bits,
        n_wanted,
        sample_rows(snapshot.rows, n_wanted),
        rows,
        row_bits,
        counts,
    )
    if radius_bits < 0:
        return None
    ball = counts[: radius_bits + 1].cumsum()

    def inside(radius: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        listed, distances = rows[: ball[-1]], row_bits[: ball[-1]]
        if radius == radius_bits:
            return listed.copy(), distances.copy()  # The scratch is the next search's.
        near = distances <= radius
        return listed[near], distances[near]

    return _Found(ball, inside, snapshot.n_alive)


def _from_index(
    snapshot: Snapshot,
    index: MultiIndex,
    wanted: Wanted,
    n_wanted: int,
    scratch: Scratch,
    cancel: Cancel,
) -> Pool | None:
    """Ask an index, and scan what is behind it; None if a scan of all is as fast."""
    allowed_ns = scan_cost_ns(index.rows, wanted.query.shape[0])
    if wanted.radius_bits is not None:
        radius_bits = wanted.radius_bits
        if index.cost_ns(wanted.query, radius_bits) > INDEX_SHARE * allowed_ns:
            return None
        near = index.find(snapshot, wanted.query, radius_bits)
    else:
        # The radius is not known, so all are tried from 0 on, as long as that costs next to nothing
        # beside the scan that may have to come after all.
        spent_ns = 0.0
        for radius_bits in range(snapshot.n_bits + 1):
            spent_ns += index.cost_ns(wanted.query, radius_bits)
            if spent_ns > _TRIAL_SHARE * allowed_ns:
                return None
            near = index.find(snapshot, wanted.query, radius_bits)
            if near.rows.shape[0] >= n_wanted:
                break
        else:
            return None
    room = SPARE_ROWS
    while True:
        rest = Scan(
            snapshot,
            wanted.query[np.newaxis],
            ceilings=[radius_bits],
            n_wanted=np.zeros(1, dtype=np.int64),
            room=room,
            scratch=scratch,
            cancel=cancel,
            first_row=index.rows,
        )
        if rest.has_all(0, radius_bits):
            break
        room = rest.room_for(0, radius_bits)
    ball = near.counts.cumsum() + rest.ball(0)

    def rows(radius: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        inside = near.hamming_bits <= radius
        n_inside = int(np.count_nonzero(inside))
        more_rows, more_bits = rest.rows(0, radius, n - n_inside)
        return (
            np.concatenate([near.rows[inside], more_rows]),
            np.concatenate([near.hamming_bits[inside], more_bits]),
        )

    threshold_bits = radius_bits
    if wanted.radius_bits is None:
        threshold_bits = int(ball.searchsorted(n_wanted))
    found = _Found(ball, rows, near.n_compared + snapshot.rows - index.rows)
    return _cut(snapshot, wanted, found, threshold_bits, cancel)


def _as_fit(pending: list[int], rooms: dict[int, int]) -> list[int]:
    """Return the first of the pending queries, as many as there is memory for, at least one."""
    largest = 0
    part: list[int] = []
    for i in pending:
        largest = max(largest, rooms[i])
        if part and largest * (len(part) + 1) > _MAX_LISTED:
            break
        part.append(i)
    return part


def _cut(
    snapshot: Snapshot, wanted: Wanted, found: _Found, threshold_bits: int, cancel: Cancel
) -> Pool:
    """Make the pool of a ball, cut to what is wanted of it."""
    ball = found.ball[: threshold_bits + 1]
    max_rows = wanted.max_rows
    truncated = False
    edge_bits = threshold_bits
    if max_rows is not None and ball[-1] > max_rows:
        truncated = True
        edge_bits = int(np.searchsorted(ball, max_rows))
    rows, hamming_bits = found.rows(edge_bits, int(ball[edge_bits]))
    if max_rows is not None and rows.shape[0] > max_rows:
        cancel.check()
        at_edge = np.flatnonzero(hamming_bits == edge_bits)
        if wanted.weights is not None:
            asymmetric = margins.distances_to(
                snapshot, rows[at_edge], wanted.query, wanted.weights, cancel
            )
            at_edge = at_edge[_farthest(asymmetric, rows.shape[0] - max_rows)]
        cancel.check()
        surplus = at_edge[max_rows - rows.shape[0] :]
        rows, hamming_bits = np.delete(rows, surplus), np.delete(hamming_bits, surplus)
    histogram = ball.copy()
    histogram[1:] -= ball[:-1]
    return Pool(rows, hamming_bits, threshold_bits, histogram, truncated, found.n_compared)


def _farthest(distances: NDArray[np.uint32], n: int) -> NDArray[np.int64]:
    """Return the positions of the last `n` by (distance, position), in no order; `n` above 0."""
    edge = np.partition(distances, -n)[-n]
    beyond = np.flatnonzero(distances > edge)
    tied = np.flatnonzero(distances == edge)
    return np.concatenate([beyond, tied[beyond.size - n :]])
