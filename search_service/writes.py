"""An Upsert's items: checked, encoded where they are images, in the form that the store keeps."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

from hashlens.errors import HashlensError, InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.rpc.status import status_of
from hashlens.types import CollectionSpec, Embedding, Item
from hashlens.v1 import search_service_pb2 as spb
from search_service import checks
from search_service.cancel import Cancel, in_thread
from search_service.images import ImageEncoder
from search_service.storage.records import Record

_MAX_REQUEST_ID_BYTES = 64

_ITEMS_AT_ONCE = 16
"""Items that are checked in the event loop; more would keep searches waiting for milliseconds."""


@dataclass(frozen=True, slots=True)
class Write:
    """What is to be written, and what was refused."""

    records: list[Record] | PackedItems
    failures: list[spb.ItemFailure]
    request: spb.UpsertRequest
    has_images: bool

    def content(self) -> bytes | None:
        """Return what the request id is tied to; None: the records themselves.

        Another encoder may give an image's embedding other last digits, so a write with images is
        tied to the images.
        """
        if not self.has_images:
            return None
        content = spb.UpsertRequest(items=self.request.items)
        return content.SerializeToString(deterministic=True)


async def prepare(
    request: spb.UpsertRequest, spec: CollectionSpec, images: ImageEncoder, ends_s: float
) -> Write:
    """Check all items of a request and have its images encoded.

    Parameters
    ----------
    request
        From a caller.
    spec
        What the collection is bound to.
    images
        The encoder.
    ends_s
        When the call must be answered, on the clock of `time.monotonic`.

    Raises
    ------
    HashlensError
        An item is wrong, or an image could not be encoded through no fault of its own. Were the
        others written then, repeating the call with its request id would find it done and never
        write this one; so nothing is.
    """
    if request.HasField("packed"):
        if request.items:
            raise InvalidInputError("send items or packed, not both", field="packed")
        packed = await asyncio.to_thread(checks.packed_of, request.packed, spec, field="packed")
        return Write(packed, [], request, has_images=False)
    if len(request.items) > _ITEMS_AT_ONCE:
        items = await in_thread(lambda cancel: _checked(request, spec, cancel))
    else:
        items = _checked(request, spec, Cancel())
    embeddings = {i: item.embedding for i, item in enumerate(items) if item.embedding}
    pictures = {i: item.image for i, item in enumerate(items) if item.image is not None}
    failures = []
    if pictures:
        results = await images.encode_all(
            list(pictures.values()),
            spec,
            deadline_s=ends_s - time.monotonic(),
            fields=[f"items[{i}].image" for i in pictures],
        )
        for i, result in zip(pictures, results, strict=True):
            if isinstance(result, InvalidInputError):
                failures.append(spb.ItemFailure(index=i, id=items[i].id, error=status_of(result)))
            elif isinstance(result, HashlensError):
                raise result
            else:
                embeddings[i] = result.embedding
    return Write(
        records=[record_of(items[i], embeddings[i]) for i in sorted(embeddings)],
        failures=failures,
        request=request,
        has_images=bool(pictures),
    )


def _checked(request: spb.UpsertRequest, spec: CollectionSpec, cancel: Cancel) -> list[Item]:
    items = []
    for i, message in enumerate(request.items):
        if i % _ITEMS_AT_ONCE == 0:
            cancel.check()
        items.append(checks.item_of(message, spec, field=f"items[{i}]"))
    return items


def request_id_of(given: str) -> str:
    """Return a write's request id, one of our own where none is given."""
    if len(given.encode()) > _MAX_REQUEST_ID_BYTES:
        raise InvalidInputError(
            f"a request_id has at most {_MAX_REQUEST_ID_BYTES} bytes", field="request_id"
        )
    return given or uuid.uuid4().hex


def record_of(item: Item, embedding: Embedding) -> Record:
    """Return an item as the store takes it, its image replaced by what the encoder made of it."""
    feature = b"" if embedding.feature is None else embedding.feature.tobytes()
    return Record(
        id=item.id,
        code=embedding.code,
        feature=feature,
        payload=item.payload,
        tags=item.tags,
        expires_ms=item.expires_unix_ms,
    )
