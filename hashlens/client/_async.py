"""The asynchronous client; a test keeps its verbs those of `Client`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens import convert
from hashlens.client import wire
from hashlens.client.wire import ClientConfig, Wire, WriteTally
from hashlens.errors import HashlensError
from hashlens.rpc import limits
from hashlens.rpc.channel import connect_aio
from hashlens.rpc.status import error_of_call
from hashlens.types import (
    AuditResult,
    BallPart,
    CollectionInfo,
    CollectionSpec,
    CompactResult,
    DeleteResult,
    Embedding,
    Encoded,
    FeatureDtype,
    Item,
    ModelInfo,
    Query,
    ReplicaInfo,
    SearchOptions,
    SearchResult,
    ServiceHealth,
    TagFilter,
    VerifyResult,
    WriteResult,
)
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc


class AsyncClient:
    """`hashlens.Client` with its verbs awaited, for one event loop.

    Every call has a deadline and raises a subclass of `HashlensError`. A client reads its own
    writes: its searches wait until the answering replica has applied them.

    Parameters
    ----------
    search
        ``host:port`` of the search service.
    encoder
        ``host:port`` of the encoder service.
    config
        Deadlines and limits.
    """

    def __init__(
        self,
        search: str = wire.SEARCH_TARGET,
        encoder: str = wire.ENCODER_TARGET,
        *,
        config: ClientConfig | None = None,
    ) -> None:
        self._config = config or ClientConfig()
        self._wire = Wire(self._config)
        options = limits.channel_options(self._config.max_message_bytes)
        self._channels = {
            target: connect_aio(target, options, self._config.security)
            for target in {search, encoder}
        }
        self._search = spb_grpc.SearchServiceStub(self._channels[search])
        self._encoder = enc_grpc.EncoderServiceStub(self._channels[encoder])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            await channel.close()

    # -- encoder ---------------------------------------------------------------------------------

    async def model(self, *, deadline_s: float | None = None) -> ModelInfo:
        """Return what the encoder says of its model."""
        reply = await self._call(self._encoder.GetModel, enc.GetModelRequest(), deadline_s)
        return convert.model_from_proto(reply)

    async def encode(
        self,
        image: bytes,
        *,
        feature_dtype: FeatureDtype | None = None,
        with_activations: bool = False,
        deadline_s: float | None = None,
    ) -> Encoded:
        """Return one image's embedding.

        Parameters
        ----------
        image
            Bytes of a JPEG, PNG or WebP, or the first frame of a GIF, BMP or TIFF.
        feature_dtype
            Number format of the feature; None for the server's.
        with_activations
            Return H before the threshold as well.
        deadline_s
            Time for the call, in seconds; None for the client's.

        Raises
        ------
        InvalidInputError
            The bytes are no image that the encoder accepts.
        """
        request = self._wire.encode_request(image, feature_dtype, with_activations)
        reply = await self._call(self._encoder.Encode, request, deadline_s)
        return wire.encoded_of(reply.embedding, reply.timings)

    async def encode_batch(
        self,
        images: Sequence[bytes],
        *,
        feature_dtype: FeatureDtype | None = None,
        with_activations: bool = False,
        deadline_s: float | None = None,
    ) -> list[Encoded | HashlensError]:
        """Return an embedding, or the error in its place, for each of any number of images.

        They are sent in chunks; `deadline_s` is for each. See `encode`.
        """
        results: list[Encoded | HashlensError] = []
        for request in self._wire.encode_batches(images, feature_dtype, with_activations):
            reply = await self._call(self._encoder.EncodeBatch, request, deadline_s)
            results += self._wire.encode_results(reply)
        return results

    # -- collections and items -------------------------------------------------------------------

    async def create_collection(
        self,
        name: str,
        *,
        spec: CollectionSpec | None = None,
        feature_dtype: FeatureDtype | None = None,
        expected_rows: int = 1_000_000,
        deadline_s: float | None = None,
    ) -> CollectionInfo:
        """Make a collection; one that is there with the same specification is no error.

        Parameters
        ----------
        name
            1 to 64 of a-z, 0-9, ``_`` and ``-``.
        spec
            What to bind it to. None: the encoder's model, at its width.
        feature_dtype, expected_rows
            See `CollectionSpec`; used when `spec` is None.
        deadline_s
            Time for each call, in seconds; None for the client's.

        Raises
        ------
        AlreadyExistsError
            It is there with another specification.
        """
        if spec is None:
            model = await self.model(deadline_s=deadline_s)
            spec = wire.spec_for(name, model, feature_dtype, expected_rows)
        request = spb.CreateCollectionRequest(spec=convert.spec_to_proto(spec))
        reply = await self._call(self._search.CreateCollection, request, deadline_s)
        return self._wire.seen(convert.info_from_proto(reply.collection))

    async def collection(self, name: str, *, deadline_s: float | None = None) -> CollectionInfo:
        """Return a collection's state; NotFoundError if there is none."""
        request = spb.GetCollectionRequest(name=name, min_version=self._wire.version_of(name))
        reply = await self._call(self._search.GetCollection, request, deadline_s)
        return self._wire.seen(convert.info_from_proto(reply.collection))

    async def replicas(self, name: str, *, deadline_s: float | None = None) -> list[ReplicaInfo]:
        """Return all replicas of a collection that Redis knows, by id.

        Raises
        ------
        UnavailableError
            Redis is away.
        """
        request = spb.GetCollectionRequest(name=name, with_replicas=True)
        reply = await self._call(self._search.GetCollection, request, deadline_s)
        return [convert.replica_from_proto(info) for info in reply.replicas]

    async def collections(self, *, deadline_s: float | None = None) -> list[CollectionInfo]:
        """Return the state of all collections, by name."""
        request = spb.ListCollectionsRequest()
        reply = await self._call(self._search.ListCollections, request, deadline_s)
        return [convert.info_from_proto(info) for info in reply.collections]

    async def drop_collection(self, name: str, *, deadline_s: float | None = None) -> None:
        """Remove a collection and everything in it."""
        await self._call(
            self._search.DropCollection, spb.DropCollectionRequest(name=name), deadline_s
        )
        self._wire.forget(name)

    async def compact(
        self, collection: str, *, wait_for_replicas: bool = False, deadline_s: float | None = None
    ) -> CompactResult:
        """Erase the bytes of replaced and deleted items, and say how far that came.

        Searching and writing go on. Everything that is alive is copied, so allow more time than
        for a search.

        Parameters
        ----------
        collection
            Its name.
        wait_for_replicas
            Also wait, as long as the deadline lets, until all live replicas have done it.
        deadline_s
            Time for the call, in seconds; None for the client's.

        Raises
        ------
        DeadlineError
            It was not done in time and goes on; ask again for the receipt.
        """
        request = spb.CompactRequest(collection=collection, wait_for_replicas=wait_for_replicas)
        reply = await self._call(self._search.Compact, request, deadline_s)
        return convert.compact_from_proto(reply)

    async def upsert(
        self,
        collection: str,
        items: Iterable[Item],
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
    ) -> WriteResult:
        """Write items, in chunks, replacing those whose ids are there.

        An image that cannot be read is a failure in the result; anything else wrong raises, and
        earlier chunks stay written.

        Parameters
        ----------
        collection
            Its name.
        items
            Any number; an iterator is read as it is sent.
        request_id
            Repeating a whole call with the same id and items changes nothing. None: made up.
        deadline_s
            Time for each chunk, in seconds; None for the client's.
        """
        tally = WriteTally()
        for request in self._wire.upserts(collection, items, request_id):
            reply = await self._call(self._search.Upsert, request, deadline_s)
            tally.add(request, reply)
            self._wire.wrote(collection, reply.version)
        return tally.result()

    async def delete(
        self,
        collection: str,
        ids: Sequence[str],
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
    ) -> DeleteResult:
        """Remove items; ids that are not there are no error."""
        request = self._wire.delete_request(collection, ids, request_id)
        reply = await self._call(self._search.Delete, request, deadline_s)
        self._wire.wrote(collection, reply.version)
        return wire.deleted(reply)

    async def get_items(
        self,
        collection: str,
        ids: Sequence[str],
        *,
        with_feature: bool = False,
        with_payload: bool = True,
        min_version: int = 0,
        deadline_s: float | None = None,
    ) -> list[Item]:
        """Return the items that are there at `min_version` or later, in the order of `ids`."""
        request = self._wire.get_items_request(
            collection, ids, with_feature, with_payload, min_version
        )
        reply = await self._call(self._search.GetItems, request, deadline_s)
        return [convert.item_from_proto(item) for item in reply.items]

    # -- search ----------------------------------------------------------------------------------

    async def search(
        self,
        collection: str,
        *,
        image: bytes | None = None,
        embedding: Embedding | None = None,
        id: str | None = None,  # noqa: A002 - the contract's word
        k: int = 10,
        options: SearchOptions | None = None,
        deadline_s: float | None = None,
    ) -> SearchResult:
        """Return the nearest items to an image, an embedding or a stored item.

        Parameters
        ----------
        collection
            Its name.
        image, embedding, id
            The query, exactly one.
        k
            Hits wanted; `options`, when given, says it instead.
        options
            Everything else one can ask for.
        deadline_s
            Time for the call, in seconds; None for the client's.
        """
        query = wire.query_of(image, embedding, id)
        request = self._wire.search_request(collection, query, options or SearchOptions(k=k))
        return convert.result_from_proto(await self._call(self._search.Search, request, deadline_s))

    async def search_batch(
        self,
        collection: str,
        queries: Sequence[Query],
        *,
        k: int = 10,
        options: SearchOptions | None = None,
        deadline_s: float | None = None,
    ) -> list[SearchResult | HashlensError]:
        """Return an answer, or the error in its place, for each query, on one version of the data.

        See `search`.
        """
        request = self._wire.search_batch_request(
            collection, queries, options or SearchOptions(k=k)
        )
        reply = await self._call(self._search.SearchBatch, request, deadline_s)
        return self._wire.search_results(reply)

    async def audit(
        self,
        collection: str,
        *,
        image: bytes | None = None,
        embedding: Embedding | None = None,
        id: str | None = None,  # noqa: A002 - the contract's word
        k: int = 10,
        options: SearchOptions | None = None,
        deadline_s: float | None = None,
    ) -> AuditResult:
        """Answer a query as `search` does, and by comparing it with every item.

        The server reads every feature, a block at a time between other callers' searches: for a
        large collection, allow more time than for a search.

        Parameters
        ----------
        collection
            Its name; it has features.
        image, embedding, id
            The query, exactly one. Its feature is needed, whatever ranks the answer.
        k
            Hits wanted of both answers; `options`, when given, says it instead.
        options
            How to search, as for `search`. Ranked by Hamming distance, the answer is that of the
            coarse stage alone, and so is its recall.
        deadline_s
            Time for the call, in seconds; None for the client's.

        Raises
        ------
        PreconditionError
            The collection holds codes only.
        OverloadedError
            The server is at another audit.
        """
        query = wire.query_of(image, embedding, id)
        request = self._wire.audit_request(collection, query, options or SearchOptions(k=k))
        return convert.audit_from_proto(await self._call(self._search.Audit, request, deadline_s))

    def stream_ball(
        self,
        collection: str,
        *,
        radius_bits: int,
        image: bytes | None = None,
        embedding: Embedding | None = None,
        id: str | None = None,  # noqa: A002 - the contract's word
        with_payload: bool = True,
        with_code: bool = False,
        filter: TagFilter | None = None,  # noqa: A002 - the contract's word
        deadline_s: float | None = None,
    ) -> AsyncGenerator[BallPart]:
        """Return all items within a Hamming radius, part by part, in the order of writing.

        However many there are, neither side holds more than a part. The last part has the receipt.
        Closing the iterator (`contextlib.aclosing` does) stops the server.

        Parameters
        ----------
        collection
            Its name.
        radius_bits
            Largest Hamming distance, 0 to the collection's code length.
        image, embedding, id
            The centre, exactly one.
        with_payload, with_code
            What hits carry beside id and distance.
        filter
            Only items that pass; None: all.
        deadline_s
            Time for the whole ball, reading included, in seconds; None for the client's.

        Raises
        ------
        UnavailableError
            While iterating: the server went away before the end.
        """
        query = wire.query_of(image, embedding, id)
        request = self._wire.ball_request(
            collection, query, radius_bits, with_payload, with_code, filter
        )
        return self._parts(request, deadline_s)

    async def _parts(
        self, request: spb.StreamBallRequest, deadline_s: float | None
    ) -> AsyncGenerator[BallPart]:
        call = self._search.StreamBall(
            request,
            timeout=self._config.deadline_s if deadline_s is None else deadline_s,
            metadata=self._wire.metadata(),
        )
        try:
            async for message in call:
                yield convert.ball_part_from_proto(message)
        except grpc.aio.AioRpcError as failure:
            raise error_of_call(failure) from None
        finally:
            call.cancel()

    async def verify(
        self, collection: str, *, repair: bool = False, deadline_s: float | None = None
    ) -> VerifyResult:
        """Compare Redis with the answering replica's files, and check every checksum.

        Searching and writing go on. Reads everything, so allow more time than for a search.

        Parameters
        ----------
        collection
            Its name.
        repair
            Make the files anew if anything differs, with all features that are whole.
        deadline_s
            Time for the call, in seconds; None for the client's.

        Raises
        ------
        OverloadedError
            The server is at another check.
        """
        request = spb.VerifyRequest(collection=collection, repair=repair)
        reply = await self._call(self._search.Verify, request, deadline_s)
        return convert.verify_from_proto(reply)

    # -- health ----------------------------------------------------------------------------------

    async def health(self, *, deadline_s: float = 5.0) -> list[ServiceHealth]:
        """Return whether each service serves, and what it says of itself; never raises."""
        found = []
        for target, channel in sorted(self._channels.items()):
            check = health_pb2_grpc.HealthStub(channel).Check
            replies: list[health_pb2.HealthCheckResponse | None] = []
            trailing: Any = ()
            try:
                for name in wire.HEALTH_NAMES:
                    request = health_pb2.HealthCheckRequest(service=name)
                    call = check(request, timeout=deadline_s)
                    try:
                        replies.append(await call)
                    except grpc.RpcError as failure:
                        if not name or failure.code() is not grpc.StatusCode.NOT_FOUND:
                            raise error_of_call(failure) from None
                        replies.append(None)
                    else:
                        trailing = trailing or await call.trailing_metadata()
            except HashlensError as error:
                found.append(ServiceHealth(target=target, serving=False, detail=error.message))
            else:
                found.append(wire.health_of(target, replies, trailing))
        return found

    async def _call(
        self, method: Callable[..., Any], request: Any, deadline_s: float | None
    ) -> Any:
        try:
            return await method(
                request,
                timeout=self._config.deadline_s if deadline_s is None else deadline_s,
                metadata=self._wire.metadata(),
            )
        except grpc.aio.AioRpcError as failure:
            raise error_of_call(failure) from None
