"""Codes that no label has taught: the floor for learned ones, from the same features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashlens import codes

ITQ_ROWS = 10_000
"""Rows that ITQ learns from, drawn where there are more."""

ITQ_ITERATIONS = 50
"""Turns of the rotation, as in the paper."""

_BLOCK_ROWS = 4096
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16

_LEAST_SPREAD = 1e-5
"""A direction whose singular value is less of the largest one's holds rounding errors only."""


@dataclass(frozen=True, slots=True, eq=False)
class Hyperplanes:
    """Bit i tells on which side of plane i a feature lies; all planes go through `centre`."""

    centre: NDArray[np.float32]
    """Shape ``[dim]``."""
    normals: NDArray[np.float32]
    """Shape ``[dim, n_bits]``."""
    n_filled: int = 0
    """The last so many planes are random, for want of directions to learn."""

    def encode(self, features: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return packed codes, uint8 ``[n, n_bytes]``, of features ``[n, dim]``."""
        parts = [
            codes.pack((block.astype(np.float32) - self.centre) @ self.normals > 0)
            for block in _blocks(features)
        ]
        return np.concatenate(parts)


def lsh(features: NDArray[np.floating], n_bits: int, rng: np.random.Generator) -> Hyperplanes:
    """Draw random hyperplanes through the mean.

    Source: Charikar, "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002.
    Features after a ReLU lie in one orthant, where planes through the origin split little: hence
    through the mean.

    Parameters
    ----------
    features
        Shape ``[n, dim]``, n at least 1.
    n_bits
        Planes.
    rng
        Decides them.
    """
    normals = rng.standard_normal((features.shape[1], n_bits), dtype=np.float32)
    return Hyperplanes(_mean(features), normals)


def itq(features: NDArray[np.floating], n_bits: int, rng: np.random.Generator) -> Hyperplanes:
    """Learn hyperplanes by iterative quantisation: principal directions, rotated to fit the cube.

    Source: Gong and Lazebnik, "Iterative Quantization: A Procrustean Approach to Learning Binary
    Codes", CVPR 2011. The principal directions come from a randomised subspace iteration: Halko,
    Martinsson, Tropp, "Finding Structure with Randomness", SIAM Review 2011.

    Parameters
    ----------
    features
        Shape ``[n, dim]``, n at least 1.
    n_bits
        Planes. Where the features spread in fewer directions, the rest are random ones, as `lsh`
        draws them; `Hyperplanes.n_filled` says how many.
    rng
        Decides which `ITQ_ROWS` rows it learns from, and where it begins.
    """
    centre = _mean(features)
    n, dim = features.shape
    rows = rng.choice(n, ITQ_ROWS, replace=False) if n > ITQ_ROWS else np.arange(n)
    sample = features[rows].astype(np.float32) - centre
    directions = _principal(sample, min(n_bits, dim, len(rows)), rng)
    filled = rng.standard_normal((dim, n_bits - directions.shape[1]), dtype=np.float32)

    projected = sample @ directions
    rank = directions.shape[1]
    rotation, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    rotation = rotation.astype(np.float32)
    for _ in range(ITQ_ITERATIONS if rank else 0):
        corners = np.where(projected @ rotation > 0, np.float32(1), np.float32(-1))
        left, _, right = np.linalg.svd(projected.T @ corners)
        rotation = left @ right
    normals = np.concatenate([directions @ rotation, filled], axis=1)
    return Hyperplanes(centre, normals, filled.shape[1])


def _principal(
    centred: NDArray[np.float32], n_wanted: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return the directions of most variance, ``[dim, at most n_wanted]``, most first."""
    width = min(n_wanted + _OVERSAMPLING, *centred.shape)
    basis = rng.standard_normal((centred.shape[1], width), dtype=np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    _, spread, turned = np.linalg.svd(centred @ basis, full_matrices=False)
    n_kept = int((spread[:n_wanted] > _LEAST_SPREAD * spread.max(initial=0)).sum())
    return np.ascontiguousarray(basis @ turned[:n_kept].T)


def _mean(features: NDArray[np.floating]) -> NDArray[np.float32]:
    total = np.zeros(features.shape[1], dtype=np.float64)
    for block in _blocks(features):
        total += block.sum(axis=0, dtype=np.float64)
    return (total / len(features)).astype(np.float32)


def _blocks(features: NDArray[np.floating]) -> list[NDArray[np.floating]]:
    return [features[lo : lo + _BLOCK_ROWS] for lo in range(0, len(features), _BLOCK_ROWS)]
