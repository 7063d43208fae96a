"""SearchService: protobuf to store and engine and back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc

from hashlens import convert
from hashlens.errors import (
    HashlensError,
    InvalidInputError,
)
from hashlens.rpc.health import ServiceState
from hashlens.rpc.limits import check_size
from hashlens.rpc.metrics import Metric
from hashlens.rpc.status import status_of
from hashlens.types import (
    Query,
    Rank,
    SearchOptions,
    SearchResult,
)
from hashlens.v1 import replica_service_pb2_grpc as rpb_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from search_service import checks
from search_service.answers import Answerer, reply_of, together
from search_service.audit import Auditor, check_auditable
from search_service.ball_stream import Ball, BallStreamer
from search_service.calls import Context
from search_service.cancel import in_thread
from search_service.collections_rpc import CollectionsRpc
from search_service.config import SearchConfig
from search_service.engine import Engine
from search_service.executor import Executor
from search_service.images import ImageEncoder
from search_service.index_keeper import IndexKeeper
from search_service.items_rpc import ItemsRpc
from search_service.maintenance import CompactRpc, Erasures
from search_service.method_limits import METHOD_LIMITS
from search_service.metrics import SearchMetrics
from search_service.one_query import embedding_of
from search_service.readiness import Readiness
from search_service.replication.client import GrpcPeers
from search_service.replication.servicer import ReplicaServicer, ServingLimits
from search_service.sketches import Sketches
from search_service.snapshot import Snapshot
from search_service.storage import Store, StoreConfig
from search_service.storage.collection import Collection
from search_service.store_metrics import store_metrics
from search_service.verify import Verifier, VerifyRpc

logger = logging.getLogger(__name__)

_WILDCARDS = ("0.0.0.0", "[::]", "::", "*")

_ADVICE = "ask for fewer hits, or leave features out"


class SearchServicer(CollectionsRpc, ItemsRpc, CompactRpc, VerifyRpc):
    """Answers the RPCs; a `hashlens.rpc.server.Service`.

    Parameters
    ----------
    config
        See `SearchConfig`.
    """

    names: Sequence[str] = ("hashlens.v1.SearchService", "hashlens.v1.ReplicaService")

    method_limits: Mapping[str, int] = METHOD_LIMITS

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._readiness = Readiness(config.stuck_s)
        self._is_open = False
        self.stopping = asyncio.Event()
        self._stack = AsyncExitStack()
        self._metrics = SearchMetrics()
        self._threads = ThreadPoolExecutor(config.n_store_threads, thread_name_prefix="store")
        sketches = Sketches(config.sketch_memory_mb << 20) if config.sketch_memory_mb else None
        if sketches is not None:
            self._stack.callback(sketches.close)
        indexes = IndexKeeper(config.index_memory_mb << 20) if config.index_memory_mb else None
        if indexes is not None:
            self._stack.callback(indexes.close)
        self._engine = Engine(
            sketches=sketches, indexes=indexes, max_payload_bytes=config.max_message_bytes
        )
        self._together = together(self._engine)
        self._auditor = Auditor(max_audits=config.max_audits)
        self._erasures = Erasures()
        self._stack.callback(self._erasures.close)
        self._verifier = Verifier()
        self._stack.callback(self._verifier.close)
        self._replicas = ReplicaServicer(
            ServingLimits(config.max_copies, config.copy_mb_per_s * 1e6)
        )
        self._address = config.advertise or ""
        self._opening: asyncio.Future[Store] | None = None
        self._executor: Executor
        self._balls: BallStreamer
        self._images: ImageEncoder

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer to a server."""
        spb_grpc.add_SearchServiceServicer_to_server(self, server)
        rpb_grpc.add_ReplicaServiceServicer_to_server(self._replicas, server)

    def listens(self, address: str) -> None:
        """Advertise where the server listens, unless something else is, or it is a wildcard."""
        host = address.rpartition(":")[0]
        if self._config.advertise is None and host not in _WILDCARDS:
            self._address = address

    async def warm_up(self) -> None:
        """Open the store, compile the kernels, reach for the encoder."""
        config = self._config
        began_s = time.monotonic()
        self._readiness.stage = "starting the kernels' threads"
        self._executor = await asyncio.to_thread(
            lambda: Executor(n_threads=config.n_threads, max_queue=config.max_queue)
        )
        self._stack.callback(self._executor.close)
        self._balls = BallStreamer(self._executor, config.max_message_bytes)
        self._images = await self._stack.enter_async_context(
            ImageEncoder(config.encoder, config.max_message_bytes, config.encoder_security)
        )
        store_config = StoreConfig(
            data_dir=config.data_dir,
            redis_url=config.store_url(),
            checkpoint_interval_s=config.checkpoint_interval_s,
            compaction_share=config.compaction_share,
            compaction_min_rows=config.compaction_min_rows,
            compaction_mb_per_s=config.compaction_mb_per_s,
            log_budget_bytes=config.log_budget_mb << 20,
            address=self._address,
            replica_silence_s=config.replica_silence_s,
            scrub_mb_per_s=config.scrub_mb_per_s,
            scrub_interval_s=config.scrub_interval_s,
        )
        peers = GrpcPeers(config.max_message_bytes, config.peer_security)
        self._readiness.stage = "opening the store"
        # Kept, because a signal may end the waiting, but not the opening.
        self._opening = asyncio.ensure_future(asyncio.to_thread(Store.open, store_config, peers))
        opening_s = time.monotonic()
        self._store = await asyncio.shield(self._opening)
        self._replicas.serve(self._store)
        opened_s = time.monotonic()
        self._readiness.stage = "compiling the kernels"
        await self._executor.run(lambda cancel: self._engine.warm_up())
        self._is_open = True
        for stage, took_s in (
            ("executor", opening_s - began_s),
            ("store", opened_s - opening_s),
            ("kernels", time.monotonic() - opened_s),
        ):
            logger.info("ready stage %s: %.3f s", stage, took_s)

    def state(self) -> ServiceState:
        """Return how the service is."""
        if not self._is_open:
            return self._readiness.while_starting()
        return self._readiness.of(self._executor, self._store.collections())

    def drain(self) -> None:
        """Have streams that would go on for ever end: they look at `stopping`."""
        self.stopping.set()

    def metrics(self) -> Iterable[Metric]:
        """Return what Prometheus is told."""
        yield from store_metrics(self._store)
        yield from self._metrics.collect(self._executor, self._config.max_queue)

    async def close(self) -> None:
        """Stop the executor, checkpoint and close the store."""
        await self._stack.aclose()
        await self._replicas.close()
        if self._opening is not None:
            with contextlib.suppress(HashlensError, OSError):  # Then `warm_up` has raised it.
                store = await self._opening
                await asyncio.to_thread(store.close)
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    async def Search(  # noqa: N802 - the contract's name
        self, request: spb.SearchRequest, context: Context
    ) -> spb.SearchResponse:
        """Answer one query."""
        started_ns = time.monotonic_ns()
        ends_s = self._ends_s(context)
        collection = await self._collection(request.collection, context)
        spec = collection.spec
        options = checks.options_of(request.options, spec)
        query = checks.query_of(request.query, spec, options.rank, field="query")
        snapshot = await self._reached(collection, options.min_version, ends_s, options.filter)
        wait_ns = time.monotonic_ns() - started_ns
        self._check_fits(1, snapshot, options)
        answerer = self._answerer(collection, snapshot, options, ends_s)
        with self._metrics.query():
            result = await answerer.answer(query, await answerer.meanings(), field="query")
            reply = await self._replied(result, answerer, wait_ns, started_ns)
        check_size(reply.ByteSize(), self._config.max_message_bytes, _ADVICE)
        return reply

    async def SearchBatch(  # noqa: N802 - the contract's name
        self, request: spb.SearchBatchRequest, context: Context
    ) -> spb.SearchBatchResponse:
        """Answer several queries on one version of the data, each by itself."""
        started_ns = time.monotonic_ns()
        ends_s = self._ends_s(context)
        n = len(request.queries)
        if n > self._config.max_batch_queries:
            raise InvalidInputError(
                f"{n} queries: at most {self._config.max_batch_queries} fit one SearchBatch; "
                "send several",
                field="queries",
            )
        collection = await self._collection(request.collection, context)
        options = checks.options_of(request.options, collection.spec)
        snapshot = await self._reached(collection, options.min_version, ends_s, options.filter)
        wait_ns = time.monotonic_ns() - started_ns
        self._check_fits(n, snapshot, options)
        answerer = self._answerer(collection, snapshot, options, ends_s, n_queries=n)
        meanings = await answerer.meanings()

        answered_bytes = 0

        async def answer(i: int, message: spb.Query) -> spb.SearchBatchResult:
            nonlocal answered_bytes
            field = f"queries[{i}]"
            try:
                with self._metrics.query():
                    query = checks.query_of(message, collection.spec, options.rank, field=field)
                    result = await answerer.answer(query, meanings, field=field)
            except HashlensError as error:
                return spb.SearchBatchResult(error=status_of(error))
            reply = await self._replied(result, answerer, wait_ns, started_ns)
            # Refused as soon as it is too large: what waits then would not be sent.
            answered_bytes += reply.ByteSize()
            check_size(answered_bytes, self._config.max_message_bytes, _ADVICE)
            return spb.SearchBatchResult(answer=reply)

        answers = [asyncio.ensure_future(answer(i, q)) for i, q in enumerate(request.queries)]
        try:
            results = await asyncio.gather(*answers)
        finally:
            for one in answers:
                one.cancel()
        reply = spb.SearchBatchResponse(results=results)
        check_size(reply.ByteSize(), self._config.max_message_bytes, _ADVICE)
        return reply

    async def StreamBall(  # noqa: N802 - the contract's name
        self, request: spb.StreamBallRequest, context: Context
    ) -> AsyncIterator[spb.StreamBallResponse]:
        """Send all rows within a radius, in the order in which they were written."""
        started_ns = time.monotonic_ns()
        ends_s = self._ends_s(context)
        collection = await self._collection(request.collection, context)
        radius_bits = checks.radius_of(request.radius_bits, collection.spec, field="radius_bits")
        query = checks.query_of(request.query, collection.spec, Rank.HAMMING, field="query")
        wanted = checks.filter_of(request.filter, field="filter")
        # The deadline is for reading all of it, which may take hours.
        reached_s = min(ends_s, time.monotonic() + self._config.default_deadline_s)
        snapshot = await self._reached(collection, request.min_version, reached_s, wanted)
        timings = spb.StageTimings(wait_version_ns=time.monotonic_ns() - started_ns)
        ball = Ball(
            snapshot=snapshot,
            code=await self._code_of(query, snapshot, collection, ends_s, timings),
            radius_bits=radius_bits,
            with_payload=request.with_payload,
            with_code=request.with_code,
        )
        exact = not collection.is_lost
        with self._metrics.query():
            async for reply in self._balls.stream(ball, ends_s=ends_s, exact=exact):
                if reply.HasField("receipt"):
                    reply.receipt.timings.MergeFrom(timings)
                    reply.receipt.timings.total_ns = time.monotonic_ns() - started_ns
                    self._metrics.observe(reply.receipt, reply.receipt.timings)
                yield reply

    async def Audit(  # noqa: N802 - the contract's name
        self, request: spb.AuditRequest, context: Context
    ) -> spb.AuditResponse:
        """Answer one query in two stages and exhaustively."""
        started_ns = time.monotonic_ns()
        ends_s = self._ends_s(context)
        asked = request.search
        collection = await self._collection(asked.collection, context, field="search.collection")
        spec = collection.spec
        check_auditable(spec, field="search.collection")
        options = checks.options_of(asked.options, spec, field="search.options")
        # Whatever ranks the answer, the exhaustive one needs the feature.
        query = checks.query_of(asked.query, spec, Rank.EUCLIDEAN, field="search.query")
        snapshot = await self._reached(collection, options.min_version, ends_s, options.filter)
        wait_ns = time.monotonic_ns() - started_ns
        self._check_fits(1, snapshot, options)
        answerer = self._answerer(collection, snapshot, options, ends_s)
        with self._metrics.query():
            result = await self._auditor.audit(answerer, query, field="search.query")
        reply = await in_thread(
            lambda cancel: convert.audit_to_proto(result, spec.n_bits, check=cancel.check)
        )
        reply.answer.receipt.timings.wait_version_ns = wait_ns
        reply.answer.receipt.timings.total_ns = time.monotonic_ns() - started_ns
        check_size(reply.ByteSize(), self._config.max_message_bytes, _ADVICE)
        return reply

    async def _replied(
        self, result: SearchResult, answerer: Answerer, wait_ns: int, started_ns: int
    ) -> spb.SearchResponse:
        """Return an answer's wire form, its receipt complete, and count what it cost."""
        began_ns = time.monotonic_ns()
        n_bits, packed = answerer.collection.spec.n_bits, answerer.options.packed
        reply = await reply_of(result, n_bits, packed=packed)
        ended_ns = time.monotonic_ns()
        reply.receipt.timings.wait_version_ns = wait_ns
        reply.receipt.timings.total_ns = ended_ns - started_ns
        self._metrics.observe(
            result.receipt,
            result.receipt.timings,
            wait_version_ns=wait_ns,
            reply_ns=ended_ns - began_ns,
            has_spans=answerer.is_alone,
        )
        return reply

    def _check_fits(self, n_queries: int, snapshot: Snapshot, options: SearchOptions) -> None:
        checks.check_reply_fits(
            n_queries * min(options.k, snapshot.n_alive),
            snapshot,
            with_code=options.with_code,
            with_feature=options.with_feature,
            max_message_bytes=self._config.max_message_bytes,
        )

    def _answerer(
        self,
        collection: Collection,
        snapshot: Snapshot,
        options: SearchOptions,
        ends_s: float,
        *,
        n_queries: int = 1,
    ) -> Answerer:
        return Answerer(
            executor=self._executor,
            together=self._together,
            images=self._images,
            collection=collection,
            snapshot=snapshot,
            options=replace(options, filter=None),  # The snapshot is through it.
            is_alone=n_queries == 1,
            ends_s=ends_s,
        )

    async def _code_of(
        self,
        query: Query,
        snapshot: Snapshot,
        collection: Collection,
        ends_s: float,
        timings: spb.StageTimings,
    ) -> bytes:
        """Return a query's code; if the encoder is asked for it, `timings` get what that took."""
        if query.embedding is not None:
            return query.embedding.code
        if query.image is None:  # Reading what is stored may have to wait for a disk.
            return (await asyncio.to_thread(embedding_of, snapshot, query.id or "")).code
        asked_ns = time.monotonic_ns()
        encoded = await self._images.encode(
            query.image,
            collection.spec,
            with_activations=False,
            deadline_s=ends_s - time.monotonic(),
            field="query.image",
        )
        timings.encode_call_ns = time.monotonic_ns() - asked_ns
        timings.encode.CopyFrom(convert.encode_timings_to_proto(encoded.timings))
        return encoded.embedding.code
