"""A collection's files without Redis: written as the log would."""

from __future__ import annotations

from pathlib import Path

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Record, layout
from search_service.storage.local import LocalCollection
from tests.support.stores import Model, log_record

SPEC = CollectionSpec("c", "m", 100, 3, FeatureDtype.F16, 1000)
SEGMENT_BYTES = 64 * layout.feature_bytes(SPEC)


def make(directory: Path, spec: CollectionSpec = SPEC) -> LocalCollection:
    return LocalCollection.create(
        directory / spec.name, spec, epoch="e", n_buckets=8, segment_bytes=SEGMENT_BYTES
    )


def put(local: LocalCollection, model: Model, records: list[Record]) -> None:
    """Apply writes as the log would bring them."""
    raws = [log_record(r) for r in records]
    apply(local, raws)
    model.upsert(records)


def delete(local: LocalCollection, model: Model, ids: list[str]) -> None:
    apply(local, [layout.pack_delete(item_id.encode()) for item_id in ids])
    assert model.delete(ids) == len(ids)


def apply(local: LocalCollection, raws: list[bytes]) -> None:
    feature_bytes = layout.feature_bytes(local.spec)
    local.apply(
        [
            layout.unpack_record(local.seq + 1 + i, raw, local.spec.n_bits, feature_bytes)
            for i, raw in enumerate(raws)
        ]
    )
