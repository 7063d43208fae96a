"""Whether what a caller sends fits the collection it is sent to."""

from __future__ import annotations

from hashlens import codes, convert
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.packed_items import PackedItems
from hashlens.rpc.limits import check_size
from hashlens.types import CollectionSpec, Embedding, Item, Query, Rank, SearchOptions, TagFilter
from hashlens.v1 import search_service_pb2 as spb
from search_service.snapshot import Snapshot


def check_embedding(
    embedding: Embedding, spec: CollectionSpec, *, field: str, needs_feature: bool = True
) -> None:
    """Raise unless an embedding may be compared with a collection's.

    Parameters
    ----------
    embedding
        Well formed in itself, see `hashlens.convert.embedding_from_proto`.
    spec
        What the collection is bound to.
    field
        Path of the embedding in the request.
    needs_feature
        Whether an embedding without a feature is refused, where the collection has features.

    Raises
    ------
    PreconditionError
        Another model's, or another width: a collection never mixes them.
    InvalidInputError
        Another number format, or no feature.
    """
    if embedding.model_id != spec.model_id:
        raise PreconditionError(
            f"the embedding is of model {embedding.model_id or '(none given)'}, collection "
            f"{spec.name!r} holds those of {spec.model_id}: encode with that model, or make a "
            "collection for this one",
            field=f"{field}.model_id",
        )
    if embedding.n_bits != spec.n_bits:
        raise PreconditionError(
            f"the code has {embedding.n_bits} bits, collection {spec.name!r} holds codes of "
            f"{spec.n_bits}",
            field=f"{field}.code.n_bits",
        )
    if embedding.feature is None:
        if needs_feature and spec.dim:
            raise InvalidInputError(
                f"collection {spec.name!r} ranks by features: send the feature, too",
                field=f"{field}.feature",
            )
        return
    if embedding.dim != spec.dim:
        raise PreconditionError(
            f"the feature has {embedding.dim} numbers, collection {spec.name!r} holds features of "
            f"{spec.dim}",
            field=f"{field}.feature.dim",
        )
    if embedding.feature.dtype != spec.feature_dtype.numpy:
        raise InvalidInputError(
            f"the feature is {embedding.feature.dtype}, collection {spec.name!r} holds "
            f"{spec.feature_dtype.value}: ask the encoder for that format",
            field=f"{field}.feature.dtype",
        )


def check_reply_fits(
    n_hits: int,
    snapshot: Snapshot,
    *,
    with_code: bool,
    with_feature: bool,
    max_message_bytes: int,
) -> None:
    """Raise InvalidInputError, before any work, for a reply that will surely be too large.

    Parameters
    ----------
    n_hits
        How many items the reply will have.
    snapshot
        Says how large each is.
    with_code, with_feature
        What each carries.
    max_message_bytes
        The limit.
    """
    hit_bytes = 16  # An id and a distance take about that.
    if with_code:
        hit_bytes += codes.n_bytes(snapshot.n_bits)
    if with_feature:
        hit_bytes += snapshot.dim * snapshot.feature_dtype.n_bytes
    check_size(n_hits * hit_bytes, max_message_bytes, "ask for fewer, or leave features out")


def item_of(message: spb.Item, spec: CollectionSpec, *, field: str) -> Item:
    """Return an item that may be written to the collection, or raise."""
    try:
        item = convert.item_from_proto(message)
    except InvalidInputError as error:
        raise error.within(field) from None
    if item.embedding is not None:
        check_embedding(item.embedding, spec, field=f"{field}.embedding")
    return item


def packed_of(message: spb.PackedItems, spec: CollectionSpec, *, field: str) -> PackedItems:
    """Return items by column that may be written to the collection, or raise as `item_of`."""
    try:
        items = convert.packed_items_from_proto(message)
    except InvalidInputError as error:
        raise error.within(field) from None
    if items.model_id != spec.model_id or items.n_bits != spec.n_bits or not len(items):
        # The first stands for all.
        blank = bytes(codes.n_bytes(items.n_bits))
        check_embedding(
            Embedding(code=blank, n_bits=items.n_bits, model_id=items.model_id),
            spec,
            field=field,
            needs_feature=False,
        )
    dim = 0 if items.features is None else items.features.shape[1]
    if dim != spec.dim:
        raise PreconditionError(
            f"the features have {dim} numbers, collection {spec.name!r} holds features of "
            f"{spec.dim}",
            field=f"{field}.dim",
        )
    if items.features is not None and items.features.dtype != spec.feature_dtype.numpy:
        raise InvalidInputError(
            f"the features are {items.features.dtype}, collection {spec.name!r} holds "
            f"{spec.feature_dtype.value}: ask the encoder for that format",
            field=f"{field}.feature_dtype",
        )
    return items


def query_of(message: spb.Query, spec: CollectionSpec, rank: Rank, *, field: str) -> Query:
    """Return a query that the collection can answer, or raise."""
    try:
        query = convert.query_from_proto(message)
    except InvalidInputError as error:
        raise error.within(field) from None
    if query.embedding is not None:
        check_embedding(
            query.embedding,
            spec,
            field=f"{field}.embedding",
            needs_feature=rank is not Rank.HAMMING,
        )
    return query


def options_of(
    message: spb.SearchOptions, spec: CollectionSpec, *, field: str = "options"
) -> SearchOptions:
    """Return options that make sense for the collection, or raise."""
    try:
        options = convert.options_from_proto(message)
    except InvalidInputError as error:
        raise error.within(field) from None
    if options.max_hamming_bits is not None and options.max_hamming_bits > spec.n_bits:
        raise InvalidInputError(
            f"max_hamming_bits is {options.max_hamming_bits}, but codes of {spec.n_bits} bits are "
            f"at most {spec.n_bits} apart",
            field=f"{field}.max_hamming_bits",
        )
    if options.rank is Rank.EUCLIDEAN and spec.dim == 0:
        raise InvalidInputError(
            f"collection {spec.name!r} holds codes only: rank by HAMMING", field=f"{field}.rank"
        )
    return options


def filter_of(message: spb.TagFilter, *, field: str) -> TagFilter | None:
    """Return a filter, None if all pass, or raise InvalidInputError."""
    try:
        return convert.filter_from_proto(message)
    except InvalidInputError as error:
        raise error.within(field) from None


def radius_of(radius_bits: int, spec: CollectionSpec, *, field: str) -> int:
    """Return a radius that the collection's codes can have, or raise InvalidInputError."""
    if radius_bits > spec.n_bits:
        raise InvalidInputError(
            f"{field} is {radius_bits}, but codes of {spec.n_bits} bits are at most "
            f"{spec.n_bits} apart",
            field=field,
        )
    return radius_bits
