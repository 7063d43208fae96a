"""The fine stage: Euclidean distances between features, inside the pool only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hashlens.types import FeatureDtype
from search_service.cancel import Cancel
from search_service.kernels import euclidean
from search_service.snapshot import Snapshot

_BLOCK_ROWS = 4096
"""Rows between two looks at the cancel flag: milliseconds in memory, a fraction of a second from
disk."""


def distances_to(
    snapshot: Snapshot, rows: NDArray[np.int64], query: NDArray[np.float32], cancel: Cancel
) -> NDArray[np.float32]:
    """Compute the Euclidean distance of a query to each of `rows`.

    Parameters
    ----------
    snapshot
        Where the features are.
    rows
        int64, shape ``[n]``, rows that have a feature; ascending is kindest to the page cache.
    query
        float32, shape ``[dim]``, contiguous.
    cancel
        Polled between blocks.

    Returns
    -------
    ndarray
        float32, shape ``[n]``; see `search_service.kernels.euclidean` for its exact definition.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    addresses = np.array(
        [segment.__array_interface__["data"][0] for segment in snapshot.features], dtype=np.int64
    )
    segment_bits = snapshot.rows_per_segment.bit_length() - 1
    is_half = snapshot.feature_dtype is FeatureDtype.F16
    distances = np.empty(rows.shape[0], dtype=np.float32)
    for lo in range(0, rows.shape[0], _BLOCK_ROWS):
        cancel.check()
        part = slice(lo, lo + _BLOCK_ROWS)
        euclidean.distances(addresses, segment_bits, is_half, rows[part], query, distances[part])
    cancel.check()
    return distances


def with_feature(snapshot: Snapshot, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Tell which of `rows` have a feature: bool, shape ``[n]``; None if all have."""
    if snapshot.has_feature is None:
        return None
    has = snapshot.has_feature[rows].astype(np.bool_)
    return None if has.all() else has
