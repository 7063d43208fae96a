"""What is written to the records of the log: checked, because the log is for ever."""

from __future__ import annotations

from hashlens import codes
from hashlens.errors import InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.types import (
    MAX_ID_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_TAG_BYTES,
    MAX_TAGS,
    CollectionSpec,
)
from search_service.storage import layout
from search_service.storage.chunks import Raw
from search_service.storage.records import Record


def packed_records(items: PackedItems, spec: CollectionSpec) -> list[Raw]:
    """Return the log records of items.

    Raises
    ------
    InvalidInputError
        They do not fit the collection.
    """
    code_bytes, feature_bytes = codes.n_bytes(spec.n_bits), layout.feature_bytes(spec)
    width = 0 if items.features is None else items.features[:1].nbytes
    if items.n_bits != spec.n_bits or (len(items) and width != feature_bytes):
        raise InvalidInputError("Codes or features are not as long as the collection's.")
    # A record that cannot be read again would stop every replica.
    unused_bits = spec.n_bits % 8
    if unused_bits and (items.codes[:, -1] >> unused_bits).any():
        raise InvalidInputError("The bits behind a code's end are zero.")
    n = len(items)
    all_codes = items.codes.tobytes()
    features = memoryview(b"" if items.features is None else items.features.data).cast("B")
    ids = items.id_bytes
    payloads, payload_ends = items.payload_bytes, [0] * n
    if items.payload_ends is not None:
        payload_ends = items.payload_ends.tolist()
    records: list[Raw] = []
    start = payload_start = 0
    for i, (end, payload_end) in enumerate(zip(items.id_ends.tolist(), payload_ends, strict=True)):
        item_id = ids[start:end]
        if not 0 < len(item_id) <= MAX_ID_BYTES or payload_end - payload_start > MAX_PAYLOAD_BYTES:
            raise InvalidInputError(f"Item {i} has too long an id or payload, or no id.")
        extras = b""
        if payload_end > payload_start:
            extras = layout.pack_extras(payloads[payload_start:payload_end], b"", 0)
        code = all_codes[i * code_bytes : (i + 1) * code_bytes]
        feature = features[i * feature_bytes : (i + 1) * feature_bytes]
        records.append(Raw(item_id, layout.pack_put(item_id, code, extras, feature)))
        start, payload_start = end, payload_end
    return records


def record_of(item: Record, spec: CollectionSpec, field: str) -> Raw:
    """Return an item's log record.

    The log is applied by every replica for ever, so what does not fit must not get in.

    Parameters
    ----------
    item
        What to write.
    spec
        What the collection is bound to.
    field
        Path of the item in the request.

    Raises
    ------
    InvalidInputError
        It does not fit the collection.
    """
    code_bytes, feature_bytes = codes.n_bytes(spec.n_bits), layout.feature_bytes(spec)
    item_id = id_bytes(item.id, f"{field}.id")
    if len(item.code) != code_bytes:
        raise InvalidInputError(
            f"A code of this collection has {code_bytes} bytes.",
            field=f"{field}.embedding.code",
        )
    if len(item.feature) != feature_bytes:
        raise InvalidInputError(
            f"A feature of this collection has {feature_bytes} bytes.",
            field=f"{field}.embedding.feature",
        )
    if len(item.payload) > MAX_PAYLOAD_BYTES:
        raise InvalidInputError(
            f"A payload has at most {MAX_PAYLOAD_BYTES} bytes.", field=f"{field}.payload"
        )
    unused_bits = spec.n_bits % 8
    if unused_bits and item.code[-1] >> unused_bits:
        raise InvalidInputError(
            "The bits behind a code's end are zero.", field=f"{field}.embedding.code"
        )
    tags = [tag.encode() for tag in item.tags]
    if len(tags) > MAX_TAGS or any(not 0 < len(tag) <= MAX_TAG_BYTES for tag in tags):
        raise InvalidInputError(
            f"An item has at most {MAX_TAGS} tags of 1 to {MAX_TAG_BYTES} bytes.",
            field=f"{field}.tags",
        )
    if not 0 <= item.expires_ms < 1 << 63:
        raise InvalidInputError("No such time.", field=f"{field}.expires_unix_ms")
    extras = layout.pack_extras(item.payload, layout.pack_tags(item.tags), item.expires_ms)
    return Raw(item_id, layout.pack_put(item_id, item.code, extras, item.feature))


def id_bytes(item_id: str, field: str) -> bytes:
    """Return an id as it is stored; InvalidInputError unless it can be one."""
    try:
        encoded = item_id.encode()
    except UnicodeEncodeError:
        raise InvalidInputError("An id is Unicode text; this one is not.", field=field) from None
    if not 0 < len(encoded) <= MAX_ID_BYTES:
        raise InvalidInputError(f"An id has 1 to {MAX_ID_BYTES} bytes of UTF-8.", field=field)
    return encoded
