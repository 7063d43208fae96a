"""Slow, obvious twins of the kernels. They share no code with what they check."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hamming(a: bytes, b: bytes) -> int:
    """Count the differing bits of two packed codes."""
    return sum(bin(x ^ y).count("1") for x, y in zip(a, b, strict=True))


def asymmetric(a: bytes, b: bytes, weights: Sequence[int]) -> int:
    """Add up the weights of the differing bits of two packed codes."""
    return sum(
        weight
        for i, weight in enumerate(weights)
        if (a[i // 8] >> i % 8 & 1) != (b[i // 8] >> i % 8 & 1)
    )


def euclidean(row: np.ndarray, query: np.ndarray) -> np.float32:
    """Add up squares number by number, in the order that the kernel's docstring defines."""
    lanes = [np.float32(0)] * 32
    with np.errstate(all="ignore"):
        for i, (a, b) in enumerate(zip(row, query, strict=True)):
            difference = np.float32(a) - np.float32(b)
            lanes[i % 32] = lanes[i % 32] + difference * difference
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[half + i] for i in range(half)]
        distance = np.sqrt(lanes[0])
    return np.float32(np.inf) if np.isnan(distance) else distance


def k_smallest(keys: Sequence[int], ids: Sequence[str], k: int) -> list[int]:
    """Sort everything by (key, UTF-8 bytes of the id) and take the first."""
    order = sorted(range(len(keys)), key=lambda i: (keys[i], ids[i].encode()))
    return order[:k]
