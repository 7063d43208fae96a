"""The best few of many, in a total order: a number first, then the id."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


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
