"""The asynchronous client's verbs for collections and items."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence

from hashlens import convert
from hashlens.client import wire
from hashlens.client._async_encoder import AsyncEncoderCalls
from hashlens.client.stream_requests import UpsertRequests
from hashlens.client.tally import WriteTally
from hashlens.errors import HashlensError
from hashlens.types import (
    CollectionInfo,
    CollectionSpec,
    CompactResult,
    DeleteResult,
    FeatureDtype,
    Item,
    ReplicaInfo,
    VerifyResult,
    WriteResult,
)
from hashlens.v1 import search_service_pb2 as spb


class AsyncItemCalls(AsyncEncoderCalls):
    """Collections, and what is in them."""

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
        PreconditionError
            It has another collection of the name, or none any more.
        """
        reply = await self._known_to_redis(name, deadline_s)
        return [convert.replica_from_proto(info) for info in reply.replicas]

    async def newest_version(self, name: str, *, deadline_s: float | None = None) -> int:
        """Return a collection's version after the last write of anyone.

        Pass it as `min_version` to read all that was acknowledged before, on any replica.

        Raises
        ------
        UnavailableError
            Redis is away.
        PreconditionError
            It has another collection of the name, or none any more.
        """
        reply = await self._known_to_redis(name, deadline_s)
        return int(reply.newest_version)

    async def _known_to_redis(
        self, name: str, deadline_s: float | None
    ) -> spb.GetCollectionResponse:
        request = spb.GetCollectionRequest(name=name, with_replicas=True)
        reply: spb.GetCollectionResponse = await self._call(
            self._search.GetCollection, request, deadline_s
        )
        return reply

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

    def upsert_stream(
        self,
        collection: str,
        items: AsyncIterable[Item] | Iterable[Item],
        *,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[int | HashlensError]:
        """Write items as they come; yield a version, or the error in its place, for each.

        Results keep the order of the items, and of two items with one id the later stays. What is
        answered with a version is written. When the server stops or the connection ends, another
        call goes on with the first item that has no answer: it may be written already, and is
        written again. An item answered with UnavailableError or DeadlineError may be written, too.
        Closing the iterator (`contextlib.aclosing` does) ends the call.

        Parameters
        ----------
        collection
            Its name.
        items
            As `images` of `encode_stream`.
        deadline_s
            Time for the whole stream, in seconds; None: no end, but each answer has the client's.

        Raises
        ------
        NotFoundError
            While iterating: there is no such collection.
        DeadlineError, UnavailableError
            While iterating: as `encode_stream`.
        """
        requests = UpsertRequests(self._config, self._wire, collection)
        return self._exchange(self._search.UpsertStream, requests, items, deadline_s)

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
