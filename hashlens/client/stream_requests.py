"""What streams of items say and understand: a request for each item, a result for each reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from hashlens import convert
from hashlens.client import wire
from hashlens.client.wire import ClientConfig, Wire
from hashlens.errors import HashlensError
from hashlens.rpc import limits
from hashlens.rpc.status import error_of
from hashlens.types import Encoded, Item
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import search_service_pb2 as spb

T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class StreamRequests(Protocol[T_contra, R_co]):
    """One kind of stream."""

    def build(self, item: T_contra, tag: int) -> Any:
        """Return the request for an item."""

    def read(self, reply: Any) -> R_co:
        """Return the result that a reply is."""


@dataclass(frozen=True, slots=True)
class EncodeRequests:
    """EncodeStream's."""

    config: ClientConfig
    options: enc.EncodeOptions

    def build(self, item: bytes, tag: int) -> enc.EncodeStreamRequest:
        """Return the request for an image."""
        limits.check_size(len(item), self.config.max_message_bytes, "send a smaller picture")
        return enc.EncodeStreamRequest(image=item, tag=tag, options=self.options)

    def read(self, reply: enc.EncodeStreamResponse) -> Encoded | HashlensError:
        """Return the embedding, or why there is none."""
        result = reply.result
        if result.HasField("embedding"):
            return wire.encoded_of(result.embedding, result.timings)
        return error_of(result.error)


@dataclass(frozen=True, slots=True)
class UpsertRequests:
    """UpsertStream's."""

    config: ClientConfig
    wire: Wire
    collection: str

    def build(self, item: Item, tag: int) -> spb.UpsertStreamRequest:
        """Return the request for an item; any may be a call's first, which names the collection."""
        request = spb.UpsertStreamRequest(
            collection=self.collection, item=convert.item_to_proto(item), tag=tag
        )
        limits.check_size(request.ByteSize(), self.config.max_message_bytes, "send a smaller item")
        return request

    def read(self, reply: spb.UpsertStreamResponse) -> int | HashlensError:
        """Return the version that has the item, or why it was not written."""
        if not reply.HasField("version"):
            return error_of(reply.error)
        self.wire.wrote(self.collection, reply.version)
        return reply.version
