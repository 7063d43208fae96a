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

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from search_service.kernels.compile import (
    I64_IN,
    I64_IN_3D,
    I64_OUT,
    I64_OUT_2D,
    I64_OUT_3D,
    INT64,
    U8_IN,
    U16_IN_3D,
    U16_OUT,
    U16_OUT_3D,
    U64_IN_2D,
    U64_OUT_2D,
    VOID,
    helper,
    kernel,
)

GROUP_ROWS = 64
"""Rows that are compared at a time."""

MAX_WORDS = 8
"""A code has at most so many 64-bit words."""

NEVER = 0xFFFF
"""A distance beyond any."""

_LANES = 8
_VECTORS = GROUP_ROWS // _LANES
BLOCK_GROUPS = 128
_BLOCK_ROWS = BLOCK_GROUPS * GROUP_ROWS
"""Rows that all queries of a batch look at before the next: they stay in the fastest caches."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_WORDS = ir.VectorType(_I64, _LANES)


def _distances(builder: Any, columns: list[Any], words: list[Any], byte: Any, vector: int) -> Any:
    """Emit the distances of eight rows; one column and one word of the query for each word."""
    total = None
    for column, word in zip(columns, words, strict=True):
        address = builder.add(column, builder.add(byte, _I64(vector * _LANES * 8)))
        codes = builder.load(builder.inttoptr(address, _WORDS.as_pointer()), align=8)
        differing = _popcount_vector(builder, builder.xor(codes, _splat(builder, word)))
        total = differing if total is None else builder.add(total, differing)
    return total


def _popcount_vector(builder: Any, vector: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS])
    name = f"llvm.ctpop.v{_LANES}i64"
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), [vector])


def _splat(builder: Any, value: Any) -> Any:
    unused = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(unused, value, _I32(0))
    lanes = ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES)
    return builder.shuffle_vector(first, unused, lanes)


def _any_within(builder: Any, distances: list[Any], ceiling: Any) -> Any:
    """Emit whether a distance is within the ceiling, as 0 or 1."""
    smallest = distances[0]
    for vector in distances[1:]:
        nearer = builder.icmp_unsigned("<", vector, smallest)
        smallest = builder.select(nearer, vector, smallest)
    near = _within(builder, smallest, _splat(builder, ceiling))
    return builder.zext(builder.icmp_unsigned("!=", near, _I8(0)), _I64)


def _members(builder: Any, distances: list[Any], ceiling: Any) -> Any:
    """Emit which distances are within the ceiling, one bit each."""
    limit = _splat(builder, ceiling)
    members = _I64(0)
    for i, vector in enumerate(distances):
        near = builder.zext(_within(builder, vector, limit), _I64)
        members = builder.or_(members, builder.shl(near, _I64(i * _LANES)))
    return members


def _within(builder: Any, vector: Any, limit: Any) -> Any:
    return builder.bitcast(builder.icmp_unsigned("<=", vector, limit), _I8)


def _fixed_width(n_words: int) -> tuple[Any, Any]:
    """Make both intrinsics for codes of so many words, all in registers."""
    columns_type = types.UniTuple(types.int64, n_words)
    query_type = types.UniTuple(types.uint64, n_words)

    def distances(builder: Any, args: Any) -> list[Any]:
        column, word = (list(cgutils.unpack_tuple(builder, args[i], n_words)) for i in (0, 1))
        byte = builder.shl(args[2], _I64(3))
        return [_distances(builder, column, word, byte, i) for i in range(_VECTORS)]

    @intrinsic
    def any_near(typing: Any, columns: Any, query: Any, row: Any, ceiling: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _any_within(builder, distances(builder, args), args[3])

        return types.int64(columns_type, query_type, types.int64, types.int64), generate

    @intrinsic
    def members(typing: Any, columns: Any, query: Any, row: Any, ceiling: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _members(builder, distances(builder, args), args[3])

        return types.uint64(columns_type, query_type, types.int64, types.int64), generate

    return any_near, members


def _any_width() -> tuple[Any, Any]:
    """Make both intrinsics for codes of any number of words, given as addresses."""

    def distances(builder: Any, args: Any) -> list[Any]:
        columns, query, row, n_words = args[:4]
        byte = builder.shl(row, _I64(3))
        sums = [cgutils.alloca_once(builder, _WORDS) for _ in range(_VECTORS)]
        for one in sums:
            builder.store(_WORDS(None), one)
        with cgutils.for_range(builder, n_words) as loop:

            def element(array: Any) -> Any:
                address = builder.add(array, builder.shl(loop.index, _I64(3)))
                return builder.load(builder.inttoptr(address, _I64.as_pointer()))

            column, word = element(columns), element(query)
            for i, one in enumerate(sums):
                some = _distances(builder, [column], [word], byte, i)
                builder.store(builder.add(builder.load(one), some), one)
        return [builder.load(one) for one in sums]

    @intrinsic
    def any_near(
        typing: Any, columns: Any, query: Any, row: Any, n_words: Any, ceiling: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _any_within(builder, distances(builder, args), args[4])

        return types.int64(*[types.int64] * 5), generate

    @intrinsic
    def members(typing: Any, columns: Any, query: Any, row: Any, n_words: Any, ceiling: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _members(builder, distances(builder, args), args[4])

        return types.uint64(*[types.int64] * 5), generate

    return any_near, members


def _define_alive(typing: Any, flags: Any, row: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        group = ir.VectorType(_I8, GROUP_ROWS)
        address = builder.bitcast(builder.gep(array.data, [args[1]]), group.as_pointer())
        alive = builder.icmp_unsigned("==", builder.load(address, align=1), group(None))
        return builder.bitcast(alive, _I64)

    return types.uint64(U8_IN, types.int64), generate


def _define_word_at(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()))

    return types.uint64(types.int64), generate


def _define_popcount(typing: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


def _define_lowest_set_bit(typing: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


# Of each width two: whether any row of a group is within the ceiling, as 0 or 1, and which are, one
# bit each.
_any_near_1, _members_1 = _fixed_width(1)
_any_near_2, _members_2 = _fixed_width(2)
_any_near_n, _members_n = _any_width()

_alive: Any = intrinsic(_define_alive)
"""Which rows of a group are not dead, one bit each."""

word_at: Any = intrinsic(_define_word_at)
popcount: Any = intrinsic(_define_popcount)
_lowest_set_bit: Any = intrinsic(_define_lowest_set_bit)

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
            n += _any_near_1(column, word, row, ceiling)
        for i in range(n):
            members[i] = _members_1(column, word, groups[i], ceiling)
    elif n_words == 2:
        two_columns, two_words = (columns[0], columns[1]), (query[0], query[1])
        for row in range(start, whole, GROUP_ROWS):
            groups[n] = row
            n += _any_near_2(two_columns, two_words, row, ceiling)
        for i in range(n):
            members[i] = _members_2(two_columns, two_words, groups[i], ceiling)
    else:
        all_columns, all_words = columns.ctypes.data, query.ctypes.data
        for row in range(start, whole, GROUP_ROWS):
            groups[n] = row
            n += _any_near_n(all_columns, all_words, row, n_words, ceiling)
        for i in range(n):
            members[i] = _members_n(all_columns, all_words, groups[i], n_words, ceiling)

    n_near = 0
    if dead.shape[0] == 0:
        for i in range(n):
            n_near += popcount(members[i])
    else:
        n_some = 0
        for i in range(n):
            some = members[i] & _alive(dead, groups[i])
            groups[n_some], members[n_some] = groups[i], some
            n_some += 1 if some != 0 else 0
            n_near += popcount(some)

    # Every group listed has a bit set, so the next group comes when the last bit is gone.
    group, left = 0, members[0]
    stored = state[N_STORED]
    has_room = stored + n_near <= rows.shape[0]
    for _ in range(n_near):
        row = groups[group] + _lowest_set_bit(left)
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
            counts[_distance_of(columns, query, row)] += 1


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


@kernel(VOID(I64_IN_3D, I64_IN_3D, I64_OUT_2D, I64_OUT_2D))
def settle(states, counts, balls, summary):  # type: ignore[no-untyped-def]
    """Add up what the parts of a scan found.

    Parameters
    ----------
    states, counts
        As `scan` wrote them.
    balls
        Written: int64, shape ``[n_queries, n_bits + 1]``, rows within each radius; complete up to
        the query's lowest ceiling.
    summary
        Written: int64, shape ``[n_queries, 2]``: the lowest ceiling, and the distance of the
        nearest row that found no room, `NEVER` if all did.
    """
    for q in range(states.shape[1]):
        summary[q, 0] = summary[q, 1] = NEVER
        for part in range(states.shape[0]):
            summary[q, 0] = min(summary[q, 0], states[part, q, CEILING])
            summary[q, 1] = min(summary[q, 1], states[part, q, NEAREST_MISSED])
        within = 0
        for distance in range(counts.shape[2]):
            for part in range(counts.shape[0]):
                within += counts[part, q, distance]
            balls[q, distance] = within


@kernel(INT64(I64_IN_3D, I64_IN_3D, U16_IN_3D, INT64, INT64, I64_OUT, U16_OUT))
def gather(states, rows, row_bits, query, radius_bits, out_rows, out_bits):  # type: ignore[no-untyped-def]
    """Put the parts' lists of one query together, without what is beyond a radius.

    Parameters
    ----------
    states, rows, row_bits
        As `scan` wrote them.
    query
        Which one.
    radius_bits
        Largest distance that is kept.
    out_rows, out_bits
        Written: int64 and uint16, with room for all of them, in row order.

    Returns
    -------
    int
        How many there are.
    """
    n = 0
    for part in range(states.shape[0]):
        listed, distances = rows[part, query], row_bits[part, query]
        for i in range(states[part, query, N_STORED]):
            if distances[i] <= radius_bits:
                out_rows[n] = listed[i]
                out_bits[n] = distances[i]
                n += 1
    return n
