"""What both clients say and understand: requests built, replies read, no I/O."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from grpc_health.v1 import health_pb2

from hashlens import codes, convert
from hashlens.errors import HashlensError, InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.rpc import call, limits
from hashlens.rpc.channel import CallMetadata, ChannelSecurity
from hashlens.rpc.health import LIVENESS, READINESS, reasons_of
from hashlens.rpc.status import error_of
from hashlens.types import (
    CollectionInfo,
    CollectionSpec,
    DeleteResult,
    Embedding,
    Encoded,
    FeatureDtype,
    Item,
    ModelInfo,
    Query,
    SearchOptions,
    SearchResult,
    ServiceHealth,
    TagFilter,
)
from hashlens.v1 import embedding_pb2 as epb
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import search_service_pb2 as spb

ENCODER_TARGET = "127.0.0.1:50051"
"""Where ``hashlens up`` puts the encoder service."""

SEARCH_TARGET = "127.0.0.1:50052"
"""Where ``hashlens up`` puts the search service."""

T = TypeVar("T")

_SPLIT = "send fewer at a time"


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a client behaves."""

    deadline_s: float = limits.DEADLINE_S
    """Time for one call, in seconds; each method takes another."""
    max_message_bytes: int = limits.MAX_MESSAGE_BYTES
    """Largest request or reply; the servers' own limit must be as high."""
    chunk_items: int = 256
    """Most images that one Upsert or EncodeBatch carries."""
    chunk_embeddings: int = 4096
    """Most items that one Upsert of embeddings carries: a call costs as much as some hundred."""
    chunk_bytes: int = 8 * 2**20
    """About how many bytes one Upsert or EncodeBatch carries, but for one larger item."""
    stream_items: int = 1024
    """Most items of a stream that are taken from the caller and not answered, of `chunk_bytes`."""
    security: ChannelSecurity = ChannelSecurity()
    """How the services are known, and what is shown to them."""

    def __post_init__(self) -> None:
        if self.deadline_s <= 0:
            raise InvalidInputError("every call needs a deadline: set deadline_s above 0")
        if min(self.chunk_items, self.chunk_embeddings, self.chunk_bytes, self.stream_items) < 1:
            raise InvalidInputError("a chunk and a stream hold at least one item")


