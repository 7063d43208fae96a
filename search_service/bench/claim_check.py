"""The claim's answers against brute force over what the generator made, not over the store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hashlens.types import Embedding, SearchOptions, SearchResult
from search_service.bench.load import Rows
from search_service.bench.report import WrongAnswerError

_TOLERANCE = 1e-5
"""Relative: ours adds float32 numbers in a fixed order, this adds float64 in another."""

_BLOCK_ROWS = 2048


def hamming_to(rows: Rows, code: bytes) -> NDArray[np.int64]:
    """Return the Hamming distance of each row to a code: shape ``[rows]``."""
    query = np.frombuffer(code, dtype=np.uint8)
    distances = np.zeros(len(rows.codes.packed), dtype=np.int64)
    for byte, value in enumerate(query):
        distances += np.bitwise_count(rows.codes.packed[:, byte] ^ value)
    return distances


def check(rows: Rows, query: Embedding, options: SearchOptions, result: SearchResult) -> None:
    """Raise WrongAnswerError unless an answer is the two-stage definition's.

    Rows whose distances differ by less than rounding may change places. Of a pool that was cut, the
    rows at the edge are not worked out here: the query's margins choose them, or their age in the
    store, where several callers wrote at once.
    """
    hamming = hamming_to(rows, query.code)
    histogram = np.bincount(hamming, minlength=query.n_bits + 1)
    if options.max_hamming_bits is not None:
        threshold = options.max_hamming_bits
    else:
        wanted = min(max(options.k, options.min_pool), len(hamming))
        threshold = int(np.searchsorted(np.cumsum(histogram), wanted))
    receipt = result.receipt
    _require(receipt.threshold_bits == threshold, f"threshold {receipt.threshold_bits}")
    _require(list(receipt.pool_histogram) == histogram[: threshold + 1].tolist(), "pool histogram")
    pool = np.flatnonzero(hamming <= threshold)
    cut = options.max_pool is not None and len(pool) > options.max_pool
    _require(receipt.pool_truncated == cut, "whether the pool was cut")
    edge = threshold
    if options.max_pool is not None and cut:
        edge = int(np.searchsorted(np.cumsum(histogram), options.max_pool))
        pool = np.flatnonzero(hamming <= edge)
    expected = _distances(rows, pool, query)
    places = _places(rows, pool, result)
    _require(len(places) == min(options.k, receipt.pool_size), f"{len(places)} hits")
    _require(len(set(places.tolist())) == len(places), "a row is in it twice")
    found = np.array([hit.distance for hit in result.hits], dtype=np.float64)
    bits = np.array([hit.hamming_bits for hit in result.hits])
    _require((bits == hamming[pool[places]]).all(), "Hamming distances")
    _require(np.allclose(found, expected[places], rtol=_TOLERANCE, atol=1e-6), "distances")
    steps, bit_steps = np.diff(found), np.diff(bits)
    _require(bool(((steps > 0) | ((steps == 0) & (bit_steps >= 0))).all()), "the order of the hits")
    left_out = np.ones(len(pool), dtype=np.bool_)
    left_out[places] = False
    if cut:
        left_out &= hamming[pool] < edge
    others = expected[left_out]
    if len(others) and len(found):
        _require(bool(others.min() >= found[-1] * (1 - _TOLERANCE)), "a nearer row is left out")


def _places(rows: Rows, pool: NDArray[np.int64], result: SearchResult) -> NDArray[np.int64]:
    """Return where in the pool the hits are."""
    hits = np.array([int(hit.id) for hit in result.hits], dtype=np.int64)
    _require(all(rows.id_of(int(hit.id)) == hit.id for hit in result.hits), "an id")
    places = np.searchsorted(pool, hits)
    inside = places < len(pool)
    _require(bool(inside.all()) and bool((pool[places] == hits).all()), "a hit outside the pool")
    return places


def _distances(rows: Rows, pool: NDArray[np.int64], query: Embedding) -> NDArray[np.float64]:
    assert query.feature is not None
    wanted = query.feature.astype(np.float64)
    distances = np.empty(len(pool), dtype=np.float64)
    for lo in range(0, len(pool), _BLOCK_ROWS):
        off = rows.features(pool[lo : lo + _BLOCK_ROWS]) - wanted
        distances[lo : lo + _BLOCK_ROWS] = np.sqrt(np.einsum("ij,ij->i", off, off))
    return distances


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise WrongAnswerError(f"the answer is not brute force's: {what}")
