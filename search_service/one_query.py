"""One query of a search: checked, its pool ranked, its hits fetched, its receipt written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import NotFoundError
from hashlens.packed import PackedHits
from hashlens.types import (
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
from search_service import coarse, explain, fine, margins, narrow
from search_service.cancel import Cancel
from search_service.columns import packed_hits
from search_service.features import with_feature
from search_service.fits import check_options, check_query
from search_service.kernels import select
from search_service.sketch import Sketch
from search_service.snapshot import Snapshot
from search_service.threads import threads_for


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ask:
    """One query of several."""

    query: Embedding | str
    """An embedding, or the id of a stored item."""
    options: SearchOptions
    cancel: Cancel = field(default_factory=Cancel)
    meanings: explain.Meanings = explain.Meanings()
    asked_ns: int = 0
    """When it began to wait, on the clock of `time.perf_counter_ns`; 0 if it did not."""


class OneQuery:
    """One query of a batch, checked.

    Raises
    ------
    HashlensError
        See `Engine.search`.
    """

    __slots__ = ("ask", "by_feature", "number", "query", "snapshot", "weights", "words")

    def __init__(self, snapshot: Snapshot, ask: Ask, number: int) -> None:
        self.snapshot, self.ask, self.number = snapshot, ask, number
        options, query = ask.options, ask.query
        assert options.filter is None, "the snapshot is what is filtered"
        ask.cancel.check()
        check_options(snapshot, options)
        self.by_feature = _ranks_by_feature(snapshot, options.rank)
        self.query = embedding_of(snapshot, query) if isinstance(query, str) else query
        check_query(snapshot, self.query, with_feature=self.by_feature)
        self.words = codes.as_words(_packed(self.query))[:, 0]
        self.weights = margins.weights_of(self.query, options)

    def answer(
        self,
        pool: coarse.Pool,
        known: Sketch | None,
        *,
        coarse_ns: int,
        n_queries: int,
        max_payload_bytes: int,
    ) -> SearchResult:
        """Rank a pool and fetch what the hits show."""
        own_ns = time.perf_counter_ns()
        snapshot, query, options, cancel = (
            self.snapshot,
            self.query,
            self.ask.options,
            self.ask.cancel,
        )
        cancel.check()
        rows, hamming_bits = pool.rows, pool.hamming_bits
        n_unranked = 0
        distances: NDArray[np.float32] | None = None
        if self.by_feature:
            has_feature = with_feature(snapshot, rows, cancel)
            if has_feature is not None:
                rows, hamming_bits = rows[has_feature], hamming_bits[has_feature]
                n_unranked = pool.rows.shape[0] - rows.shape[0]
            vector = np.ascontiguousarray(query.feature, dtype=np.float32)
            with threads_for(rows.shape[0] * snapshot.dim * snapshot.feature_dtype.n_bytes):
                rows, hamming_bits, distances = fine.rank(
                    snapshot, rows, hamming_bits, vector, options.k, cancel, known
                )
            keys = select.euclidean_keys(distances, hamming_bits)
        elif self.weights is not None:
            near = narrow.within(hamming_bits, pool.radius_of(options.k), cancel)
            rows, hamming_bits = rows[near], hamming_bits[near]
            asymmetric = margins.distances_to(snapshot, rows, self.words, self.weights, cancel)
            keys = select.hamming_keys(hamming_bits, asymmetric)
        else:
            if rows.shape[0] > narrow.BLOCK_ROWS:
                near = narrow.within(hamming_bits, pool.radius_of(options.k), cancel)
                rows, hamming_bits = rows[near], hamming_bits[near]
            keys = hamming_bits.astype(np.uint64)
        chosen = narrow.nearest(keys, rows, snapshot.ids.id_texts(), options.k, cancel)
        cancel.check()
        ranked_ns = time.perf_counter_ns()

        rows = rows[chosen]
        hits = packed_hits(
            snapshot,
            rows,
            hamming_bits[chosen],
            None if distances is None else distances[chosen],
            with_payload=options.with_payload,
            with_code=options.with_code,
            max_payload_bytes=max_payload_bytes,
        )
        explanation: ReplyExplanation | None = None
        if options.with_explanation:
            explanation = explain.explain_query(query, self.ask.meanings)
        shown: Sequence[Hit] = hits
        if options.with_feature or options.with_explanation:
            shown = self._enriched(hits, rows)
        ended_ns = time.perf_counter_ns()
        fine_ns = ranked_ns - own_ns
        asked_ns = self.ask.asked_ns
        receipt = Receipt(
            rows_scanned=pool.n_compared,
            threshold_bits=pool.threshold_bits,
            pool_size=pool.rows.shape[0],
            pool_histogram=tuple(pool.histogram.tolist()),
            pool_truncated=pool.truncated,
            rows_without_feature=n_unranked,
            exact=not pool.truncated and n_unranked == 0,
            version=snapshot.version,
            timings=StageTimings(
                # What its neighbours took in between is waiting, too.
                queue_ns=own_ns - asked_ns - coarse_ns if asked_ns else 0,
                # With the fine stage off, selection is all that is left of it.
                coarse_ns=coarse_ns if self.by_feature else coarse_ns + fine_ns,
                fine_ns=fine_ns if self.by_feature else 0,
                fetch_ns=ended_ns - ranked_ns,
                total_ns=ended_ns - own_ns + coarse_ns,
                batch_queries=n_queries,
            ),
            margins_used=self.weights is not None and (pool.truncated or not self.by_feature),
        )
        return SearchResult(shown, receipt, explanation)

    def _enriched(self, hits: PackedHits, rows: NDArray[np.int64]) -> tuple[Hit, ...]:
        """Return hits with the features and explanations that were asked for."""
        snapshot, ask = self.snapshot, self.ask
        explanations: Sequence[Explanation | None] = [None] * len(hits)
        if ask.options.with_explanation:
            packed = snapshot.codes_of(rows)
            explanations = explain.explain_hits(self.query, packed, ask.meanings, ask.cancel)
        with_feature = ask.options.with_feature
        return tuple(
            replace(
                hit,
                feature=snapshot.feature_of(row) if with_feature else None,
                explanation=explanation,
            )
            for hit, row, explanation in zip(
                hits.unpacked(), rows.tolist(), explanations, strict=True
            )
        )


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


def _ranks_by_feature(snapshot: Snapshot, rank: Rank) -> bool:
    return rank is Rank.EUCLIDEAN or (rank is Rank.AUTO and snapshot.dim > 0)


def _packed(query: Embedding) -> NDArray[np.uint8]:
    return np.frombuffer(query.code, dtype=np.uint8)[np.newaxis]
