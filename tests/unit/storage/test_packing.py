"""Items by column become the records that they would be one by one, or are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hashlens import Embedding, Item
from hashlens.errors import InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage.packing import packed_records, record_of
from tests.support.stores import make_records

SPEC = CollectionSpec("c", "m", 20, 3, FeatureDtype.F16, 1000)
RECORDS = [replace(record, tags=(), expires_ms=0) for record in make_records(SPEC, 30)]


def packed() -> PackedItems:
    items = [
        Item(
            record.id,
            Embedding(record.code, 20, "m", np.frombuffer(record.feature, np.float16)),
            payload=record.payload,
        )
        for record in RECORDS
    ]
    found = PackedItems.of(items)
    assert found is not None
    return found


def test_columns_make_the_same_records() -> None:
    assert packed_records(packed(), SPEC) == [record_of(r, SPEC, "items[0]") for r in RECORDS]


def test_what_could_not_be_read_again_is_refused() -> None:
    items = packed()
    codes = items.codes.copy()
    codes[7, -1] |= 0x10
    long = np.full(len(items), 2000, dtype=np.uint32)
    for wrong in (
        replace(items, codes=codes),
        replace(items, id_bytes=b"x" * 2000, id_ends=long),
        replace(items, id_ends=np.zeros(len(items), dtype=np.uint32)),
        replace(items, features=None),
        replace(items, payload_bytes=bytes(70_000), payload_ends=long * 35),
    ):
        with pytest.raises(InvalidInputError):
            packed_records(wrong, SPEC)
    for other in (replace(SPEC, n_bits=19), replace(SPEC, dim=0), replace(SPEC, dim=4)):
        with pytest.raises(InvalidInputError):
            packed_records(items, other)
