"""Byte strings of chosen rows, such as ids and payloads, one after the other."""

from __future__ import annotations

import numpy as np

from search_service.kernels.compile import (
    I64_IN,
    INT64,
    U8_IN,
    U8_OUT,
    U32_OUT,
    U64_STRIDED_IN,
    VOID,
    kernel,
)


@kernel(INT64(U64_STRIDED_IN, I64_IN, U32_OUT))
def measure(ends, rows, taken_ends):  # type: ignore[no-untyped-def]
    """Find out where each string of `rows` will end, and how many bytes they take.

    Parameters
    ----------
    ends
        Where the strings of all rows end, uint64, shape ``[n]``.
    rows
        int64, shape ``[m]``, each below ``n``.
    taken_ends
        Written: uint32, shape ``[m]``; right only if the result fits.

    Returns
    -------
    int
        The sum of their lengths.
    """
    total = np.int64(0)
    for i in range(rows.shape[0]):
        row = rows[i]
        total += np.int64(ends[row]) - (np.int64(ends[row - 1]) if row > 0 else 0)
        taken_ends[i] = np.uint32(total)
    return total


@kernel(VOID(U8_IN, U64_STRIDED_IN, I64_IN, U8_OUT))
def take(data, ends, rows, taken):  # type: ignore[no-untyped-def]
    """Copy the strings of `rows`.

    Parameters
    ----------
    data
        The strings of all rows: uint8.
    ends, rows
        As for `measure`.
    taken
        Written: uint8, as long as `measure` returned.
    """
    at = 0
    for i in range(rows.shape[0]):
        row = rows[i]
        start = np.int64(ends[row - 1]) if row > 0 else 0
        part = data[start : np.int64(ends[row])]
        into = taken[at : at + part.shape[0]]
        for j in range(into.shape[0]):
            into[j] = part[j]
        at += part.shape[0]
