"""Codes and features to measure with: uniform, and as a trained network makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hashlens import codes

Kind = Literal["uniform", "trained"]

N_CLASSES = 10
_CLUSTERS_PER_CLASS = 40
_CLUSTER_FLIPS = 0.04
"""Share of the bits in which a cluster differs from its class."""
_ROW_FLIPS = 0.012
"""Share of the bits in which a row differs from its cluster."""
_BLOCK_ROWS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class CodeSet:
    """Rows and queries drawn from the same source; no query is a row."""

    packed: NDArray[np.uint8]
    """Rows: shape ``[n, n_bytes]``."""
    queries: NDArray[np.uint8]
    """Shape ``[n_queries, n_bytes]``."""
    classes: NDArray[np.uint8]
    """Class of each row, shape ``[n]``; zeros for uniform codes."""
    n_bits: int


def make_codes(kind: Kind, rows: int, n_bits: int, *, n_queries: int, seed: int) -> CodeSet:
    """Draw codes.

    Parameters
    ----------
    kind
        ``uniform``: every code is as likely as any other. ``trained``: ten crowded classes, as
        networks that were taught classes make them: the codes of a class lie within a few bits of
        its prototype, and prototypes are about half of the bits apart, so that a ball holds next
        to nothing or a tenth of the table.
    rows, n_bits, n_queries
        How many, and how long.
    seed
        The same gives the same codes.
    """
    rng = np.random.default_rng(seed)
    total = rows + n_queries
    classes = np.zeros(total, dtype=np.uint8)
    packed = np.empty((total, codes.n_bytes(n_bits)), dtype=np.uint8)
    if kind == "uniform":
        for lo in range(0, total, _BLOCK_ROWS):
            block = packed[lo : lo + _BLOCK_ROWS]
            block[:] = np.frombuffer(rng.bytes(block.size), dtype=np.uint8).reshape(block.shape)
    else:
        prototypes = rng.random((N_CLASSES, 1, n_bits)) < 0.5
        centres = prototypes ^ (
            rng.random((N_CLASSES, _CLUSTERS_PER_CLASS, n_bits)) < _CLUSTER_FLIPS
        )
        centre_codes = codes.pack(centres.reshape(-1, n_bits))
        for lo in range(0, total, _BLOCK_ROWS):
            block = packed[lo : lo + _BLOCK_ROWS]
            cluster = rng.integers(0, len(centre_codes), len(block))
            classes[lo : lo + len(block)] = cluster // _CLUSTERS_PER_CLASS
            block[:] = centre_codes[cluster]
            # Few bits flip, so they are drawn by number instead of one by one.
            n_flips = rng.binomial(len(block) * n_bits, _ROW_FLIPS)
            row, bit = rng.integers(0, len(block), n_flips), rng.integers(0, n_bits, n_flips)
            np.bitwise_xor.at(block, (row, bit // 8), (1 << (bit % 8)).astype(np.uint8))
    used_bits = n_bits % 8
    if used_bits:
        packed[:, -1] &= (1 << used_bits) - 1
    return CodeSet(packed[:rows], packed[rows:], classes[:rows], n_bits)


def make_features(
    classes: NDArray[np.uint8],
    dim: int,
    dtype: np.dtype[Any],
    *,
    seed: int,
    first_row: int = 0,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[Any]:
    """Draw features like F7's: not negative, about half of them 0, alike within a class.

    Each row adds a window of one long list of noise to its class's centre: as good as fresh noise
    to who measures speed, and a hundred times cheaper.

    Parameters
    ----------
    classes
        Of the rows.
    dim, dtype
        Shape and number format.
    seed
        The same gives the same features for the same row.
    first_row
        Number of the first row, for who makes them block by block.
    rows
        Numbers of all rows, where they do not follow each other.

    Returns
    -------
    ndarray
        Shape ``[len(classes), dim]``.
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((256, dim)).astype(np.float32)
    noise = rng.standard_normal(dim + (1 << 16)).astype(np.float32)
    features = np.empty((len(classes), dim), dtype=dtype)
    # A row's window is its number, hashed.
    if rows is None:
        rows = np.arange(first_row, first_row + len(classes))
    offsets = (rows * 40503) % (1 << 16)
    for i, (label, offset) in enumerate(zip(classes.tolist(), offsets.tolist(), strict=True)):
        features[i] = np.maximum(centres[label] + noise[offset : offset + dim], 0)
    return features
