"""Two-stage search over a snapshot, and a receipt that says how the answer came about.

Source: Lin, Yang, Hsiao, Chen, "Deep Learning of Binary Hash Codes for Fast Image Retrieval", CVPR
Workshops 2015, section 3.3.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError, NotFoundError, PreconditionError
from hashlens.types import (
    MAX_K,
    Embedding,
    Explanation,
    Hit,
    Rank,
    Receipt,
    ReplyExplanation,
    SearchOptions,
    SearchResult,
    StageTimings,
)
from search_service import coarse, explain, fine, margins, sketch
from search_service.cancel import Cancel
from search_service.kernels import select
from search_service.sketches import Sketches
from search_service.snapshot import Snapshot


class Engine:
    """Searches snapshots, of any collection, one search at a time.

    Calls from several threads take turns. In a process with an `Executor`, search through it: two
    engines entered at once may meet in Numba's threading layer, which not every layer survives.

    Parameters
    ----------
    sketches
        Saves the fine stage from reading most features of a large pool. Default: all are read.
    """

    def __init__(self, *, sketches: Sketches | None = None) -> None:
        self._sketches = sketches
        self._scratch = coarse.Scratch()
        self._turn = threading.Lock()

    def search(
        self,
        snapshot: Snapshot,
        query: Embedding,
        options: SearchOptions | None = None,
        cancel: Cancel | None = None,
        meanings: explain.Meanings | None = None,
    ) -> SearchResult:
        """Find the items most similar to a query.

        The coarse stage takes the rows within a Hamming radius, the fine stage orders those by
        (Euclidean distance, Hamming distance, id), or by (Hamming distance, asymmetric distance,
        id) if it is off. The order is total, and distances are the same bits on every machine.

        The asymmetric distance, see `search_service.margins`, is 0 for a query without activations
        and where the options say to ignore them.

        Parameters
        ----------
        snapshot
            What to search.
        query
            What to look for: a code as long as the snapshot's, and for the fine stage a finite
            feature as wide. A float16 feature is widened, which changes nothing. Activations, if
            there are any, one in 0..1 per bit.
        options
            How; default ``SearchOptions()``. `min_version` is not the engine's.
        cancel
            Polled between blocks of work; default: runs to the end.
        meanings
            What the snapshot's model makes of codes, for an explanation; default: not known.

        Returns
        -------
        SearchResult
            At most `k` hits, best first; fewer if the pool holds fewer. Codes and features of hits
            are copies. Timings other than coarse, fine, fetch and total are 0.

        Raises
        ------
        InvalidInputError
            The query does not fit the snapshot, or an option is out of range.
        PreconditionError
            Another model made the query.
        CancelledError, DeadlineError
            As `cancel` says.
        """
        options = options or SearchOptions()
        cancel = cancel or Cancel()
        meanings = meanings or explain.Meanings()
        check_options(snapshot, options)
        by_feature = _ranks_by_feature(snapshot, options.rank)
        check_query(snapshot, query, with_feature=by_feature)
        with self._turn:
            return self._search(snapshot, query, options, cancel, meanings, by_feature=by_feature)

    def warm_up(self) -> None:
        """Compile the kernels and start their threads, by searching a tiny snapshot."""
        snapshot = Snapshot.from_arrays(
            np.zeros((2, 1), dtype=np.uint8), n_bits=8, features=np.zeros((2, 1), dtype=np.float32)
        )
        stored = embedding_of(snapshot, "0")
        self.search(snapshot, stored)
        sure = replace(stored, activations=np.zeros(8, dtype=np.float32))
        self.search(snapshot, sure, SearchOptions(rank=Rank.HAMMING))
        if self._sketches is not None:
            sketch.warm_up()

    def _search(
        self,
        snapshot: Snapshot,
        query: Embedding,
        options: SearchOptions,
        cancel: Cancel,
        meanings: explain.Meanings,
        *,
        by_feature: bool,
    ) -> SearchResult:
        began_ns = time.perf_counter_ns()
        words = codes.as_words(_packed(query))[:, 0]
        weights = margins.weights_of(query, options)
        pool = coarse.find_pool(
            snapshot,
            words,
            radius_bits=options.max_hamming_bits,
            n_wanted=max(options.k, options.min_pool),
            max_rows=options.max_pool if by_feature else None,
            scratch=self._scratch,
            cancel=cancel,
            weights=weights,
        )
        coarse_ns = time.perf_counter_ns() - began_ns

        rows, hamming_bits = pool.rows, pool.hamming_bits
        n_unranked = 0
        distances: NDArray[np.float32] | None = None
        if by_feature:
            has_feature = fine.with_feature(snapshot, rows)
            if has_feature is not None:
                rows, hamming_bits = rows[has_feature], hamming_bits[has_feature]
                n_unranked = pool.rows.shape[0] - rows.shape[0]
            vector = np.ascontiguousarray(query.feature, dtype=np.float32)
            known = None if self._sketches is None else self._sketches.of(snapshot)
            rows, hamming_bits, distances = fine.rank(
                snapshot, rows, hamming_bits, vector, options.k, cancel, known
            )
            keys = select.euclidean_keys(distances, hamming_bits)
        elif weights is not None:
            near = pool.hamming_bits <= pool.radius_of(options.k)
            rows, hamming_bits = rows[near], hamming_bits[near]
            asymmetric = margins.distances_to(snapshot, rows, words, weights, cancel)
            keys = select.hamming_keys(hamming_bits, asymmetric)
        else:
            keys = hamming_bits.astype(np.uint64)
        chosen, ids = select.k_smallest(keys, options.k, lambda i: snapshot.ids_of(rows[i]))
        cancel.check()
        ranked_ns = time.perf_counter_ns() - began_ns

        hits = _hits(
            snapshot,
            query,
            options,
            rows=rows[chosen],
            ids=ids,
            hamming_bits=hamming_bits[chosen],
            distances=None if distances is None else distances[chosen],
            meanings=meanings,
            cancel=cancel,
        )
        explanation: ReplyExplanation | None = None
        if options.with_explanation:
            explanation = explain.explain_query(query, meanings)
        total_ns = time.perf_counter_ns() - began_ns
        receipt = Receipt(
            rows_scanned=snapshot.n_alive,
            threshold_bits=pool.threshold_bits,
            pool_size=pool.rows.shape[0],
            pool_histogram=tuple(pool.histogram.tolist()),
            pool_truncated=pool.truncated,
            rows_without_feature=n_unranked,
            exact=not pool.truncated and n_unranked == 0,
            version=snapshot.version,
            timings=StageTimings(
                # With the fine stage off, selection is all that is left of it.
                coarse_ns=coarse_ns if by_feature else ranked_ns,
                fine_ns=ranked_ns - coarse_ns if by_feature else 0,
                fetch_ns=total_ns - ranked_ns,
                total_ns=total_ns,
            ),
            margins_used=weights is not None and (pool.truncated or not by_feature),
        )
        return SearchResult(hits, receipt, explanation)


def embedding_of(snapshot: Snapshot, item_id: str) -> Embedding:
    """Return a stored item's embedding, to search with.

    Parameters
    ----------
    snapshot
        Where the item is.
    item_id
        Its id.

    Returns
    -------
    Embedding
        With copies of the code and the feature; the feature is None where it is missing.

    Raises
    ------
    NotFoundError
        There is no such item.
    """
    row = snapshot.row_of(item_id)
    if row is None:
        raise NotFoundError(f"No item has the id {item_id!r}. Insert it first or check the id.")
    return Embedding(
        code=snapshot.codes_of(np.array([row], dtype=np.int64)).tobytes(),
        n_bits=snapshot.n_bits,
        model_id=snapshot.model_id,
        feature=snapshot.feature_of(row),
    )


def check_options(snapshot: Snapshot, options: SearchOptions) -> None:
    """Refuse options that are out of range.

    Raises
    ------
    InvalidInputError
        With the field's path in a search request.
    """
    if not 1 <= options.k <= MAX_K:
        raise InvalidInputError(f"k is {options.k}. Ask for 1 to {MAX_K} hits.", field="options.k")
    radius_bits = options.max_hamming_bits
    if radius_bits is not None and not 0 <= radius_bits <= snapshot.n_bits:
        raise InvalidInputError(
            f"max_hamming_bits is {radius_bits}. Codes here have {snapshot.n_bits} bits: give 0 to "
            f"{snapshot.n_bits}, or leave it out.",
            field="options.max_hamming_bits",
        )
    if options.min_pool < 0:
        raise InvalidInputError(
            f"min_pool is {options.min_pool}. Give 0 or more.", field="options.min_pool"
        )
    if options.max_pool is not None and options.max_pool < options.k:
        raise InvalidInputError(
            f"max_pool is {options.max_pool}, less than k. Give at least {options.k}, or leave it "
            "out.",
            field="options.max_pool",
        )
    if options.rank is Rank.EUCLIDEAN and snapshot.dim == 0:
        raise InvalidInputError(
            "The collection has no features to rank by. Ask for rank hamming.", field="options.rank"
        )


def check_query(snapshot: Snapshot, query: Embedding, *, with_feature: bool) -> None:
    """Refuse a query that does not fit a snapshot.

    Raises
    ------
    InvalidInputError
        With the field's path in a search request.
    PreconditionError
        Another model made the query.
    """
    if snapshot.model_id and query.model_id != snapshot.model_id:
        raise PreconditionError(
            f"The query is of model {query.model_id!r}, the collection of {snapshot.model_id!r}. "
            "Encode the query with the collection's model."
        )
    if query.n_bits != snapshot.n_bits:
        raise InvalidInputError(
            f"The code has {query.n_bits} bits, the collection's have {snapshot.n_bits}. Encode "
            "the query with the collection's model.",
            field="query.embedding.code.n_bits",
        )
    if len(query.code) != codes.n_bytes(query.n_bits):
        raise InvalidInputError(
            f"The code is {len(query.code)} bytes long. {query.n_bits} bits take "
            f"{codes.n_bytes(query.n_bits)}.",
            field="query.embedding.code.bits",
        )
    if not codes.padding_is_zero(query.code, query.n_bits):
        raise InvalidInputError(
            "The code's padding bits are set. Set the unused high bits of the last byte to 0.",
            field="query.embedding.code.bits",
        )
    margins.check(query)
    if with_feature:
        _check_feature(snapshot, query.feature)


def _check_feature(snapshot: Snapshot, feature: NDArray[np.generic] | None) -> None:
    if feature is None:
        raise InvalidInputError(
            "The query has no feature to rank by. Send it, or ask for rank hamming.",
            field="query.embedding.feature",
        )
    if feature.dtype not in (np.float32, np.float16):
        raise InvalidInputError(
            f"The feature is {feature.dtype}. Send float32 or float16.",
            field="query.embedding.feature.dtype",
        )
    if feature.shape != (snapshot.dim,):
        raise InvalidInputError(
            f"The feature has shape {list(feature.shape)}. The collection's have [{snapshot.dim}].",
            field="query.embedding.feature.dim",
        )
    if not np.isfinite(feature).all():
        raise InvalidInputError(
            "The feature holds NaN or infinity. Send finite numbers.",
            field="query.embedding.feature.values",
        )


def _ranks_by_feature(snapshot: Snapshot, rank: Rank) -> bool:
    return rank is Rank.EUCLIDEAN or (rank is Rank.AUTO and snapshot.dim > 0)


def _packed(query: Embedding) -> NDArray[np.uint8]:
    return np.frombuffer(query.code, dtype=np.uint8)[np.newaxis]


def _hits(
    snapshot: Snapshot,
    query: Embedding,
    options: SearchOptions,
    *,
    rows: NDArray[np.int64],
    ids: list[str],
    hamming_bits: NDArray[np.uint16],
    distances: NDArray[np.float32] | None,
    meanings: explain.Meanings,
    cancel: Cancel,
) -> tuple[Hit, ...]:
    n = len(ids)
    needs_codes = options.with_code or options.with_explanation
    packed = snapshot.codes_of(rows) if needs_codes else None
    payloads = snapshot.payloads_of(rows) if options.with_payload else [b""] * n
    explanations: Sequence[Explanation | None] = [None] * n
    if packed is not None and options.with_explanation:
        explanations = explain.explain_hits(query, packed, meanings, cancel)
    return tuple(
        Hit(
            id=ids[i],
            hamming_bits=bits,
            distance=distance,
            payload=payloads[i],
            code=packed[i].tobytes() if packed is not None and options.with_code else None,
            feature=snapshot.feature_of(int(rows[i])) if options.with_feature else None,
            explanation=explanations[i],
        )
        for i, (bits, distance) in enumerate(
            zip(
                hamming_bits.tolist(),
                [None] * n if distances is None else distances.tolist(),
                strict=True,
            )
        )
    )
