"""RPCs that make, describe and remove collections."""

from __future__ import annotations

from typing import Final

from hashlens import convert
from hashlens.errors import InvalidInputError
from hashlens.v1 import search_service_pb2 as spb
from search_service.calls import Calls, Context

_LOOKUP_S: Final = 2.0
"""Longest that a listing waits for Redis; without it, it lists what is on this replica."""


class CollectionsRpc(Calls):
    """Answers what is asked about whole collections."""

    async def CreateCollection(  # noqa: N802 - the contract's name
        self, request: spb.CreateCollectionRequest, context: Context
    ) -> spb.CreateCollectionResponse:
        """Make a collection."""
        try:
            spec = convert.spec_from_proto(request.spec)
        except InvalidInputError as error:
            raise error.within("spec") from None
        ends_s = self._ends_s(context)
        collection = await self._in_store(
            lambda left_s: self._store.create(spec, deadline_s=left_s), ends_s
        )
        return spb.CreateCollectionResponse(collection=convert.info_to_proto(collection.info()))

    async def GetCollection(  # noqa: N802 - the contract's name
        self, request: spb.GetCollectionRequest, context: Context
    ) -> spb.GetCollectionResponse:
        """Describe one collection."""
        collection = await self._collection(request.name, context, field="name")
        if not collection.is_lost:  # Then it would not come, and its state is what is asked for.
            await self._reached(collection, request.min_version, self._ends_s(context))
        reply = spb.GetCollectionResponse()
        if request.with_replicas:
            found = await self._in_store(
                lambda left_s: collection.look(left_s), self._ends_s(context)
            )
            reply.replicas.extend(map(convert.replica_to_proto, found.infos))
            reply.newest_version = found.seq
        reply.collection.CopyFrom(convert.info_to_proto(collection.newest.info()))
        return reply

    async def ListCollections(  # noqa: N802 - the contract's name
        self, request: spb.ListCollectionsRequest, context: Context
    ) -> spb.ListCollectionsResponse:
        """Describe all collections."""
        ends_s = self._ends_s(context)
        infos = await self._in_store(
            lambda left_s: self._store.list(deadline_s=min(left_s, _LOOKUP_S)), ends_s
        )
        return spb.ListCollectionsResponse(
            collections=[convert.info_to_proto(info) for info in infos]
        )

    async def DropCollection(  # noqa: N802 - the contract's name
        self, request: spb.DropCollectionRequest, context: Context
    ) -> spb.DropCollectionResponse:
        """Remove a collection."""
        name = convert.check_collection_name(request.name, field="name")
        ends_s = self._ends_s(context)
        await self._in_store(lambda left_s: self._store.drop(name, deadline_s=left_s), ends_s)
        return spb.DropCollectionResponse()
