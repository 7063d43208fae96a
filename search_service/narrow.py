"""Large pools made small, a block at a time, so that nobody who has left is worked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search_service.cancel import Cancel
from search_service.kernels import select
from search_service.snapshot import Texts

BLOCK_ROWS = 1 << 18
"""Rows that are compared between two looks at the cancel flag: a few milliseconds."""

_CHOSEN_ROWS = 1 << 15
"""Rows of which the best are chosen between two looks, by their ids where all tie."""


def within(hamming_bits: NDArray[np.uint16], radius_bits: int, cancel: Cancel) -> NDArray[np.int64]:
    """Return the positions of distances up to a radius, ascending.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says; polled between blocks.
    """
    found = []
    for lo in range(0, hamming_bits.shape[0], BLOCK_ROWS):
        cancel.check()
        found.append(np.flatnonzero(hamming_bits[lo : lo + BLOCK_ROWS] <= radius_bits) + lo)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def nearest(
    keys: NDArray[np.uint64],
    rows: NDArray[np.int64],
    ids: Texts,
    k: int,
    cancel: Cancel,
) -> NDArray[np.int64]:
    """Choose the smallest by (key, id), in that order.

    What is not among the best of its block is not among the best of all.

    Parameters
    ----------
    keys
        uint64, shape ``[n]``.
    rows
        The row of each key: int64, shape ``[n]``.
    ids
        Of all rows.
    k
        How many, at least 1.
    cancel
        Polled between blocks.

    Returns
    -------
    ndarray
        int64, shape ``[min(k, n)]``: positions in `keys`, best first.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    block_rows = max(_CHOSEN_ROWS, 4 * k)
    positions = np.arange(keys.shape[0], dtype=np.int64)
    while positions.shape[0] > 2 * block_rows:
        best = []
        for lo in range(0, positions.shape[0], block_rows):
            cancel.check()
            some = positions[lo : lo + block_rows]
            best.append(some[np.sort(_chosen(keys[some], rows[some], ids, k))])
        positions = np.concatenate(best)
    cancel.check()
    if positions.shape[0] == keys.shape[0]:
        return _chosen(keys, rows, ids, k)
    return positions[_chosen(keys[positions], rows[positions], ids, k)]


def _chosen(
    keys: NDArray[np.uint64], rows: NDArray[np.int64], ids: Texts, k: int
) -> NDArray[np.int64]:
    chosen = np.empty(min(k, rows.shape[0]), dtype=np.int64)
    select.nearest(keys, rows, ids.data, ids.ends, chosen)
    return chosen