@dataclass(slots=True)
class Wire:
    """Builds requests and reads replies for one client."""

    config: ClientConfig
    _versions: dict[str, int] = field(default_factory=dict)
    """The last version that this client wrote, by collection: its searches read its own writes."""
    _epochs: dict[str, str] = field(default_factory=dict)
    """The incarnation that the versions belong to, where it is known."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _metadata: CallMetadata = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._metadata = CallMetadata(self.config.security)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what a call carries beside its request."""
        return call.outgoing() + self._metadata()

    # -- encoder ---------------------------------------------------------------------------------

    def encode_request(
        self, image: bytes, feature_dtype: FeatureDtype | None, activations: bool
    ) -> enc.EncodeRequest:
        """Build an Encode."""
        self._check_size(len(image), "send a smaller picture")
        return enc.EncodeRequest(image=image, options=encode_options(feature_dtype, activations))

    def encode_batches(
        self, images: Sequence[bytes], feature_dtype: FeatureDtype | None, activations: bool
    ) -> Iterator[enc.EncodeBatchRequest]:
        """Build the EncodeBatch calls for any number of images."""
        options = encode_options(feature_dtype, activations)
        most = self.config.chunk_items
        for chunk in self._chunks((image, len(image), most) for image in images):
            request = enc.EncodeBatchRequest(images=chunk, options=options)
            self._check_size(request.ByteSize(), "send a smaller picture")
            yield request

    def encode_results(self, reply: enc.EncodeBatchResponse) -> list[Encoded | HashlensError]:
        """Read an EncodeBatch."""
        return [
            encoded_of(result.embedding, result.timings)
            if result.HasField("embedding")
            else error_of(result.error)
            for result in reply.results
        ]

    # -- collections and items -------------------------------------------------------------------

    def upserts(
        self, collection: str, items: Iterable[Item], request_id: str | None
    ) -> Iterator[spb.UpsertRequest]:
        """Build the Upsert calls for any number of items, one at a time."""
        base = request_id or uuid.uuid4().hex
        config = self.config
        sized = (
            (item, _size_bytes(item), config.chunk_embeddings)
            if item.image is None
            else (item, _size_bytes(item), config.chunk_items)
            for item in items
        )
        for n, chunk in enumerate(self._chunks(sized)):
            request = spb.UpsertRequest(collection=collection, request_id=_chunk_id(base, n))
            packed = PackedItems.of(chunk)
            if packed is None:
                request.items.extend(map(convert.item_to_proto, chunk))
            else:
                convert.packed_items_to_proto(packed, request.packed)
            self._check_size(request.ByteSize(), _SPLIT)
            yield request

    def wrote(self, collection: str, version: int) -> None:
        """Remember a write."""
        with self._lock:
            self._versions[collection] = max(version, self._versions.get(collection, 0))

    def seen(self, info: CollectionInfo) -> CollectionInfo:
        """Return `info`; a collection that was made anew begins its versions anew."""
        name = info.spec.name
        with self._lock:
            if self._epochs.get(name, info.epoch) != info.epoch:
                self._versions.pop(name, None)
            self._epochs[name] = info.epoch
        return info

    def forget(self, collection: str) -> None:
        """Forget a collection that was dropped."""
        with self._lock:
            self._versions.pop(collection, None)
            self._epochs.pop(collection, None)

    def version_of(self, collection: str) -> int:
        """Return the last version that this client wrote; 0 if it wrote nothing."""
        return self._versions.get(collection, 0)

    def delete_request(
        self, collection: str, ids: Sequence[str], request_id: str | None
    ) -> spb.DeleteRequest:
        """Build a Delete."""
        request = spb.DeleteRequest(
            collection=collection, ids=ids, request_id=request_id or uuid.uuid4().hex
        )
        self._check_size(request.ByteSize(), _SPLIT)
        return request

    def get_items_request(
        self,
        collection: str,
        ids: Sequence[str],
        with_feature: bool,
        with_payload: bool,
        min_version: int,
    ) -> spb.GetItemsRequest:
        """Build a GetItems."""
        request = spb.GetItemsRequest(
            collection=collection,
            ids=ids,
            with_feature=with_feature,
            with_payload=with_payload,
            min_version=self._reaching(collection, min_version),
        )
        self._check_size(request.ByteSize(), _SPLIT)
        return request

    # -- search ----------------------------------------------------------------------------------

    def search_request(
        self, collection: str, query: Query, options: SearchOptions
    ) -> spb.SearchRequest:
        """Build a Search."""
        request = spb.SearchRequest(
            collection=collection,
            query=convert.query_to_proto(query),
            options=self._options(collection, options),
        )
        self._check_size(request.ByteSize(), "send a smaller picture")
        return request

    def search_batch_request(
        self, collection: str, queries: Sequence[Query], options: SearchOptions
    ) -> spb.SearchBatchRequest:
        """Build a SearchBatch."""
        request = spb.SearchBatchRequest(
            collection=collection,
            queries=[convert.query_to_proto(query) for query in queries],
            options=self._options(collection, options),
        )
        self._check_size(request.ByteSize(), _SPLIT)
        return request

    def search_results(self, reply: spb.SearchBatchResponse) -> list[SearchResult | HashlensError]:
        """Read a SearchBatch."""
        return [
            convert.result_from_proto(result.answer)
            if result.HasField("answer")
            else error_of(result.error)
            for result in reply.results
        ]

    def audit_request(
        self, collection: str, query: Query, options: SearchOptions
    ) -> spb.AuditRequest:
        """Build an Audit."""
        return spb.AuditRequest(search=self.search_request(collection, query, options))

    def ball_request(
        self,
        collection: str,
        query: Query,
        radius_bits: int,
        with_payload: bool,
        with_code: bool,
        wanted: TagFilter | None,
        min_version: int,
    ) -> spb.StreamBallRequest:
        """Build a StreamBall."""
        if not 0 <= radius_bits <= codes.MAX_BITS:
            raise InvalidInputError(
                f"radius_bits is {radius_bits}: codes have at most {codes.MAX_BITS} bits",
                field="radius_bits",
            )
        try:
            tag_filter = convert.filter_to_proto(wanted)
        except ValueError as error:  # What is no text.
            raise InvalidInputError(f"a tag is out of range: {error}", field="filter") from None
        request = spb.StreamBallRequest(
            collection=collection,
            query=convert.query_to_proto(query),
            radius_bits=radius_bits,
            with_payload=with_payload,
            with_code=with_code,
            min_version=self._reaching(collection, min_version),
            filter=tag_filter,
        )
        self._check_size(request.ByteSize(), "send a smaller picture")
        return request

    # -- helpers ---------------------------------------------------------------------------------

    def _chunks(self, sized: Iterable[tuple[T, int, int]]) -> Iterator[list[T]]:
        """Cut (value, size in bytes, most values of its kind) where a chunk would be too large."""
        chunk: list[T] = []
        filled_bytes = 0
        for value, size_bytes, most in sized:
            if chunk and (
                len(chunk) >= most or filled_bytes + size_bytes > self.config.chunk_bytes
            ):
                yield chunk
                chunk, filled_bytes = [], 0
            chunk.append(value)
            filled_bytes += size_bytes
        if chunk:
            yield chunk

    def _reaching(self, collection: str, min_version: int) -> int:
        """Return a version to wait for: the caller's, and of this client's own writes."""
        if not 0 <= min_version < 2**64:
            raise InvalidInputError(
                f"min_version is {min_version}: not a version", field="min_version"
            )
        return max(min_version, self.version_of(collection))

    def _options(self, collection: str, options: SearchOptions) -> spb.SearchOptions:
        """Return the wire form, made to wait for this client's own writes."""
        version = self._reaching(collection, options.min_version)
        try:
            return convert.options_to_proto(replace(options, min_version=version))
        except ValueError as error:  # What does not fit the message's numbers.
            raise InvalidInputError(
                f"an option is out of range: {error}", field="options"
            ) from None

    def _check_size(self, size_bytes: int, advice: str) -> None:
        limits.check_size(size_bytes, self.config.max_message_bytes, advice)


