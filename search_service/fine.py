"""The fine stage: Euclidean distances between features, inside the pool only."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from hashlens.types import FeatureDtype
from search_service import readahead
from search_service import sketch as sketches
from search_service.cancel import Cancel
from search_service.kernels import euclidean
from search_service.readahead import Place
from search_service.sketch import Sketch
from search_service.snapshot import Snapshot

_BLOCK_BYTES = 1 << 24
"""Read between two looks at the cancel flag: milliseconds in memory; less from disk."""


def rank(
    snapshot: Snapshot,
    rows: NDArray[np.int64],
    hamming_bits: NDArray[np.uint16],
    query: NDArray[np.float32],
    k: int,
    cancel: Cancel,
    sketch: Sketch | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.uint16], NDArray[np.float32]]:
    """Compute the distances of all rows that may be among the `k` nearest.

    Parameters
    ----------
    snapshot
        Where the features are.
    rows
        int64, shape ``[n]``, ascending, rows that have a feature.
    hamming_bits
        uint16, shape ``[n]``; passed through.
    query
        float32, shape ``[dim]``, finite, contiguous.
    k
        At least 1.
    cancel
        Polled between blocks.
    sketch
        Of the snapshot's table, of any number of its first rows: it saves reading those that it
        proves to be too far. None: all are read.

    Returns
    -------
    rows, hamming_bits, distances
        Shape ``[m]``, ascending by row: the `k` nearest, all that are as far as the last of them,
        and maybe others. Distances are those of `distances_to`, bit for bit, with or without a
        sketch.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    n_known = 0 if sketch is None else int(np.searchsorted(rows, sketch.rows))
    place = Place.of(snapshot)
    if sketch is None or not _is_worth_it(snapshot, place, rows[:n_known], k):
        return rows, hamming_bits, _distances(snapshot, place, rows, query, cancel)
    near, least = sketch.bounds(rows[:n_known], query, cancel)
    # The k that seem nearest, and what the sketch does not know, set the distance to beat.
    exact = np.full(rows.shape[0], np.inf, dtype=np.float32)
    chosen = np.zeros(rows.shape[0], dtype=np.bool_)
    chosen[np.argpartition(near, k - 1)[:k]] = True
    chosen[n_known:] = True
    exact[chosen] = _distances(snapshot, place, rows[chosen], query, cancel)
    to_beat = float(np.partition(exact[chosen], k - 1)[k - 1])
    more = np.flatnonzero((least <= to_beat) & ~chosen[:n_known])
    exact[more] = _distances(snapshot, place, rows[more], query, cancel)
    chosen[more] = True
    return rows[chosen], hamming_bits[chosen], exact[chosen]


def _is_worth_it(snapshot: Snapshot, place: Place, rows: NDArray[np.int64], k: int) -> bool:
    """Tell whether asking a sketch about `rows` is likely to be faster than reading them.

    Up to twice `k` of them are read as well, where features are no more alike than noise is. In
    memory it has to save that much again, because two short passes are slower than a long one.
    """
    saved_bytes = place.row_bytes - sketches.row_bytes(snapshot.dim)
    n = rows.shape[0]
    if n * saved_bytes >= 4 * k * place.row_bytes:
        return True
    return n >= 2 * k and readahead.is_cold(place, rows)


def distances_to(
    snapshot: Snapshot, rows: NDArray[np.int64], query: NDArray[np.float32], cancel: Cancel
) -> NDArray[np.float32]:
    """Compute the Euclidean distance of a query to each of `rows`.

    Parameters
    ----------
    snapshot
        Where the features are.
    rows
        int64, shape ``[n]``, rows that have a feature, ascending. Those on disk are read ahead.
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
    return _distances(snapshot, Place.of(snapshot), rows, query, cancel)


def _distances(
    snapshot: Snapshot,
    place: Place,
    rows: NDArray[np.int64],
    query: NDArray[np.float32],
    cancel: Cancel,
) -> NDArray[np.float32]:
    is_half = snapshot.feature_dtype is FeatureDtype.F16
    distances = np.empty(rows.shape[0], dtype=np.float32)
    block_rows = max(1, _BLOCK_BYTES // place.row_bytes)
    with closing(readahead.blocks(place, rows, block_rows, cancel)) as parts:
        for part in parts:
            euclidean.distances(
                place.addresses, place.segment_bits, is_half, rows[part], query, distances[part]
            )
    cancel.check()
    return distances
