"""Audits: a query answered in two stages and exhaustively, and what the first answer missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from hashlens.errors import OverloadedError, PreconditionError
from hashlens.types import (
    AuditResult,
    CollectionSpec,
    Embedding,
    EncodeTimings,
    Hit,
    Query,
    SearchOptions,
    SearchResult,
)
from search_service.answers import Answerer
from search_service.cancel import Cancel, in_thread
from search_service.exhaustive import ExhaustiveScan
from search_service.one_query import embedding_of
from search_service.snapshot import Snapshot

_HITS_AT_ONCE = 1000
"""Hits that are read between two looks at whether anybody waits."""


class Auditor:
    """Audits searches, a few at a time: each of them reads every feature.

    Parameters
    ----------
    max_audits
        Most at a time.
    """

    def __init__(self, *, max_audits: int) -> None:
        self._max_audits = max_audits
        self._n_running = 0
        self._last_s = 1.0  # how long the last one took; only advises when to come back

    async def audit(self, answerer: Answerer, query: Query, *, field: str) -> AuditResult:
        """Answer a query as a search does, then by comparing it with every row.

        Both answers are of one snapshot. The exhaustive one takes turns with other callers'
        searches, block by block.

        Parameters
        ----------
        answerer
            Of the call, for a collection with features.
        query
            What to look for; an embedding has its feature.
        field
            Path of the query in the request.

        Raises
        ------
        OverloadedError
            As many audits as may are running, or the executor's queue is full.
        PreconditionError
            The stored item that is the query has no feature.
        DeadlineError, CancelledError, UnavailableError
            As `Executor.run`; the work has stopped, or stops within a block.
        """
        with self._slot():
            embedding, encode, call_ns = await _embedding_of(answerer, query, field)
            meanings = await answerer.meanings()
            answer = await answerer.answer(Query(embedding=embedding), meanings, field=field)
            timings = replace(answer.receipt.timings, encode=encode, encode_call_ns=call_ns)
            answer = replace(answer, receipt=replace(answer.receipt, timings=timings))
            hits = await _exhaustive(answerer, embedding)
            return compared(answer, hits)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._n_running >= self._max_audits:
            raise OverloadedError(
                f"{self._n_running} audits are running, the most allowed: each reads every "
                "feature. Come back later.",
                retry_after_s=round(max(0.1, self._last_s), 3),
            )
        self._n_running += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._n_running -= 1
            self._last_s = time.monotonic() - began_s


def check_auditable(spec: CollectionSpec, *, field: str) -> None:
    """Raise PreconditionError for a collection that has no features to compare."""
    if spec.dim == 0:
        raise PreconditionError(
            f"collection {spec.name!r} holds codes only, and an audit compares features: audit one "
            "that has them, or use StreamBall to see what a radius holds",
            field=field,
        )


def compared(answer: SearchResult, exhaustive_hits: tuple[Hit, ...]) -> AuditResult:
    """Say what an answer has of the exhaustive one; of nothing, everything."""
    answered = {hit.id for hit in answer.hits}
    missed = [i for i, hit in enumerate(exhaustive_hits) if hit.id not in answered]
    n = len(exhaustive_hits)
    return AuditResult(
        answer=answer,
        exhaustive_hits=exhaustive_hits,
        recall=(n - len(missed)) / n if n else 1.0,
        first_miss=missed[0] if missed else None,
    )


async def _embedding_of(
    answerer: Answerer, query: Query, field: str
) -> tuple[Embedding, EncodeTimings, int]:
    """Return what the query is to both searches, the encoder's timings and the call's."""
    if query.embedding is not None:
        return query.embedding, EncodeTimings(), 0
    if query.image is None:  # Reading what is stored may have to wait for a disk.
        stored = await asyncio.to_thread(embedding_of, answerer.snapshot, query.id or "")
        if stored.feature is None:
            raise PreconditionError(
                f"item {query.id!r} has no feature on this replica to compare others with: ask by "
                "an image or an embedding",
                field=f"{field}.id",
            )
        return stored, EncodeTimings(), 0
    asked_ns = time.monotonic_ns()
    encoded = await answerer.images.encode(
        query.image,
        answerer.collection.spec,
        with_activations=True,  # They weigh nothing where they are not wanted.
        deadline_s=answerer.ends_s - time.monotonic(),
        field=f"{field}.image",
    )
    return encoded.embedding, encoded.timings, time.monotonic_ns() - asked_ns


async def _exhaustive(answerer: Answerer, embedding: Embedding) -> tuple[Hit, ...]:
    scan = ExhaustiveScan(answerer.snapshot, embedding, answerer.options.k)
    for first_row in scan.blocks:

        def work(cancel: Cancel, first_row: int = first_row) -> None:
            scan.scan(first_row, cancel)

        await answerer.executor.run(work, deadline_s=answerer.ends_s - time.monotonic())
    # Reading ids and payloads may have to wait for a disk, too.
    return await in_thread(lambda cancel: _hits(scan, answerer.snapshot, answerer.options, cancel))


def _hits(
    scan: ExhaustiveScan, snapshot: Snapshot, options: SearchOptions, cancel: Cancel
) -> tuple[Hit, ...]:
    nearest = scan.nearest()
    n = len(nearest.ids)
    hits: list[Hit] = []
    for lo in range(0, n, _HITS_AT_ONCE):
        cancel.check()
        place = slice(lo, min(lo + _HITS_AT_ONCE, n))
        rows = nearest.rows[place]
        payloads = snapshot.payloads_of(rows) if options.with_payload else [b""] * len(rows)
        hits += [
            Hit(id=item_id, hamming_bits=bits, distance=distance, payload=payload)
            for item_id, bits, distance, payload in zip(
                nearest.ids[place],
                nearest.hamming_bits[place].tolist(),
                nearest.distances[place].tolist(),
                payloads,
                strict=True,
            )
        ]
    return tuple(hits)
