"""Multi-index hashing: rows by the value of each substring of their code.

A code is cut into `m` substrings. If two codes differ in at most ``r = m * a + b`` bits, then one
of the first ``b + 1`` substrings differs in at most `a`, or one of the others in at most ``a - 1``:
were it not so, the codes would differ in ``(b + 1)(a + 1) + (m - b - 1) a = r + 1`` bits at least.
So the rows under a few values of each substring are all that can be near. Source: Norouzi, Punjani,
Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012, section 3.

Each table lists rows by value: ``rows[starts[v] : starts[v + 1]]`` are those whose substring is
`v`, ascending, counted from the first row that is indexed.
"""

from __future__ import annotations

import numpy as np
from numba import types

from search_service.kernels.compile import (
    I64_IN,
    I64_OUT,
    INT64,
    U8_IN,
    U16_OUT,
    U64_IN,
    VOID,
    helper,
    kernel,
)
from search_service.kernels.vectors import popcount, word_at

_U32_OUT = types.Array(types.uint32, 1, "C")
_U32_IN = types.Array(types.uint32, 1, "C", readonly=True)
_U32_IN_2D = types.Array(types.uint32, 2, "C", readonly=True)


@helper
def _substring(columns, row, first_bit, width):  # type: ignore[no-untyped-def]
    word, offset = first_bit // 64, first_bit % 64
    value = word_at(columns[word] + row * 8) >> np.uint64(offset)
    if offset + width > 64:
        value |= word_at(columns[word + 1] + row * 8) << np.uint64(64 - offset)
    return np.int64(value & np.uint64((1 << width) - 1))


@helper
def _substring_of(query, first_bit, width):  # type: ignore[no-untyped-def]
    word, offset = first_bit // 64, first_bit % 64
    value = query[word] >> np.uint64(offset)
    if offset + width > 64:
        value |= query[word + 1] << np.uint64(64 - offset)
    return np.int64(value & np.uint64((1 << width) - 1))


@kernel(VOID(I64_IN, INT64, INT64, INT64, INT64, _U32_OUT))
def count(columns, first_bit, width, start, stop, starts):  # type: ignore[no-untyped-def]
    """Count rows by the value of a substring.

    Parameters
    ----------
    columns
        Addresses of the codes' words, see `search_service.kernels.hamming.scan`.
    first_bit, width
        The substring, at most 32 bits wide.
    start, stop
        Which rows.
    starts
        Added to: uint32, shape ``[2**width + 2]``; those with value `v` at ``v + 2``.
    """
    for row in range(start, stop):
        starts[_substring(columns, row, first_bit, width) + 2] += np.uint32(1)


@kernel(VOID(_U32_OUT))
def add_up(starts):  # type: ignore[no-untyped-def]
    """Turn counts into where each value's rows begin, one place further on, as `place` needs it."""
    total = np.uint32(0)
    for i in range(starts.shape[0]):
        total += starts[i]
        starts[i] = total


@kernel(VOID(I64_IN, INT64, INT64, INT64, INT64, INT64, _U32_OUT, _U32_OUT))
def place(columns, first_bit, width, base, start, stop, starts, rows):  # type: ignore[no-untyped-def]
    """List rows by the value of a substring.

    Parameters
    ----------
    columns, first_bit, width, start, stop
        As for `count`.
    base
        The first row that is indexed.
    starts
        As `add_up` left it; when all rows are placed, value `v` begins at ``starts[v]``.
    rows
        Written: uint32, one for each row.
    """
    for row in range(start, stop):
        slot = _substring(columns, row, first_bit, width) + 1
        rows[starts[slot]] = np.uint32(row - base)
        starts[slot] += np.uint32(1)


@kernel(INT64(U64_IN, I64_IN, I64_IN, I64_IN, _U32_IN, _U32_IN_2D))
def n_candidates(query, first_bits, widths, n_flips, flips, starts):  # type: ignore[no-untyped-def]
    """Count the rows that `find` would look at, without looking at them.

    Parameters
    ----------
    query
        uint64, shape ``[n_words]``.
    first_bits, widths
        The substrings: int64, shape ``[m]``.
    n_flips
        How many of `flips` to try for each: int64, shape ``[m]``.
    flips
        Values to differ by, those with fewer bits set first: uint32.
    starts
        Where each value's rows begin: uint32, shape ``[m, >= 2**width + 1]``.
    """
    total = np.int64(0)
    for table in range(first_bits.shape[0]):
        value = _substring_of(query, first_bits[table], widths[table])
        for i in range(n_flips[table]):
            if flips[i] >> np.uint32(widths[table]) == 0:
                near = value ^ np.int64(flips[i])
                total += np.int64(starts[table, near + 1]) - np.int64(starts[table, near])
    return total


@kernel(
    INT64(
        I64_IN,
        U64_IN,
        U8_IN,
        INT64,
        INT64,
        I64_IN,
        I64_IN,
        I64_IN,
        I64_IN,
        _U32_IN,
        _U32_IN_2D,
        _U32_IN_2D,
        I64_OUT,
        U16_OUT,
        I64_OUT,
    )
)
def find(  # type: ignore[no-untyped-def]
    columns,
    query,
    dead,
    base,
    radius_bits,
    first_bits,
    widths,
    n_flips,
    reaches,
    flips,
    starts,
    rows,
    out_rows,
    out_bits,
    counts,
):
    """List the indexed rows within a radius, each once, in no order.

    Parameters
    ----------
    columns, dead
        As for `search_service.kernels.hamming.scan`.
    query, first_bits, widths, n_flips, flips, starts
        As for `n_candidates`.
    base
        The first row that is indexed.
    radius_bits
        Largest distance listed.
    reaches
        How many bits the flips of each substring have at most; -1 for a substring without any.
    rows
        Rows by value: uint32, shape ``[m, n_indexed]``.
    out_rows, out_bits
        Written: int64 and uint16, with room for all candidates.
    counts
        Added to: int64, shape ``[> radius_bits]``, rows at each distance.

    Returns
    -------
    int
        How many are listed.
    """
    n = 0
    for table in range(first_bits.shape[0]):
        value = _substring_of(query, first_bits[table], widths[table])
        for i in range(n_flips[table]):
            if flips[i] >> np.uint32(widths[table]) != 0:
                continue
            near = value ^ np.int64(flips[i])
            for j in range(starts[table, near], starts[table, near + 1]):
                row = base + np.int64(rows[table, j])
                distance = 0
                for w in range(query.shape[0]):
                    distance += popcount(word_at(columns[w] + row * 8) ^ query[w])
                if distance > radius_bits or (dead.shape[0] > 0 and dead[row] != 0):
                    continue
                is_new = True
                for earlier in range(table):
                    first_bit, width = first_bits[earlier], widths[earlier]
                    differing = _substring(columns, row, first_bit, width) ^ _substring_of(
                        query, first_bit, width
                    )
                    if popcount(np.uint64(differing)) <= reaches[earlier]:
                        is_new = False
                        break
                if is_new:
                    out_rows[n] = row
                    out_bits[n] = distance
                    counts[distance] += 1
                    n += 1
    return n
