"""Distances to the last bit of what the search service computes, where the order hangs on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 32
"""Running sums of a distance, part of its definition: `search_service.kernels.euclidean`."""

_BLOCK_ROWS = 4096


def served_distances(
    features: NDArray[np.float16], queries: NDArray[np.float16]
) -> NDArray[np.float32]:
    """Compute Euclidean distances in the order of additions that the search service defines.

    Parameters
    ----------
    features, queries
        Shape ``[n, dim]`` both: the distance of row i of one to row i of the other.

    Returns
    -------
    ndarray
        float32, shape ``[n]``.
    """
    n, dim = features.shape
    distances = np.empty(n, dtype=np.float32)
    padded = np.zeros((min(n, _BLOCK_ROWS), -(-dim // LANES) * LANES), dtype=np.float32)
    for lo in range(0, n, _BLOCK_ROWS):
        part = slice(lo, lo + _BLOCK_ROWS)
        squares = padded[: len(features[part])]
        np.subtract(features[part], queries[part], out=squares[:, :dim], dtype=np.float32)
        squares *= squares
        lanes = np.zeros((len(squares), LANES), dtype=np.float32)
        for first in range(0, squares.shape[1], LANES):
            lanes += squares[:, first : first + LANES]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        np.sqrt(lanes[:, 0], out=distances[part])
    return distances


def tolerance(dim: int) -> float:
    """Return how close, as a share, distances are whose order rounding may turn round.

    Each addition in float32 may be off by half a unit in the last place, and so may the difference
    and the square; the root halves what it adds up to, and two distances may err apart.
    """
    return float((-(-dim // LANES) + 8) * np.finfo(np.float32).eps / 2)
