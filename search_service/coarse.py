"""The coarse stage: a query's code to the pool of rows within a Hamming radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numba
import numpy as np
from numpy.typing import NDArray

from search_service import margins
from search_service.cancel import Cancel
from search_service.kernels import hamming
from search_service.multi_index import MultiIndex, scan_cost_ns
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

_SPARE_ROWS = 1024
"""Room for so many rows more than a thread is expected to list."""

_MAX_LISTED = 1 << 23
"""Most rows that a thread has room for at a time; a batch that takes more is cut."""

_INDEX_SHARE = 0.5
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
            self._rows = np.empty(n, dtype=np.int64)
            self._row_bits = np.empty(n, dtype=np.uint16)
        shape = (n_parts, n_queries, room)
        return self._rows[:n].reshape(shape), self._row_bits[:n].reshape(shape)


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
    guesses = _Guesses(snapshot, queries, n_rows)
    ceilings = [
        guesses.ceiling(i, int(n_rows[i])) if one.radius_bits is None else one.radius_bits
        for i, one in enumerate(wanted)
    ]
    rooms = {i: guesses.room(i, ceilings[i]) for i in pending}
    while pending:
        part = _as_fit(pending, rooms)
        scan = _Scan(
            snapshot,
            queries[part],
            ceilings=[ceilings[i] for i in part],
            n_wanted=n_rows[part],
            room=max(rooms[i] for i in part),
            scratch=scratch,
            cancel=cancel,
        )
        for place, i in enumerate(part):
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
        if index.cost_ns(wanted.query, radius_bits) > _INDEX_SHARE * allowed_ns:
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
    room = _SPARE_ROWS
    while True:
        rest = _Scan(
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


class _Guesses:
    """What a few rows tell of where the nearest ones are.

    A wrong guess costs time and never an answer: what is too high lists rows that are not wanted,
    what is too low is noticed.
    """

    def __init__(
        self, snapshot: Snapshot, queries: NDArray[np.uint64], n_wanted: NDArray[np.int64]
    ) -> None:
        rows = snapshot.rows
        fewest, most = _SAMPLE_ROWS
        fewest_wanted = min((n for n in n_wanted.tolist() if n > 0), default=rows)
        n_sampled = min(max(_SAMPLE_NEAR * rows // max(fewest_wanted, 1), fewest), most)
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
        return int(min(found, self._n_alive)) // numba.get_num_threads() + _SPARE_ROWS


class _Scan:
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
        n_queries, n_parts = queries.shape[0], numba.get_num_threads()
        self._states = np.zeros((n_parts, n_queries, hamming.N_STATE), dtype=np.int64)
        self._states[:, :, hamming.CEILING] = ceilings
        self._states[:, :, hamming.NEAREST_MISSED] = hamming.NEVER
        self._counts = np.zeros((n_parts, n_queries, snapshot.n_bits + 1), dtype=np.int64)
        self._rows, self._row_bits = scratch.lists(n_parts, n_queries, room)
        self._run(snapshot, queries, n_wanted, cancel)
        self._balls = np.empty((n_queries, snapshot.n_bits + 1), dtype=np.int64)
        self._summary = np.empty((n_queries, 2), dtype=np.int64)
        hamming.settle(self._states, self._counts, self._balls, self._summary)

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
        """Return the `n` rows within a radius, and their distances."""
        rows = np.empty(n, dtype=np.int64)
        row_bits = np.empty(n, dtype=np.uint16)
        found = hamming.gather(
            self._states, self._rows, self._row_bits, query, radius_bits, rows, row_bits
        )
        assert found == n, "scan counts and lists differently"
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
        n_groups = (snapshot.rows - first_row) // hamming.GROUP_ROWS
        edges = [
            first_row + n_groups * part // n_parts * hamming.GROUP_ROWS for part in range(n_parts)
        ]
        edges.append(snapshot.rows)
        groups = np.empty((n_parts, hamming.BLOCK_GROUPS + 1), dtype=np.int64)
        members = np.empty((n_parts, hamming.BLOCK_GROUPS + 1), dtype=np.uint64)
        dead = _NO_FLAGS if snapshot.dead is None else snapshot.dead
        step = max(_SCAN_ROWS // queries.shape[0] // hamming.GROUP_ROWS, 1) * hamming.GROUP_ROWS
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
        at_edge = np.flatnonzero(hamming_bits == edge_bits)
        if wanted.weights is not None:
            asymmetric = margins.distances_to(
                snapshot, rows[at_edge], wanted.query, wanted.weights, cancel
            )
            at_edge = at_edge[_farthest(asymmetric, rows.shape[0] - max_rows)]
        surplus = at_edge[max_rows - rows.shape[0] :]
        rows, hamming_bits = np.delete(rows, surplus), np.delete(hamming_bits, surplus)
    histogram = np.diff(ball, prepend=0)
    return Pool(rows, hamming_bits, threshold_bits, histogram, truncated, found.n_compared)


def _farthest(distances: NDArray[np.uint32], n: int) -> NDArray[np.int64]:
    """Return the positions of the last `n` by (distance, position), in no order; `n` above 0."""
    edge = np.partition(distances, -n)[-n]
    beyond = np.flatnonzero(distances > edge)
    tied = np.flatnonzero(distances == edge)
    return np.concatenate([beyond, tied[beyond.size - n :]])
