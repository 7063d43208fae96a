"""Collections and items of `search_service.proto`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hashlens import codes
from hashlens.convert.embedding import (
    dtype_from_proto,
    dtype_to_proto,
    embedding_from_proto,
    embedding_to_proto,
)
from hashlens.errors import InvalidInputError
from hashlens.types import (
    MAX_DIM,
    MAX_ID_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_TAG_BYTES,
    MAX_TAGS,
    CollectionInfo,
    CollectionSpec,
    FeatureDtype,
    Item,
    ReplicaInfo,
)
from hashlens.v1 import search_service_pb2 as spb

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def spec_to_proto(spec: CollectionSpec) -> spb.CollectionSpec:
    """Return the wire form."""
    return spb.CollectionSpec(
        name=spec.name,
        model_id=spec.model_id,
        n_bits=spec.n_bits,
        dim=spec.dim,
        feature_dtype=dtype_to_proto(spec.feature_dtype),
        expected_rows=spec.expected_rows,
    )


def spec_from_proto(message: spb.CollectionSpec) -> CollectionSpec:
    """Return the value, with the contract's defaults for what is unspecified.

    Raises
    ------
    InvalidInputError
        A name, width or dtype that the contract does not allow.
    """
    check_collection_name(message.name, field="name")
    if not message.model_id or len(message.model_id) > 128 or not message.model_id.isprintable():
        raise InvalidInputError(
            "say which model's embeddings it will hold: EncoderService.GetModel tells",
            field="model_id",
        )
    if not 1 <= message.n_bits <= codes.MAX_BITS:
        raise InvalidInputError(
            f"n_bits is {message.n_bits}: a code has 1 to {codes.MAX_BITS} bits", field="n_bits"
        )
    if message.dim > MAX_DIM:
        raise InvalidInputError(
            f"dim is {message.dim}: a feature has at most {MAX_DIM} numbers", field="dim"
        )
    if message.expected_rows > 10**10:
        raise InvalidInputError("expected_rows is at most 10,000,000,000", field="expected_rows")
    return CollectionSpec(
        name=message.name,
        model_id=message.model_id,
        n_bits=message.n_bits,
        dim=message.dim,
        feature_dtype=dtype_from_proto(message.feature_dtype) or FeatureDtype.F16,
        expected_rows=message.expected_rows or 1_000_000,
    )


def check_collection_name(name: str, *, field: str = "collection") -> str:
    """Return `name`; InvalidInputError unless it is one that a collection may have."""
    allowed = "abcdefghijklmnopqrstuvwxyz0123456789_-"
    if not (1 <= len(name) <= 64 and name[0] not in "_-" and all(c in allowed for c in name)):
        raise InvalidInputError(
            f"{name[:80]!r} is no collection name: use 1 to 64 of a-z, 0-9, _ and -, beginning "
            "with a letter or digit",
            field=field,
        )
    return name


def check_id(item_id: str, *, field: str = "id") -> str:
    """Return `item_id`; InvalidInputError unless it is one that an item may have."""
    size_bytes = len(item_id.encode("utf-8", "surrogatepass"))
    if not 1 <= size_bytes <= MAX_ID_BYTES:
        raise InvalidInputError(
            f"the id is {size_bytes} bytes long: 1 to {MAX_ID_BYTES} are allowed", field=field
        )
    # Ids are printed on one line.
    if _UNPRINTABLE.search(item_id):
        raise InvalidInputError("an id holds no control characters", field=field)
    return item_id


def tags_from_proto(tags: Sequence[str], *, field: str) -> tuple[str, ...]:
    """Return tags, sorted by their bytes, each once; InvalidInputError unless all may be tags."""
    if len(tags) > MAX_TAGS:
        raise InvalidInputError(f"{len(tags)} tags: at most {MAX_TAGS} are allowed", field=field)
    for i, tag in enumerate(tags):
        size_bytes = len(tag.encode("utf-8", "surrogatepass"))
        if not 1 <= size_bytes <= MAX_TAG_BYTES:
            raise InvalidInputError(
                f"the tag is {size_bytes} bytes long: 1 to {MAX_TAG_BYTES} are allowed",
                field=f"{field}[{i}]",
            )
        if _UNPRINTABLE.search(tag):
            raise InvalidInputError("a tag holds no control characters", field=f"{field}[{i}]")
    return tuple(sorted(set(tags), key=str.encode))


def info_to_proto(info: CollectionInfo) -> spb.CollectionInfo:
    """Return the wire form."""
    return spb.CollectionInfo(
        spec=spec_to_proto(info.spec),
        epoch=info.epoch,
        version=info.version,
        n_items=info.n_items,
        n_dead_rows=info.n_dead_rows,
        checkpoint_version=info.checkpoint_version,
        durability=info.durability,
        writable=info.writable,
        detail=info.detail,
        replica_id=info.replica_id,
        n_missing_features=info.n_missing_features,
        erased_version=info.erased_version,
    )


def info_from_proto(message: spb.CollectionInfo) -> CollectionInfo:
    """Return the value."""
    return CollectionInfo(
        spec=spec_from_proto(message.spec),
        epoch=message.epoch,
        version=message.version,
        n_items=message.n_items,
        n_dead_rows=message.n_dead_rows,
        checkpoint_version=message.checkpoint_version,
        durability=message.durability,
        writable=message.writable,
        detail=message.detail,
        replica_id=message.replica_id,
        n_missing_features=message.n_missing_features,
        erased_version=message.erased_version,
    )


def replica_to_proto(info: ReplicaInfo) -> spb.ReplicaInfo:
    """Return the wire form."""
    return spb.ReplicaInfo(
        id=info.id,
        address=info.address,
        checkpoint_version=info.checkpoint_version,
        erased_version=info.erased_version,
        silent_ms=info.silent_ms,
        live=info.live,
    )


def replica_from_proto(message: spb.ReplicaInfo) -> ReplicaInfo:
    """Return the value."""
    return ReplicaInfo(
        id=message.id,
        address=message.address,
        checkpoint_version=message.checkpoint_version,
        erased_version=message.erased_version,
        silent_ms=message.silent_ms,
        live=message.live,
    )


def item_to_proto(item: Item) -> spb.Item:
    """Return the wire form."""
    message = spb.Item(
        id=item.id,
        payload=item.payload,
        tags=item.tags,
        expires_unix_ms=item.expires_unix_ms,
    )
    if item.embedding is not None:
        message.embedding.CopyFrom(embedding_to_proto(item.embedding))
    elif item.image is not None:
        message.image = item.image
    return message


def item_from_proto(message: spb.Item) -> Item:
    """Return the value.

    Raises
    ------
    InvalidInputError
        A bad id, embedding or tag, a payload above the limit, or neither embedding nor image.
    """
    check_id(message.id)
    payload = message.payload
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidInputError(
            f"the payload is {len(payload)} bytes: at most {MAX_PAYLOAD_BYTES} are kept; store "
            "the rest elsewhere and its key here",
            field="payload",
        )
    tags = tags_from_proto(message.tags, field="tags") if message.tags else ()
    expires = message.expires_unix_ms
    kind = message.WhichOneof("content")
    if kind == "embedding":
        try:
            embedding = embedding_from_proto(message.embedding)
        except InvalidInputError as error:
            raise error.within("embedding") from None
        return Item(message.id, embedding, None, payload, tags, expires)
    if kind == "image":
        return Item(message.id, None, message.image, payload, tags, expires)
    raise InvalidInputError("an item needs an embedding or an image", field="content")
