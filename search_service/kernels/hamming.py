"""Hamming distances of one query to all codes, and which rows are near.

The distances are computed in blocks that stay in the L1 cache. Beside each row's distance goes the
smallest of every `GROUP_ROWS` rows: whoever looks for near rows later skips a group at one glance,
which makes counting and collecting nearly free.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from search_service.kernels.compile import (
    I64_OUT,
    I64_OUT_2D,
    INT64,
    U8_IN,
    U16_IN,
    U16_OUT,
    U64_IN,
    VOID,
    helper,
    kernel,
)

GROUP_ROWS = 64
"""Rows that share one entry of `nearest`."""

MAX_WORDS = 8
"""A code has at most so many 64-bit words."""

DEAD = 0xFFFF
"""The distance of a dead row: farther than any."""

_BLOCK_ROWS = 4096  # 8 KiB of distances; a multiple of GROUP_ROWS


def _define_popcount(typing: Any, word: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


def _define_smallest_of_group(typing: Any, values: Any, start: Any) -> Any:
    group = ir.VectorType(ir.IntType(16), GROUP_ROWS)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        address = builder.bitcast(builder.gep(array.data, [args[1]]), group.as_pointer())
        smallest = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.umin.v{GROUP_ROWS}i16",
            fnty=ir.FunctionType(group.element, [group]),
        )
        return builder.call(smallest, [builder.load(address, align=2)])

    return types.uint16(U16_OUT, types.int64), generate


_popcount: Any = intrinsic(_define_popcount)
"""Count the set bits of a uint64."""

_smallest_of_group: Any = intrinsic(_define_smallest_of_group)
"""Return the smallest of GROUP_ROWS numbers, by vector; LLVM makes a poor job of the loop."""


@helper
def _scan_block(words, n_words, query, dead, lo, hi, distances, nearest):  # type: ignore[no-untyped-def]
    # Slices first: indexing with an offset keeps Numba's test for negative indices in the loop,
    # and with it the loop out of the vector unit.
    block = distances[lo:hi]
    column = words[0][lo:hi]
    word = query[0]
    for i in range(block.shape[0]):
        block[i] = _popcount(column[i] ^ word)
    for j in range(1, n_words):
        column = words[j][lo:hi]
        word = query[j]
        for i in range(block.shape[0]):
            block[i] += np.uint16(_popcount(column[i] ^ word))
    if dead.shape[0] > 0:
        flags = dead[lo:hi]
        for i in range(block.shape[0]):
            block[i] |= -np.uint16(flags[i])
    first = lo // GROUP_ROWS
    n_whole = block.shape[0] // GROUP_ROWS
    for group in range(n_whole):
        nearest[first + group] = _smallest_of_group(block, group * GROUP_ROWS)
    rest = block[n_whole * GROUP_ROWS :]
    if rest.shape[0] > 0:
        nearest[first + n_whole] = rest.min()


@kernel(
    VOID(types.UniTuple(U64_IN, MAX_WORDS), INT64, U64_IN, U8_IN, U16_OUT, U16_OUT), parallel=True
)
def scan(words, n_words, query, dead, distances, nearest):  # type: ignore[no-untyped-def]
    """Compute the Hamming distance of a query to every row.

    Parameters
    ----------
    words
        Codes by 64-bit word: eight uint64 arrays, shape ``[rows]``; those after `n_words` are not
        read.
    n_words
        Words per code.
    query
        uint64, shape ``[n_words]``.
    dead
        uint8 0/1, shape ``[rows]``, or empty if no row is dead.
    distances
        Written: uint16, shape ``[rows]``, in bits; `DEAD` for a dead row.
    nearest
        Written: uint16, shape ``[ceil(rows / GROUP_ROWS)]``, the smallest distance of each group.
    """
    rows = distances.shape[0]
    for block in numba.prange((rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS):
        lo = block * _BLOCK_ROWS
        hi = min(rows, lo + _BLOCK_ROWS)
        _scan_block(words, n_words, query, dead, lo, hi, distances, nearest)


@helper
def _tally_groups(distances, nearest, ceiling_bits, first, stop, counts):  # type: ignore[no-untyped-def]
    for group in range(first, stop):
        if nearest[group] <= ceiling_bits:
            members = distances[group * GROUP_ROWS : (group + 1) * GROUP_ROWS]
            for i in range(members.shape[0]):
                if members[i] <= ceiling_bits:
                    counts[members[i]] += 1


@kernel(VOID(U16_IN, U16_IN, INT64, I64_OUT_2D), parallel=True)
def tally(distances, nearest, ceiling_bits, counts):  # type: ignore[no-untyped-def]
    """Count the rows at each distance up to a ceiling.

    Parameters
    ----------
    distances, nearest
        As `scan` wrote them.
    ceiling_bits
        Rows farther away are not counted.
    counts
        Added to: int64, shape ``[n_parts, > ceiling_bits]``. Each part of the rows is counted by
        one thread; the sum over parts does not depend on their number.
    """
    n_groups = nearest.shape[0]
    n_parts = counts.shape[0]
    for part in numba.prange(n_parts):
        first = n_groups * part // n_parts
        stop = n_groups * (part + 1) // n_parts
        _tally_groups(distances, nearest, ceiling_bits, first, stop, counts[part])


@kernel(INT64(U16_IN, U16_IN, INT64, I64_OUT, U16_OUT))
def collect(distances, nearest, radius_bits, rows, row_distances):  # type: ignore[no-untyped-def]
    """List the rows within a radius, in row order.

    Parameters
    ----------
    distances, nearest
        As `scan` wrote them.
    radius_bits
        Largest distance listed.
    rows
        Written: int64, with room for all of them (see `tally`).
    row_distances
        Written: uint16, same shape, the rows' distances in bits.

    Returns
    -------
    int
        How many were listed.
    """
    n_found = 0
    for group in range(nearest.shape[0]):
        if nearest[group] <= radius_bits:
            lo = group * GROUP_ROWS
            members = distances[lo : lo + GROUP_ROWS]
            for i in range(members.shape[0]):
                if members[i] <= radius_bits:
                    rows[n_found] = lo + i
                    row_distances[n_found] = members[i]
                    n_found += 1
    return n_found
