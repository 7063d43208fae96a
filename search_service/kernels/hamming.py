"""Hamming distances of queries to all codes, of which only the near rows leave the registers.

Codes are compared in groups of `GROUP_ROWS`: eight vectors of eight 64-bit words, a population
count each, the smallest of the eight vectors, one comparison with the query's ceiling. A group
that has no near row costs nothing else, so a pass over the codes is bounded by how fast they can
be read. The distances of the other groups are still in registers then; their near rows are counted
and listed.

The columns of codes come as addresses, because the loop is written out as LLVM vectors: nothing is
checked, the caller vouches for them. See `search_service.snapshot.Snapshot.columns`.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from search_service.kernels.compile import (
    I64_IN,
    I64_OUT,
    I64_OUT_2D,
    I64_OUT_3D,
    INT64,
    U8_IN,
    U16_OUT,
    U16_OUT_3D,
    U64_IN_2D,
    U64_OUT_2D,
    VOID,
    helper,
    kernel,
)
from search_service.kernels.vectors import (
    GROUP_ROWS,
    alive,
    any_near_1,
    any_near_2,
    any_near_n,
    lowest_set_bit,
    members_1,
    members_2,
    members_n,
    popcount,
    word_at,
)

MAX_WORDS = 8
"""A code has at most so many 64-bit words."""

NEVER = 0xFFFF
"""A distance beyond any."""

BLOCK_GROUPS = 128
_BLOCK_ROWS = BLOCK_GROUPS * GROUP_ROWS
"""Rows that all queries of a batch look at before the next: they stay in the fastest caches."""

_SAMPLE_BLOCKS = 16


# What `states` holds for each part and query.
CEILING = 0
"""Rows farther away are of no interest; lowered as enough near ones are found."""
N_STORED = 1
"""How many rows are listed."""
NEAREST_MISSED = 2
"""Distance of the nearest row that found no room; `NEVER` if all did."""
_N_MISSED = 3
N_STATE = 4

_RETRY_ROWS = 4096
"""After so many rows without room it is worth looking again whether the ceiling can be lowered."""


@helper
def _lower_ceiling(n_wanted, state, counts, rows, row_bits):  # type: ignore[no-untyped-def]
    """Forget the farthest rows if the nearer ones alone are enough."""
    within = 0
    for distance in range(state[CEILING]):
        within += counts[distance]
        if within >= n_wanted:
            state[CEILING] = distance
            kept = 0
            for i in range(state[N_STORED]):
                if row_bits[i] <= distance:
                    rows[kept], row_bits[kept] = rows[i], row_bits[i]
                    kept += 1
            state[N_STORED] = kept
            return


@helper
def _take(row, distance, n_wanted, state, counts, rows, row_bits):  # type: ignore[no-untyped-def]
    if distance > state[CEILING]:
        return
    counts[distance] += 1
    if state[N_STORED] == rows.shape[0]:
        if n_wanted > 0 and state[_N_MISSED] % _RETRY_ROWS == 0:
            _lower_ceiling(n_wanted, state, counts, rows, row_bits)
            if distance > state[CEILING]:
                return
        if state[N_STORED] == rows.shape[0]:
            state[_N_MISSED] += 1
            state[NEAREST_MISSED] = min(state[NEAREST_MISSED], distance)
            return
    stored = state[N_STORED]
    rows[stored] = row
    row_bits[stored] = distance
    state[N_STORED] = stored + 1


@helper
def _distance_of(columns, query, row):  # type: ignore[no-untyped-def]
    distance = 0
    for j in range(query.shape[0]):
        distance += popcount(word_at(columns[j] + row * 8) ^ query[j])
    return distance


@helper
def _scan_rows(  # type: ignore[no-untyped-def]
    columns, query, dead, start, stop, n_wanted, state, counts, rows, row_bits, groups, members
):
    """Look at a block of rows with one query; `start` is a multiple of GROUP_ROWS.

    In three steps, none of which has a branch that depends on a row: mispredicting it would take
    longer than looking at the group.
    """
    whole = stop - (stop - start) % GROUP_ROWS
    n_words = query.shape[0]
    ceiling = state[CEILING]
    n = 0
    if n_words == 1:
        column, word = (columns[0],), (query[0],)
        for row in range(start, whole, GROUP_ROWS):
            groups[n] = row
            n += any_near_1(column, word, row, ceiling)
        for i in range(n):
            members[i] = members_1(column, word, groups[i], ceiling)
    elif n_words == 2:
        two_columns, two_words = (columns[0], columns[1]), (query[0], query[1])
        for row in range(start, whole, GROUP_ROWS):
            groups[n] = row
            n += any_near_2(two_columns, two_words, row, ceiling)
        for i in range(n):
            members[i] = members_2(two_columns, two_words, groups[i], ceiling)
    else:
        all_columns, all_words = columns.ctypes.data, query.ctypes.data
        for row in range(start, whole, GROUP_ROWS):
            groups[n] = row
            n += any_near_n(all_columns, all_words, row, n_words, ceiling)
        for i in range(n):
            members[i] = members_n(all_columns, all_words, groups[i], n_words, ceiling)

    n_near = 0
    if dead.shape[0] == 0:
        for i in range(n):
            n_near += popcount(members[i])
    else:
        n_some = 0
        for i in range(n):
            some = members[i] & alive(dead, groups[i])
            groups[n_some], members[n_some] = groups[i], some
            n_some += 1 if some != 0 else 0
            n_near += popcount(some)

    # Every group listed has a bit set, so the next group comes when the last bit is gone.
    group, left = 0, members[0]
    stored = state[N_STORED]
    has_room = stored + n_near <= rows.shape[0]
    for _ in range(n_near):
        row = groups[group] + lowest_set_bit(left)
        distance = _distance_of(columns, query, row)
        if has_room:
            counts[distance] += 1
            rows[stored] = row
            row_bits[stored] = distance
            stored += 1
        else:
            _take(row, distance, n_wanted, state, counts, rows, row_bits)
        left &= left - np.uint64(1)
        is_last = left == 0
        group += 1 if is_last else 0
        left = members[group] if is_last else left
    if has_room:
        state[N_STORED] = stored

    for row in range(whole, stop):
        if dead.shape[0] == 0 or dead[row] == 0:
            distance = _distance_of(columns, query, row)
            _take(row, distance, n_wanted, state, counts, rows, row_bits)


@kernel(
    VOID(
        I64_IN,
        U64_IN_2D,
        U8_IN,
        I64_IN,
        I64_IN,
        I64_IN,
        I64_OUT_3D,
        I64_OUT_3D,
        I64_OUT_3D,
        U16_OUT_3D,
        I64_OUT_2D,
        U64_OUT_2D,
    ),
    parallel=True,
)
def scan(  # type: ignore[no-untyped-def]
    columns,
    queries,
    dead,
    starts,
    stops,
    n_wanted,
    states,
    counts,
    rows,
    row_bits,
    groups,
    members,
):
    """Count and list the rows within each query's ceiling.

    Each part of the rows is looked at by one thread. A query that wants the nearest `n_wanted`
    rows, however far, has its ceiling lowered where a part alone has as many nearer ones: then all
    rows that count are still within it. A part's list is in row order. Where a list is full, rows
    are counted all the same.

    Parameters
    ----------
    columns
        Where each 64-bit word of the codes begins: int64 addresses of uint64 arrays.
    queries
        uint64, shape ``[n_queries, n_words]``.
    dead
        uint8 0/1, one per row, or empty if no row is dead.
    starts, stops
        Rows of each part: int64, shape ``[n_parts]``, `starts` multiples of `GROUP_ROWS`.
    n_wanted
        How many rows each query wants; 0 for all within its ceiling. int64, shape ``[n_queries]``.
    states
        Read and written: int64, shape ``[n_parts, n_queries, N_STATE]``, see `CEILING` and the
        other names. Goes on where another call ended.
    counts
        Added to: int64, shape ``[n_parts, n_queries, n_bits + 1]``, rows at each distance; complete
        up to the part's ceiling.
    rows, row_bits
        Written: int64 and uint16, shape ``[n_parts, n_queries, room]``, the rows listed and their
        distances in bits.
    groups, members
        Working memory: int64 and uint64, shape ``[n_parts, BLOCK_GROUPS + 1]``.
    """
    for part in numba.prange(starts.shape[0]):
        end = stops[part]
        for lo in range(starts[part], end, _BLOCK_ROWS):
            for q in range(queries.shape[0]):
                _scan_rows(
                    columns,
                    queries[q],
                    dead,
                    lo,
                    min(lo + _BLOCK_ROWS, end),
                    n_wanted[q],
                    states[part, q],
                    counts[part, q],
                    rows[part, q],
                    row_bits[part, q],
                    groups[part],
                    members[part],
                )


@helper
def _count_rows(columns, query, dead, start, stop, counts):  # type: ignore[no-untyped-def]
    for row in range(start, stop):
        if dead.shape[0] == 0 or dead[row] == 0:
            # Stored codes are checked at the edge; were padding bits set all the same, this is the
            # one place where a distance could be beyond the counts.
            counts[min(_distance_of(columns, query, row), counts.shape[0] - 1)] += 1


@kernel(INT64(I64_IN, U64_IN_2D, U8_IN, INT64, INT64, INT64, I64_OUT_2D))
def sample(columns, queries, dead, n_rows, n_blocks, block_rows, counts):  # type: ignore[no-untyped-def]
    """Count the alive rows at each distance in a few blocks of rows, evenly spread.

    Parameters
    ----------
    columns, queries, dead
        As for `scan`.
    n_rows
        Rows of the table, at least ``n_blocks * block_rows``.
    n_blocks, block_rows
        How many blocks of how many rows.
    counts
        Added to: int64, shape ``[n_queries, n_bits + 1]``.

    Returns
    -------
    int
        How many alive rows were looked at.
    """
    n_alive = 0
    for block in range(n_blocks):
        start = 0
        if n_blocks > 1:
            start = (n_rows - block_rows) * block // (n_blocks - 1)
        stop = start + block_rows
        for q in range(queries.shape[0]):
            _count_rows(columns, queries[q], dead, start, stop, counts[q])
        if dead.shape[0] == 0:
            n_alive += block_rows
        else:
            for row in range(start, stop):
                n_alive += 1 - dead[row]
    return n_alive


@kernel(
    INT64(
        I64_IN,
        U64_IN_2D,
        U8_IN,
        INT64,
        INT64,
        INT64,
        INT64,
        INT64,
        I64_OUT,
        U16_OUT,
        I64_OUT,
    )
)
def find(  # type: ignore[no-untyped-def]
    columns,
    query,
    dead,
    n_rows,
    n_alive,
    radius_bits,
    n_wanted,
    n_sampled,
    rows,
    row_bits,
    counts,
):
    """Do the whole of a small search in one call, on one thread: guess, scan, list.

    Parameters
    ----------
    columns, dead
        As for `scan`.
    query
        uint64, shape ``[1, n_words]``.
    n_rows, n_alive
        Rows of the table, and how many of them are not dead.
    radius_bits
        Largest distance listed; -1 for the smallest within which there are `n_wanted` rows.
    n_wanted
        See `radius_bits`; at most `n_alive`.
    n_sampled
        How many rows to guess that radius from.
    rows, row_bits
        Written: int64 and uint16, the rows within the radius, ascending, and their distances.
    counts
        Written: int64, shape ``[n_bits + 1]``, rows at each distance, complete up to the radius.

    Returns
    -------
    int
        The radius; -1 if the guess was too low or there was no room for all.
    """
    n_bits = counts.shape[0] - 1
    counts[:] = 0
    ceiling = radius_bits
    if radius_bits < 0:
        ceiling = 0
        if n_wanted > 0:
            ceiling = _guess(columns, query[0], dead, n_rows, n_alive, n_wanted, n_sampled, n_bits)
    state = np.zeros(N_STATE, dtype=np.int64)
    state[CEILING] = ceiling
    state[NEAREST_MISSED] = NEVER
    groups = np.empty(BLOCK_GROUPS + 1, dtype=np.int64)
    members = np.empty(BLOCK_GROUPS + 1, dtype=np.uint64)
    at_least = n_wanted if radius_bits < 0 else 0
    for lo in range(0, n_rows, _BLOCK_ROWS):
        hi = min(lo + _BLOCK_ROWS, n_rows)
        _scan_rows(
            columns,
            query[0],
            dead,
            lo,
            hi,
            at_least,
            state,
            counts,
            rows,
            row_bits,
            groups,
            members,
        )
    radius = radius_bits
    if radius_bits < 0:
        radius, within = 0, counts[0]
        while within < n_wanted and radius < state[CEILING]:
            radius += 1
            within += counts[radius]
        if within < n_wanted:
            return -1
    if state[NEAREST_MISSED] <= radius:
        return -1
    kept = 0
    for i in range(state[N_STORED]):
        if row_bits[i] <= radius:
            rows[kept], row_bits[kept] = rows[i], row_bits[i]
            kept += 1
    return radius


@helper
def _guess(columns, query, dead, n_rows, n_alive, n_wanted, n_sampled, n_bits):  # type: ignore[no-untyped-def]
    """Return a radius that most probably holds `n_wanted` rows, from a few blocks of rows."""
    counts = np.zeros(n_bits + 1, dtype=np.int64)
    n_blocks = _SAMPLE_BLOCKS if n_rows > 2 * n_sampled else 1
    block_rows = n_sampled // _SAMPLE_BLOCKS if n_blocks > 1 else n_rows
    for block in range(n_blocks):
        start = (n_rows - block_rows) * block // max(n_blocks - 1, 1)
        _count_rows(columns, query, dead, start, start + block_rows, counts)
    looked_at = counts.sum()
    expected = n_wanted * looked_at / n_alive
    if looked_at < n_alive:
        expected += 3 * math.sqrt(expected) + 2
    radius, within = 0, counts[0]
    while within < expected and radius < n_bits:
        radius += 1
        within += counts[radius]
    return radius
