"""Items by column to log records."""

from __future__ import annotations

from hashlens import codes
from hashlens.errors import InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.types import MAX_ID_BYTES, MAX_PAYLOAD_BYTES, CollectionSpec
from search_service.storage import layout
from search_service.storage.catalog import Raw


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
