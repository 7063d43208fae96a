"""RPCs that write items, delete them and read them back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from hashlens import convert
from hashlens.rpc.limits import check_size
from hashlens.v1 import search_service_pb2 as spb
from search_service import checks, writes
from search_service.calls import Calls, Context
from search_service.cancel import Cancel, in_thread
from search_service.images import ImageEncoder
from search_service.items import items_of
from search_service.snapshot import Snapshot
from search_service.storage.collection import Collection
from search_service.upsert_stream import UpsertStream

_ITEMS_AT_ONCE = 256
"""Items that are read between two looks at whether anybody waits: a few milliseconds."""


class ItemsRpc(Calls):
    """Answers what is asked about single items."""

    _images: ImageEncoder
    stopping: asyncio.Event
    """Set when the server stops."""

    async def Upsert(  # noqa: N802 - the contract's name
        self, request: spb.UpsertRequest, context: Context
    ) -> spb.UpsertResponse:
        """Write items; an image that cannot be read fails alone."""
        ends_s = self._ends_s(context)
        collection = await self._collection(request.collection, context)
        request_id = writes.request_id_of(request.request_id)
        write = await writes.prepare(request, collection.spec, self._images, ends_s)
        version = await self._in_store(
            lambda left_s: collection.upsert(
                write.records,
                request_id=request_id,
                deadline_s=left_s,
                content=write.content(),
            ),
            ends_s,
        )
        return spb.UpsertResponse(
            version=version, n_written=len(write.records), failures=write.failures
        )

    async def UpsertStream(  # noqa: N802 - the contract's name
        self, requests: AsyncIterator[spb.UpsertStreamRequest], context: Context
    ) -> AsyncIterator[spb.UpsertStreamResponse]:
        """Write items as they come, each by itself, and answer in their order."""

        async def find(name: str) -> Collection:
            return await self._collection(name, context)

        stream = UpsertStream(find, self._images, self._threads, self._config)
        async for reply in stream.answers(requests, context, self.stopping):
            yield reply

    async def Delete(  # noqa: N802 - the contract's name
        self, request: spb.DeleteRequest, context: Context
    ) -> spb.DeleteResponse:
        """Remove items by id."""
        ends_s = self._ends_s(context)
        collection = await self._collection(request.collection, context)
        request_id = writes.request_id_of(request.request_id)
        ids = [
            convert.check_id(item_id, field=f"ids[{i}]") for i, item_id in enumerate(request.ids)
        ]
        result = await self._in_store(
            lambda left_s: collection.delete(ids, request_id=request_id, deadline_s=left_s), ends_s
        )
        return spb.DeleteResponse(version=result.version, n_deleted=result.n_deleted)

    async def GetItems(  # noqa: N802 - the contract's name
        self, request: spb.GetItemsRequest, context: Context
    ) -> spb.GetItemsResponse:
        """Read items back."""
        collection = await self._collection(request.collection, context)
        ids = [
            convert.check_id(item_id, field=f"ids[{i}]") for i, item_id in enumerate(request.ids)
        ]
        snapshot = await self._reached(collection, request.min_version, self._ends_s(context))
        checks.check_reply_fits(
            len(ids),
            snapshot,
            with_code=True,
            with_feature=request.with_feature,
            max_message_bytes=self._config.max_message_bytes,
        )

        reply = await in_thread(
            lambda cancel: items_to_proto(
                snapshot,
                ids,
                with_feature=request.with_feature,
                with_payload=request.with_payload,
                cancel=cancel,
            )
        )
        check_size(
            reply.ByteSize(), self._config.max_message_bytes, "ask for fewer, or without features"
        )
        return reply


def items_to_proto(
    snapshot: Snapshot,
    ids: Sequence[str],
    *,
    with_feature: bool,
    with_payload: bool,
    cancel: Cancel,
) -> spb.GetItemsResponse:
    """Return the items that are there, in the order of `ids`; see `items_of`.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says; polled every few hundred items.
    """
    reply = spb.GetItemsResponse(version=snapshot.version)
    for lo in range(0, len(ids), _ITEMS_AT_ONCE):
        cancel.check()
        items = items_of(
            snapshot,
            ids[lo : lo + _ITEMS_AT_ONCE],
            with_feature=with_feature,
            with_payload=with_payload,
        )
        reply.items.extend(map(convert.item_to_proto, items))
    return reply
