"""A query in any form to an answer: the encoder, where there is an image, then the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from hashlens import convert
from hashlens.types import Embedding, EncodeTimings, Query, SearchOptions, SearchResult
from hashlens.v1 import search_service_pb2 as spb
from search_service import margins
from search_service.cancel import in_thread
from search_service.engine import Engine, is_tiny
from search_service.executor import Executor
from search_service.explain import Meanings
from search_service.images import ImageEncoder
from search_service.jobs import Deliver, Together, Waiting
from search_service.one_query import Ask
from search_service.snapshot import Snapshot
from search_service.storage.collection import Collection

_NO_MEANINGS = Meanings()

_HITS_AT_ONCE = 1000
"""Hits that are converted in the event loop, a few milliseconds; more go to a thread."""

Asked: TypeAlias = tuple[Embedding | str, SearchOptions, Meanings]
"""An embedding or the id of a stored item, how to look for it, and what the codes mean."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answerer:
    """Answers the queries of one call."""

    executor: Executor
    together: Together[Asked]
    """Of `together`; queries with the same one may be answered together."""
    images: ImageEncoder
    collection: Collection
    snapshot: Snapshot
    """What all of them search: of that collection, as new as was asked for."""
    options: SearchOptions
    is_alone: bool
    """Whether the call has one query."""
    ends_s: float
    """When the call must be answered, on the clock of `time.monotonic`."""

    async def meanings(self) -> Meanings | None:
        """Return what the collection's model makes of codes; None unless an explanation is due."""
        if not self.options.with_explanation:
            return None
        left_s = self.ends_s - time.monotonic()
        return await self.images.meanings(self.collection.spec, deadline_s=left_s)

    async def answer(self, query: Query, meanings: Meanings | None, *, field: str) -> SearchResult:
        """Turn a query into an embedding and have the engine search.

        Parameters
        ----------
        query
            What to look for.
        meanings
            Of `meanings`, asked for once for all queries.
        field
            Path of the query in the request.

        Returns
        -------
        SearchResult
            With `PackedHits` wherever those can hold the hits.
        """
        options, spec, snapshot = self.options, self.collection.spec, self.snapshot
        encode, call_ns = EncodeTimings(), 0
        embedding = query.embedding
        if query.image is not None:
            asked_ns = time.monotonic_ns()
            encoded = await self.images.encode(
                query.image,
                spec,
                with_activations=options.with_explanation or margins.are_wanted(options, spec.dim),
                deadline_s=self.ends_s - time.monotonic(),
                field=f"{field}.image",
            )
            encode, call_ns = encoded.timings, time.monotonic_ns() - asked_ns
            embedding = encoded.embedding

        # The executor's thread reads a stored embedding: that may have to wait for a disk.
        asked = (query.id or "") if embedding is None else embedding
        deadline_s = self.ends_s - time.monotonic()
        result: SearchResult = await self.executor.run_together(
            self.together,
            snapshot,
            (asked, options, meanings or _NO_MEANINGS),
            deadline_s=deadline_s,
            is_tiny=self.is_alone and is_tiny(snapshot, options),
        )
        # What a replica that has lost its place still has is not known to be all there is.
        if call_ns == 0 and not self.collection.is_lost:
            return result
        receipt = result.receipt
        timings = replace(receipt.timings, encode=encode, encode_call_ns=call_ns)
        exact = receipt.exact and not self.collection.is_lost
        return replace(result, receipt=replace(receipt, timings=timings, exact=exact))


def together(engine: Engine) -> Together[Asked]:
    """Return what the executor does with the queries that wait for one snapshot."""

    def work(snapshot: Snapshot, waiting: Sequence[Waiting[Asked]], deliver: Deliver) -> None:
        asks = []
        for one in waiting:
            query, options, meanings = one.item
            asks.append(
                Ask(
                    query=query,
                    options=options,
                    cancel=one.cancel,
                    meanings=meanings,
                    asked_ns=one.queued_ns,
                )
            )
        engine.search_batch(snapshot, asks, deliver)

    return work


async def reply_of(result: SearchResult, n_bits: int, *, packed: bool) -> spb.SearchResponse:
    """Return the wire form of an answer."""
    if packed or len(result.hits) <= _HITS_AT_ONCE:
        return convert.result_to_proto(result, n_bits, packed=packed)
    return await in_thread(
        lambda cancel: convert.result_to_proto(result, n_bits, check=cancel.check)
    )
