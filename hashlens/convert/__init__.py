"""Protobuf messages to `hashlens.types` and back: total and symmetric.

``x_to_proto`` never fails. ``x_from_proto`` is the edge where a message's *form* is checked: it
raises `InvalidInputError` with the field's path relative to the message given. What needs to know
the collection (its width, its model) is checked by the service.
"""

from hashlens.convert.audit import audit_from_proto, audit_to_proto
from hashlens.convert.collection import (
    check_collection_name,
    check_id,
    info_from_proto,
    info_to_proto,
    item_from_proto,
    item_to_proto,
    replica_from_proto,
    replica_to_proto,
    spec_from_proto,
    spec_to_proto,
    tags_from_proto,
)
from hashlens.convert.compact import compact_from_proto, compact_to_proto
from hashlens.convert.embedding import (
    code_from_proto,
    dtype_from_proto,
    dtype_to_proto,
    embedding_from_proto,
    embedding_to_proto,
    encode_timings_from_proto,
    encode_timings_to_proto,
    feature_from_proto,
    feature_to_proto,
    model_from_proto,
    model_to_proto,
)
from hashlens.convert.packed import packed_hits_from_proto, packed_hits_to_proto
from hashlens.convert.packed_items import packed_items_from_proto, packed_items_to_proto
from hashlens.convert.search import (
    ball_part_from_proto,
    ball_part_to_proto,
    hit_from_proto,
    hit_to_proto,
    options_from_proto,
    options_to_proto,
    query_from_proto,
    query_to_proto,
    receipt_from_proto,
    receipt_to_proto,
    reply_explanation_from_proto,
    reply_explanation_to_proto,
    result_from_proto,
    result_to_proto,
)
from hashlens.convert.tag_filter import filter_from_proto, filter_to_proto
from hashlens.convert.verify import verify_from_proto, verify_to_proto

__all__ = [
    "audit_from_proto",
    "audit_to_proto",
    "ball_part_from_proto",
    "ball_part_to_proto",
    "check_collection_name",
    "check_id",
    "code_from_proto",
    "compact_from_proto",
    "compact_to_proto",
    "dtype_from_proto",
    "dtype_to_proto",
    "embedding_from_proto",
    "embedding_to_proto",
    "encode_timings_from_proto",
    "encode_timings_to_proto",
    "feature_from_proto",
    "feature_to_proto",
    "filter_from_proto",
    "filter_to_proto",
    "hit_from_proto",
    "hit_to_proto",
    "info_from_proto",
    "info_to_proto",
    "item_from_proto",
    "item_to_proto",
    "model_from_proto",
    "model_to_proto",
    "options_from_proto",
    "options_to_proto",
    "packed_hits_from_proto",
    "packed_hits_to_proto",
    "packed_items_from_proto",
    "packed_items_to_proto",
    "query_from_proto",
    "query_to_proto",
    "receipt_from_proto",
    "receipt_to_proto",
    "replica_from_proto",
    "replica_to_proto",
    "reply_explanation_from_proto",
    "reply_explanation_to_proto",
    "result_from_proto",
    "result_to_proto",
    "spec_from_proto",
    "spec_to_proto",
    "tags_from_proto",
    "verify_from_proto",
    "verify_to_proto",
]
