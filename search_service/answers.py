"""A query in any form to an answer: the encoder, where there is an image, then the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from hashlens.types import EncodeTimings, Query, SearchOptions, SearchResult
from search_service import margins
from search_service.cancel import Cancel
from search_service.engine import Engine, embedding_of
from search_service.executor import Executor
from search_service.explain import Meanings
from search_service.images import ImageEncoder
from search_service.snapshot import Snapshot
from search_service.storage.collection import Collection


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answerer:
    """Answers the queries of one call."""

    engine: Engine
    executor: Executor
    images: ImageEncoder
    collection: Collection
    snapshot: Snapshot
    """What all of them search: of that collection, as new as was asked for."""
    options: SearchOptions
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

        def work(cancel: Cancel) -> SearchResult:
            # Reading a stored embedding may have to wait for a disk.
            asked = embedding_of(snapshot, query.id or "") if embedding is None else embedding
            return self.engine.search(snapshot, asked, options, cancel, meanings)

        outcome = await self.executor.run(work, deadline_s=self.ends_s - time.monotonic())
        receipt = outcome.value.receipt
        timings = replace(
            receipt.timings, encode=encode, encode_call_ns=call_ns, queue_ns=outcome.queue_ns
        )
        # What a replica that has lost its place still has is not known to be all there is.
        exact = receipt.exact and not self.collection.is_lost
        return replace(outcome.value, receipt=replace(receipt, timings=timings, exact=exact))