def spec_for(
    name: str, model: ModelInfo, feature_dtype: FeatureDtype | None, expected_rows: int
) -> CollectionSpec:
    """Return the specification of a collection for a model's embeddings."""
    return CollectionSpec(
        name=name,
        model_id=model.model_id,
        n_bits=model.n_bits,
        dim=model.dim,
        feature_dtype=feature_dtype or model.feature_dtype,
        expected_rows=expected_rows,
    )


def query_of(image: bytes | None, embedding: Embedding | None, item_id: str | None) -> Query:
    """Return the query, InvalidInputError unless exactly one kind is given."""
    if sum(value is not None for value in (image, embedding, item_id)) != 1:
        raise InvalidInputError("a query is one of image, embedding and id: give exactly one")
    return Query(image=image, embedding=embedding, id=item_id)


def encoded_of(embedding: epb.Embedding, timings: enc.EncodeTimings) -> Encoded:
    """Read one embedding with its timings."""
    return Encoded(
        embedding=convert.embedding_from_proto(embedding),
        timings=convert.encode_timings_from_proto(timings),
    )


def deleted(reply: spb.DeleteResponse) -> DeleteResult:
    """Read a Delete."""
    return DeleteResult(version=reply.version, n_deleted=reply.n_deleted)


def _size_bytes(item: Item) -> int:
    """Return about how long an item is in a message."""
    size_bytes = 32 + len(item.id) + len(item.payload)
    if item.image is not None:
        size_bytes += len(item.image)
    if item.embedding is not None and item.embedding.feature is not None:
        size_bytes += item.embedding.feature.nbytes
    return size_bytes


def _chunk_id(base: str, n: int) -> str:
    """Return the request id of a write's n-th chunk, in the 64 bytes that the contract allows."""
    if n == 0:
        return base
    own = f"{base}.{n}"
    return own if len(own.encode()) <= 64 else hashlib.blake2b(own.encode()).hexdigest()[:64]


def encode_options(feature_dtype: FeatureDtype | None, activations: bool) -> enc.EncodeOptions:
    """Build what an image is encoded to."""
    return enc.EncodeOptions(
        feature_dtype=convert.dtype_to_proto(feature_dtype), with_activations=activations
    )


HEALTH_NAMES = ("", READINESS, LIVENESS)
"""What is asked of a server's health."""


def health_of(
    target: str, replies: Sequence[health_pb2.HealthCheckResponse | None], trailing: Any
) -> ServiceHealth:
    """Read health checks.

    Parameters
    ----------
    target
        Whom they are of.
    replies
        For each of `HEALTH_NAMES`; None for a name that the server does not know. Such a one is not
        ours, and what it says of itself as a whole counts.
    trailing
        Metadata of the first.
    """
    whole, ready, live = (reply and reply.status for reply in replies)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert whole is not None
    return ServiceHealth(
        target=target,
        serving=whole == serving,
        detail=health_pb2.HealthCheckResponse.ServingStatus.Name(whole).lower(),
        ready=(whole if ready is None else ready) == serving,
        live=live is None or live == serving,
        reasons=reasons_of(trailing),
    )
