"""SearchService: protobuf to store and engine and back."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from hashlens import convert
from hashlens.errors import HashlensError, InvalidInputError
from hashlens.rpc.limits import check_size
from hashlens.rpc.server import deadline_s
from hashlens.rpc.status import status_of
from hashlens.types import (
    DeleteResult,
    Embedding,
    EncodeTimings,
    Item,
    Query,
    SearchOptions,
    SearchResult,
)
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from search_service import checks
from search_service.config import SearchConfig
from search_service.engine import Engine, embedding_of
from search_service.executor import Executor
from search_service.images import ImageEncoder
from search_service.items import items_of
from search_service.snapshot import Snapshot
from search_service.storage.collection import Collection
from search_service.storage.records import Record
from search_service.storage.store import Store, StoreConfig

logger = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")

_LOOKUP_S = 2.0
"""Longest that a listing waits for Redis; without it, it lists what is on this replica."""

_ADVICE = "ask for fewer hits, or leave features out"


class SearchServicer(spb_grpc.SearchServiceServicer):
    """Answers the RPCs; a `hashlens.rpc.server.Service`.

    Parameters
    ----------
    config
        See `SearchConfig`.
    """

    names: Sequence[str] = ("hashlens.v1.SearchService",)

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._stack = AsyncExitStack()
        self._threads = ThreadPoolExecutor(config.n_store_threads, thread_name_prefix="store")
        self._engine = Engine()
        self._store: Store
        self._executor: Executor
        self._images: ImageEncoder

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer to a server."""
        spb_grpc.add_SearchServiceServicer_to_server(self, server)

    async def warm_up(self) -> None:
        """Open the store, compile the kernels, reach for the encoder."""
        config = self._config
        self._executor = await self._in_thread(
            lambda: Executor(n_threads=config.n_threads, max_queue=config.max_queue)
        )
        self._stack.callback(self._executor.close)
        self._images = await self._stack.enter_async_context(
            ImageEncoder(config.encoder, config.max_message_bytes)
        )
        store_config = StoreConfig(
            data_dir=config.data_dir,
            redis_url=config.redis_url,
            checkpoint_interval_s=config.checkpoint_interval_s,
        )
        self._store = await self._in_thread(Store.open, store_config)
        await self._executor.run(lambda cancel: self._engine.warm_up())

    async def close(self) -> None:
        """Stop the executor, checkpoint and close the store."""
        await self._stack.aclose()
        if hasattr(self, "_store"):
            await self._in_thread(self._store.close)
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    # -- collections -----------------------------------------------------------------------------

    async def CreateCollection(  # noqa: N802 - the contract's name
        self, request: spb.CreateCollectionRequest, context: _Context
    ) -> spb.CreateCollectionResponse:
        """Make a collection."""
        try:
            spec = convert.spec_from_proto(request.spec)
        except InvalidInputError as error:
            raise error.within("spec") from None
        left_s = deadline_s(context, self._config)
        collection = await self._in_thread(lambda: self._store.create(spec, deadline_s=left_s))
        return spb.CreateCollectionResponse(collection=await self._info(collection))

    async def GetCollection(  # noqa: N802 - the contract's name
        self, request: spb.GetCollectionRequest, context: _Context
    ) -> spb.GetCollectionResponse:
        """Describe one collection."""
        collection = await self._collection(request.name, context, field="name")
        await self._snapshot(collection, request.min_version, deadline_s(context, self._config))
        return spb.GetCollectionResponse(collection=await self._info(collection))

    async def ListCollections(  # noqa: N802 - the contract's name
        self, request: spb.ListCollectionsRequest, context: _Context
    ) -> spb.ListCollectionsResponse:
        """Describe all collections."""
        left_s = deadline_s(context, self._config)
        infos = await self._in_thread(lambda: self._store.list(deadline_s=min(left_s, _LOOKUP_S)))
        return spb.ListCollectionsResponse(
            collections=[convert.info_to_proto(info) for info in infos]
        )

    async def DropCollection(  # noqa: N802 - the contract's name
        self, request: spb.DropCollectionRequest, context: _Context
    ) -> spb.DropCollectionResponse:
        """Remove a collection."""
        name = convert.check_collection_name(request.name, field="name")
        left_s = deadline_s(context, self._config)
        await self._in_thread(lambda: self._store.drop(name, deadline_s=left_s))
        return spb.DropCollectionResponse()

    # -- items -----------------------------------------------------------------------------------

    async def Upsert(  # noqa: N802 - the contract's name
        self, request: spb.UpsertRequest, context: _Context
    ) -> spb.UpsertResponse:
        """Write items; an image that cannot be read fails alone."""
        left_s = deadline_s(context, self._config)
        started_ns = time.monotonic_ns()
        collection = await self._collection(request.collection, context)
        request_id = _request_id(request.request_id)
        spec = collection.spec
        items = [
            checks.item_of(message, spec, field=f"items[{i}]")
            for i, message in enumerate(request.items)
        ]
        positions = [i for i, item in enumerate(items) if item.image is not None]
        embeddings = {i: item.embedding for i, item in enumerate(items) if item.embedding}
        failures = []
        if positions:
            results = await self._images.encode_all(
                [items[i].image or b"" for i in positions],
                spec,
                deadline_s=left_s,
                fields=[f"items[{i}].image" for i in positions],
            )
            for i, result in zip(positions, results, strict=True):
                if isinstance(result, HashlensError):
                    failures.append(
                        spb.ItemFailure(index=i, id=items[i].id, error=status_of(result))
                    )
                else:
                    embeddings[i] = result.embedding
        records = [_record(items[i], embeddings[i]) for i in sorted(embeddings)]
        # Another encoder may give an image's embedding other last digits: the request id of a
        # write with images is tied to the images.
        content = _content(request) if positions else None
        version = await self._in_thread(
            lambda: collection.upsert(
                records,
                request_id=request_id,
                deadline_s=left_s - (time.monotonic_ns() - started_ns) / 1e9,
                content=content,
            )
        )
        return spb.UpsertResponse(version=version, n_written=len(records), failures=failures)

    async def Delete(  # noqa: N802 - the contract's name
        self, request: spb.DeleteRequest, context: _Context
    ) -> spb.DeleteResponse:
        """Remove items by id."""
        left_s = deadline_s(context, self._config)
        collection = await self._collection(request.collection, context)
        request_id = _request_id(request.request_id)
        ids = [
            convert.check_id(item_id, field=f"ids[{i}]") for i, item_id in enumerate(request.ids)
        ]
        result: DeleteResult = await self._in_thread(
            lambda: collection.delete(ids, request_id=request_id, deadline_s=left_s)
        )
        return spb.DeleteResponse(version=result.version, n_deleted=result.n_deleted)

    async def GetItems(  # noqa: N802 - the contract's name
        self, request: spb.GetItemsRequest, context: _Context
    ) -> spb.GetItemsResponse:
        """Read items back."""
        collection = await self._collection(request.collection, context)
        snapshot, _ = await self._snapshot(
            collection, request.min_version, deadline_s(context, self._config)
        )
        ids = [
            convert.check_id(item_id, field=f"ids[{i}]") for i, item_id in enumerate(request.ids)
        ]
        items = await self._in_thread(
            lambda: items_of(
                snapshot,
                ids,
                with_feature=request.with_feature,
                with_payload=request.with_payload,
            )
        )
        reply = spb.GetItemsResponse(
            items=[convert.item_to_proto(item) for item in items], version=snapshot.version
        )
        check_size(
            reply.ByteSize(), self._config.max_message_bytes, "ask for fewer, or without features"
        )
        return reply

    # -- search ----------------------------------------------------------------------------------

    async def Search(  # noqa: N802 - the contract's name
        self, request: spb.SearchRequest, context: _Context
    ) -> spb.SearchResponse:
        """Answer one query."""
        started_ns = time.monotonic_ns()
        left_s = deadline_s(context, self._config)
        collection = await self._collection(request.collection, context)
        spec = collection.spec
        options = checks.options_of(request.options, spec)
        query = checks.query_of(request.query, spec, options.rank, field="query")
        snapshot, wait_ns = await self._snapshot(collection, options.min_version, left_s)
        result = await self._answer(
            snapshot, query, options, collection, started_ns, left_s, field="query"
        )
        timings = replace(
            result.receipt.timings,
            wait_version_ns=wait_ns,
            total_ns=time.monotonic_ns() - started_ns,
        )
        result = replace(result, receipt=replace(result.receipt, timings=timings))
        reply = convert.result_to_proto(result, spec.n_bits)
        check_size(reply.ByteSize(), self._config.max_message_bytes, _ADVICE)
        return reply

    async def SearchBatch(  # noqa: N802 - the contract's name
        self, request: spb.SearchBatchRequest, context: _Context
    ) -> spb.SearchBatchResponse:
        """Answer several queries on one version of the data, each by itself."""
        started_ns = time.monotonic_ns()
        left_s = deadline_s(context, self._config)
        n = len(request.queries)
        if n > self._config.max_batch_queries:
            raise InvalidInputError(
                f"{n} queries: at most {self._config.max_batch_queries} fit one SearchBatch; "
                "send several",
                field="queries",
            )
        collection = await self._collection(request.collection, context)
        options = checks.options_of(request.options, collection.spec)
        snapshot, wait_ns = await self._snapshot(collection, options.min_version, left_s)

        async def answer(i: int, message: spb.Query) -> spb.SearchBatchResult:
            field = f"queries[{i}]"
            try:
                query = checks.query_of(message, collection.spec, options.rank, field=field)
                result = await self._answer(
                    snapshot, query, options, collection, started_ns, left_s, field=field
                )
            except HashlensError as error:
                return spb.SearchBatchResult(error=status_of(error))
            timings = replace(
                result.receipt.timings,
                wait_version_ns=wait_ns,
                total_ns=time.monotonic_ns() - started_ns,
            )
            result = replace(result, receipt=replace(result.receipt, timings=timings))
            return spb.SearchBatchResult(
                answer=convert.result_to_proto(result, collection.spec.n_bits)
            )

        results = await asyncio.gather(*(answer(i, q) for i, q in enumerate(request.queries)))
        reply = spb.SearchBatchResponse(results=results)
        check_size(reply.ByteSize(), self._config.max_message_bytes, _ADVICE)
        return reply

    # -- helpers ---------------------------------------------------------------------------------

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what may wait for Redis or a disk outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _collection(
        self, name: str, context: _Context, *, field: str = "collection"
    ) -> Collection:
        convert.check_collection_name(name, field=field)
        found = self._store.find(name)
        if found is not None:
            return found
        left_s = deadline_s(context, self._config)
        return await self._in_thread(lambda: self._store.get(name, deadline_s=left_s))

    async def _info(self, collection: Collection) -> spb.CollectionInfo:
        return convert.info_to_proto(await self._in_thread(collection.info))

    async def _snapshot(
        self, collection: Collection, min_version: int, left_s: float
    ) -> tuple[Snapshot, int]:
        """Return a snapshot at least as new as asked for, and the nanoseconds waited for it."""
        snapshot = collection.snapshot()
        if snapshot.version >= min_version:
            return snapshot, 0
        started_ns = time.monotonic_ns()
        snapshot = await self._in_thread(collection.wait_for, min_version, left_s)
        return snapshot, time.monotonic_ns() - started_ns

    async def _answer(
        self,
        snapshot: Snapshot,
        query: Query,
        options: SearchOptions,
        collection: Collection,
        started_ns: int,
        left_s: float,
        *,
        field: str,
    ) -> SearchResult:
        """Turn a query into an embedding and have the engine search."""
        encode, call_ns = EncodeTimings(), 0
        if query.image is not None:
            asked_ns = time.monotonic_ns()
            encoded = await self._images.encode(
                query.image,
                collection.spec,
                with_activations=options.with_explanation,
                deadline_s=left_s - (asked_ns - started_ns) / 1e9,
                field=f"{field}.image",
            )
            encode, call_ns = encoded.timings, time.monotonic_ns() - asked_ns
            embedding = encoded.embedding
        elif query.id is not None:
            embedding = embedding_of(snapshot, query.id)
        else:
            assert query.embedding is not None
            embedding = query.embedding
        outcome = await self._executor.run(
            lambda cancel: self._engine.search(snapshot, embedding, options, cancel),
            deadline_s=left_s - (time.monotonic_ns() - started_ns) / 1e9,
        )
        result = outcome.value
        timings = replace(
            result.receipt.timings,
            encode=encode,
            encode_call_ns=call_ns,
            queue_ns=outcome.queue_ns,
        )
        return replace(result, receipt=replace(result.receipt, timings=timings))


def _request_id(given: str) -> str:
    if len(given.encode()) > 64:
        raise InvalidInputError("a request_id has at most 64 bytes", field="request_id")
    return given or uuid.uuid4().hex


def _content(request: spb.UpsertRequest) -> bytes:
    return b"".join(item.SerializeToString(deterministic=True) for item in request.items)


def _record(item: Item, embedding: Embedding) -> Record:
    """Return what the store keeps of an item."""
    feature = b"" if embedding.feature is None else embedding.feature.tobytes()
    return Record(id=item.id, code=embedding.code, feature=feature, payload=item.payload)
