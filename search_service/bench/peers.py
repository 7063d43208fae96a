"""Other libraries, asked the same question as we are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.cli.extras import advice_for
from hashlens.errors import PreconditionError

Distances = NDArray[Any]
"""Of what was found, in bits, ascending; ids of equal ones are anybody's choice."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One library with the codes loaded. What it does not offer is None."""

    name: str
    nearest: Callable[[NDArray[np.uint8], int], Distances] | None = None
    """Packed queries ``[n, n_bytes]`` and `k` to the `k` smallest distances of each, ``[n, k]``."""
    within: Callable[[NDArray[np.uint8], int], Distances] | None = None
    """Packed queries and a radius to the distances of all rows within it, of all queries."""
    max_radius_bits: int = 1 << 16
    """`within` is exact up to here."""
    notes: Mapping[str, Any] = field(default_factory=dict)


COARSE = ("faiss", "faiss-hash", "faiss-multihash", "usearch", "numpy")
"""Peers of the coarse stage."""


def open_peer(name: str, packed: NDArray[np.uint8], n_threads: int) -> Peer:
    """Load codes into a library.

    Parameters
    ----------
    name
        One of `COARSE`.
    packed
        uint8, shape ``[n, n_bytes]``.
    n_threads
        How many it may use.

    Raises
    ------
    PreconditionError
        It is not installed.
    """
    try:
        if name == "numpy":
            return _numpy(packed)
        if name == "usearch":
            return _usearch(packed, n_threads)
        return _faiss(name, packed, n_threads)
    except ImportError as error:
        raise PreconditionError(f"the peer {name} {advice_for(error)}") from None


def _faiss(name: str, packed: NDArray[np.uint8], n_threads: int) -> Peer:
    import faiss

    faiss.omp_set_num_threads(n_threads)
    n_bits = 8 * packed.shape[1]
    if name == "faiss":
        flat = faiss.IndexBinaryFlat(n_bits)
        flat.add(packed)
        # Its radius is exclusive.
        return Peer(
            name,
            nearest=lambda queries, k: flat.search(queries, k)[0],
            within=lambda queries, radius: flat.range_search(queries, radius + 1)[1],
        )
    if name == "faiss-hash":
        # Rows by their first bits; exact as long as it flips as many of them as the radius.
        width = min(n_bits, max(int(np.log2(len(packed))) - 4, 8))
        index, reach = faiss.IndexBinaryHash(n_bits, width), 2
        index.nflip = reach
    else:
        width = min(n_bits, 32, max(int(np.log2(len(packed))), 8))
        tables = n_bits // width
        # Each of `tables` parts flips one bit: exact up to 2 * tables - 1 bits in all.
        index, reach = faiss.IndexBinaryMultiHash(n_bits, tables, width), 2 * tables - 1
        index.nflip = 1
    index.add(packed)
    return Peer(
        name,
        within=lambda queries, radius: index.range_search(queries, radius + 1)[1],
        max_radius_bits=reach,
        notes={"bits_hashed": width},
    )


def _usearch(packed: NDArray[np.uint8], n_threads: int) -> Peer:
    from usearch.index import MetricKind, search  # type: ignore[attr-defined]

    def nearest(queries: NDArray[np.uint8], k: int) -> Distances:
        found = search(packed, queries, k, MetricKind.Hamming, exact=True, threads=n_threads)
        return np.asarray(found.distances).astype(np.int64).reshape(len(queries), k)

    return Peer("usearch", nearest=nearest)


def _numpy(packed: NDArray[np.uint8]) -> Peer:
    rows = _padded(packed)

    def distances(query: NDArray[np.uint8]) -> NDArray[np.uint16]:
        differing = np.bitwise_count(rows ^ _padded(query[np.newaxis]))
        total: NDArray[np.uint16] = differing.sum(axis=1, dtype=np.uint16)
        return total

    def nearest(queries: NDArray[np.uint8], k: int) -> Distances:
        return np.stack([np.sort(np.partition(distances(q), k - 1)[:k]) for q in queries])

    def within(queries: NDArray[np.uint8], radius: int) -> Distances:
        found = [distances(query) for query in queries]
        return np.concatenate([some[some <= radius] for some in found])

    return Peer("numpy", nearest=nearest, within=within)


def _padded(packed: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return codes as whole 64-bit words, row by row."""
    width = -(-packed.shape[1] // 8) * 8
    if width == packed.shape[1]:
        return np.ascontiguousarray(packed).view(np.uint64)
    padded = np.zeros((len(packed), width), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)
