"""The best few of many, in a total order: a number first, then the id."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from search_service.kernels.compile import (
    I64_IN,
    I64_OUT,
    U8_IN,
    U64_IN,
    U64_STRIDED_IN,
    VOID,
    helper,
    kernel,
)

_ROUND_BYTES = 7
"""Bytes of an id that are compared at once; the eighth says how many there are."""

_FEW = 16
"""So many ids are sorted by insertion."""


def euclidean_keys(
    distances: NDArray[np.float32], hamming_bits: NDArray[np.uint16]
) -> NDArray[np.uint64]:
    """Pack (Euclidean distance, Hamming distance) into integers of the same order.

    The bits of a float32 that is not negative are ordered as the number is.

    Parameters
    ----------
    distances
        float32, shape ``[n]``, 0 to infinity, no NaN.
    hamming_bits
        uint16, shape ``[n]``.

    Returns
    -------
    ndarray
        uint64, shape ``[n]``.
    """
    keys = distances.view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(16)
    keys |= hamming_bits
    return keys


def hamming_keys(
    hamming_bits: NDArray[np.uint16], asymmetric: NDArray[np.uint32]
) -> NDArray[np.uint64]:
    """Pack (Hamming distance, asymmetric distance) into integers of the same order.

    Parameters
    ----------
    hamming_bits
        uint16, shape ``[n]``.
    asymmetric
        uint32, shape ``[n]``.

    Returns
    -------
    ndarray
        uint64, shape ``[n]``.
    """
    keys = hamming_bits.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= asymmetric
    return keys


@helper
def _nth(values, n):  # type: ignore[no-untyped-def]
    """Return the n-th smallest, from 0; reorders `values`."""
    lo, hi = 0, values.shape[0]
    drawn = np.uint64(1)
    while True:
        # Pivots are drawn, so that no order of the values makes this slow.
        pivot = np.uint64(0)
        lower, upper = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0)
        total = np.uint64(0)
        for _ in range(3):
            drawn = drawn * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            value = values[lo + np.int64((drawn >> np.uint64(33)) % np.uint64(hi - lo))]
            lower, upper, total = min(lower, value), max(upper, value), total ^ value
        pivot = total ^ lower ^ upper  # the middle one of the three
        below, at, above = lo, lo, hi
        while at < above:
            value = values[at]
            if value < pivot:
                values[at] = values[below]
                values[below] = value
                below += 1
                at += 1
            elif value > pivot:
                above -= 1
                values[at] = values[above]
                values[above] = value
            else:
                at += 1
        if n < below:
            hi = below
        elif n < above:
            return pivot
        else:
            lo = above


@helper
def _round(data, ends, row, depth):  # type: ignore[no-untyped-def]
    """Return bytes of an id from `depth` on, as a number of the same order.

    Seven bytes, and in the last how many are left, at most eight: it comes after an id that ends
    here, and eight say that there is another round.
    """
    start = np.int64(ends[row - 1]) if row > 0 else 0
    start += depth
    left = np.int64(ends[row]) - start
    number = np.uint64(min(left, _ROUND_BYTES + 1))
    for i in range(min(left, _ROUND_BYTES)):
        number |= np.uint64(data[start + i]) << np.uint64(56 - 8 * i)
    return number


@helper
def _goes_on(number):  # type: ignore[no-untyped-def]
    return number & np.uint64(0xFF) > np.uint64(_ROUND_BYTES)


@helper
def _first_by_id(rows, data, ends, places, n):  # type: ignore[no-untyped-def]
    """Move the `n` first by id to the front of `places`, in no order."""
    numbers = np.empty(places.shape[0], dtype=np.uint64)
    lo, hi, depth = 0, places.shape[0], 0
    while lo < n < hi:  # The cut falls among these, whose ids are the same up to `depth`.
        for i in range(lo, hi):
            numbers[i] = _round(data, ends, rows[places[i]], depth)
        edge = _nth(numbers[lo:hi].copy(), n - lo - 1)
        at = lo
        while at < hi:
            number, place = numbers[at], places[at]
            if number < edge:
                numbers[at], places[at] = numbers[lo], places[lo]
                numbers[lo], places[lo] = number, place
                lo += 1
                at += 1
            elif number > edge:
                hi -= 1
                numbers[at], places[at] = numbers[hi], places[hi]
                numbers[hi], places[hi] = number, place
            else:
                at += 1
        if not _goes_on(edge):
            break
        depth += _ROUND_BYTES


@helper
def _is_before(data, ends, row, other):  # type: ignore[no-untyped-def]
    depth = 0
    while True:
        a, b = _round(data, ends, row, depth), _round(data, ends, other, depth)
        if a != b:
            return a < b
        if not _goes_on(a):
            return False
        depth += _ROUND_BYTES


@helper
def _sort_by_id(rows, data, ends, places, runs):  # type: ignore[no-untyped-def]
    """Sort `places` by id. `runs` is room for what is still to do, int64 ``[n / 2 + 1, 3]``."""
    runs[0, 0], runs[0, 1], runs[0, 2] = 0, places.shape[0], 0
    n_runs = 1
    while n_runs > 0:
        n_runs -= 1
        lo, hi, depth = runs[n_runs, 0], runs[n_runs, 1], runs[n_runs, 2]
        part = places[lo:hi]
        if part.shape[0] <= _FEW:
            for i in range(1, part.shape[0]):
                place, to = part[i], i
                while to > 0 and _is_before(data, ends, rows[place], rows[part[to - 1]]):
                    part[to] = part[to - 1]
                    to -= 1
                part[to] = place
            continue
        numbers = np.empty(part.shape[0], dtype=np.uint64)
        for i in range(part.shape[0]):
            numbers[i] = _round(data, ends, rows[part[i]], depth)
        if numbers.min() != numbers.max():  # else they begin alike, as ids often do
            order = np.argsort(numbers, kind="mergesort")
            part[:] = part[order]
            numbers = numbers[order]
        first = 0
        for i in range(1, part.shape[0] + 1):
            if i == part.shape[0] or numbers[i] != numbers[first]:
                if i - first > 1 and _goes_on(numbers[first]):
                    runs[n_runs, 0], runs[n_runs, 1] = lo + first, lo + i
                    runs[n_runs, 2] = depth + _ROUND_BYTES
                    n_runs += 1
                first = i


@kernel(VOID(U64_IN, I64_IN, U8_IN, U64_STRIDED_IN, I64_OUT))
def nearest(keys, rows, data, ends, chosen):  # type: ignore[no-untyped-def]
    """Choose the smallest by (key, id), in that order.

    Ids compare as bytes, seven at a time, and only where keys are the same: at the edge of the
    answer, where a crowded ball may have 100,000 tied, and inside of it.

    Parameters
    ----------
    keys
        uint64, shape ``[n]``.
    rows
        The row of each key: int64, shape ``[n]``.
    data, ends
        The ids of all rows, see `search_service.snapshot.Texts`.
    chosen
        Written: int64, shape ``[k]``, `k` at most ``n``: positions in `keys`, best first.
    """
    n, k = keys.shape[0], chosen.shape[0]
    if k == n:
        for i in range(n):
            chosen[i] = i
    elif k > 0:
        edge = _nth(keys.copy(), k - 1)
        n_nearer = n_tied = 0
        for i in range(n):
            n_nearer += keys[i] < edge
            n_tied += keys[i] == edge
        tied = np.empty(n_tied, dtype=np.int64)
        n_nearer = n_tied = 0
        for i in range(n):
            if keys[i] < edge:
                chosen[n_nearer] = i
                n_nearer += 1
            elif keys[i] == edge:
                tied[n_tied] = i
                n_tied += 1
        _first_by_id(rows, data, ends, tied, k - n_nearer)
        chosen[n_nearer:] = tied[: k - n_nearer]
    chosen[:] = chosen[np.argsort(keys[chosen], kind="mergesort")]
    runs = np.empty((k // 2 + 1, 3), dtype=np.int64)
    first = 0
    for i in range(1, k + 1):
        if i == k or keys[chosen[i]] != keys[chosen[first]]:
            if i - first > 1:
                _sort_by_id(rows, data, ends, chosen[first:i], runs)
            first = i


def k_smallest(
    keys: NDArray[np.uint64], k: int, ids_of: Callable[[NDArray[np.int64]], list[str]]
) -> tuple[NDArray[np.int64], list[str]]:
    """Choose the `k` smallest by (key, id), in that order.

    Ids compare by code point, which is the order of their UTF-8 bytes. They are asked for only
    where they are needed: for the answer, and for those tied at its edge.

    Parameters
    ----------
    keys
        uint64, shape ``[n]``.
    k
        How many, at least 1.
    ids_of
        Returns the ids of positions in `keys`, int64, shape ``[m]``.

    Returns
    -------
    positions
        int64, shape ``[min(k, n)]``, best first.
    ids
        Their ids.
    """
    n = keys.shape[0]
    if k < n:
        edge = np.partition(keys, k - 1)[k - 1]
        positions = np.flatnonzero(keys < edge)
        tied = np.flatnonzero(keys == edge)
        tied_ids = ids_of(tied)
        taken = sorted(range(tied.size), key=tied_ids.__getitem__)[: k - positions.size]
        ids = ids_of(positions) + [tied_ids[i] for i in taken]
        positions = np.concatenate([positions, tied[taken]])
    else:
        positions = np.arange(n, dtype=np.int64)
        ids = ids_of(positions)
    order = _order(keys[positions], ids)
    return positions[order], [ids[i] for i in order]


def _order(keys: NDArray[np.uint64], ids: list[str]) -> list[int]:
    """Return the order by (key, id); only runs of equal keys look at ids."""
    by_key = np.argsort(keys, kind="stable")
    ordered = keys[by_key]
    order: list[int] = by_key.tolist()
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if order else by_key
    stops = np.r_[starts[1:], len(order)]
    for i in np.flatnonzero(stops - starts > 1):
        run = slice(int(starts[i]), int(stops[i]))
        order[run] = sorted(order[run], key=ids.__getitem__)
    return order
