"""Answers that came over the wire, against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.types import Embedding, SearchResult
from search_service.bench.data import CodeSet
from search_service.bench.report import WrongAnswerError


def check_hits(
    answer: SearchResult,
    query: Embedding,
    n_wanted: int,
    k: int,
    data: CodeSet,
    features: NDArray[Any] | None,
    ids: NDArray[np.bytes_],
) -> None:
    """Compare an answer with brute force.

    Parameters
    ----------
    answer, query
        What was found, and for what.
    n_wanted
        Rows that the pool must hold.
    k
        Hits that were asked for.
    data, features, ids
        All rows: codes, features or None, ids in ascending order.

    Raises
    ------
    WrongAnswerError
        It differs.
    """
    code = np.frombuffer(query.code, dtype=np.uint8)
    bits = np.bitwise_count(data.packed ^ code).sum(axis=1, dtype=np.int64)
    found = np.array([hit.id.encode() for hit in answer.hits], dtype=ids.dtype)
    rows = np.searchsorted(ids, found)
    k = min(k, len(ids))
    if len(rows) != k or (ids[rows] != found).any():
        raise WrongAnswerError(f"{len(rows)} hits for k = {k}, or an id that was never written")
    if [hit.hamming_bits for hit in answer.hits] != bits[rows].tolist():
        raise WrongAnswerError("a Hamming distance is wrong")
    if features is None:
        if rows.tolist() != np.lexsort((ids, bits))[:k].tolist():
            raise WrongAnswerError("hits are not the nearest by (Hamming distance, id)")
        return
    threshold = np.sort(bits)[min(n_wanted, len(bits)) - 1]
    pool = np.flatnonzero(bits <= threshold)
    assert query.feature is not None
    difference = features[pool].astype(np.float64) - query.feature.astype(np.float64)
    distances = np.full(len(bits), np.inf)
    distances[pool] = np.sqrt((difference**2).sum(axis=1))
    best = np.sort(distances)[:k]
    said = np.array([hit.distance for hit in answer.hits], dtype=np.float64)
    # Ours are sums of float32: near, and in the order of their own bits.
    if not (np.allclose(said, distances[rows], rtol=1e-4) and np.allclose(said, best, rtol=1e-4)):
        raise WrongAnswerError("hits are not the nearest of the pool by Euclidean distance")
    if len(set(rows.tolist())) != k:
        raise WrongAnswerError("a hit comes twice")
