"""Compaction changes no answer: hits, order, distances, what receipts say of the data."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens.types import (
    CollectionSpec,
    Embedding,
    FeatureDtype,
    Item,
    Rank,
    Receipt,
    SearchOptions,
    SearchResult,
    StageTimings,
)
from search_service.ball import BallScanner, hits_of
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.items import items_of
from search_service.snapshot import Snapshot
from search_service.storage import Record, layout
from search_service.storage.compaction import Pace, compact
from search_service.storage.local import LocalCollection
from tests.support.local_files import apply
from tests.support.stores import log_record, make_record

ENGINE = Engine()
IDS = 60


def crowded(spec: CollectionSpec, item_id: str, rng: np.random.Generator) -> Record:
    """An item that ties with others in code and feature."""
    record = make_record(spec, item_id, rng)
    bits = rng.random(spec.n_bits) < 0.1
    code = np.packbits(bits, bitorder="little").tobytes()
    numbers = rng.integers(0, 3, spec.dim).astype(spec.feature_dtype.numpy)
    return dataclasses.replace(record, code=code, feature=numbers.tobytes())


@settings(max_examples=25, deadline=None)
@given(
    n_bits=st.sampled_from([1, 12, 64, 65, 200]),
    shape=st.sampled_from([(0, "f16"), (3, "f16"), (8, "f32")]),
    seed=st.integers(0, 2**32 - 1),
    missing=st.booleans(),
)
def test_answers_stay(n_bits: int, shape: tuple[int, str], seed: int, missing: bool) -> None:
    spec = CollectionSpec("c", "m", n_bits, shape[0], FeatureDtype(shape[1]), 1000)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        local = LocalCollection.create(
            Path(folder) / "c", spec, epoch="e", n_buckets=1, segment_bytes=16 * 12
        )
        write(local, rng)
        if missing and spec.dim:
            lose_features(local, rng)
            write(local, rng)
        before = local.snapshot
        query = query_of(spec, rng)
        expected = answers(before, query)
        done = compact(local, Pace(0, threading.Event()))
        after = local.snapshot
        assert done.n_damaged == 0
        assert done.n_rows_erased == before.rows - before.n_alive == before.rows - after.rows
        assert after.version == before.version
        assert answers(after, query) == expected
        # The old version answers as before, too.
        assert answers(before, query) == expected
        local.close()


def write(local: LocalCollection, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 6))):
        ids = [f"i{i}" for i in rng.choice(IDS, size=25, replace=False)]
        apply(local, [log_record(crowded(local.spec, item_id, rng)) for item_id in ids])
        doomed = rng.choice(ids, size=5, replace=False)
        apply(local, [layout.pack_delete(str(item_id).encode()) for item_id in doomed])


def lose_features(local: LocalCollection, rng: np.random.Generator) -> None:
    """Damage a segment, which compaction then finds out."""
    n = compact(local, Pace(0, threading.Event())).n_damaged
    assert n == 0
    name = layout.features_file(local.generation, 0, local.spec.feature_dtype)
    path = local.directory / name
    data = bytearray(path.read_bytes())
    data[0] ^= 64
    with path.open("r+b") as file:
        file.write(data)
    put = crowded(local.spec, "late", rng)
    apply(local, [log_record(put), layout.pack_delete(b"late")])
    assert compact(local, Pace(0, threading.Event())).n_damaged == 1


def query_of(spec: CollectionSpec, rng: np.random.Generator) -> Embedding:
    record = crowded(spec, "q", rng)
    feature = np.frombuffer(record.feature, spec.feature_dtype.numpy) if spec.dim else None
    return Embedding(code=record.code, n_bits=spec.n_bits, model_id="m", feature=feature)


def answers(snapshot: Snapshot, query: Embedding) -> list[object]:
    """All that can be asked."""
    found: list[object] = []
    for rank in (Rank.AUTO, Rank.HAMMING):
        ways = (
            SearchOptions(k=7, min_pool=20, rank=rank, with_payload=True),
            SearchOptions(k=5, max_pool=6, max_hamming_bits=snapshot.n_bits, rank=rank),
            SearchOptions(k=100, rank=rank, with_code=True),
        )
        found += [plain(ENGINE.search(snapshot, query, chosen)) for chosen in ways]
    radius = snapshot.n_bits // 3
    if snapshot.rows:
        part = BallScanner().scan(snapshot, query.code, radius, 0, Cancel())
        found += hits_of(snapshot, part, slice(None), with_payload=True, with_code=True)
        found.append(part.histogram.tolist())
    ids = [f"i{i}" for i in range(IDS)]
    items = items_of(snapshot, ids, with_feature=True, with_payload=True)
    found += [plain_item(item) for item in items]
    rows = [row for item_id in ids if (row := snapshot.row_of(item_id)) is not None]
    found.append(snapshot.ids.tags_of(np.array(rows, dtype=np.int64)))
    found.append(snapshot.ids.expiries_of(np.array(rows, dtype=np.int64)))
    return found


def plain(result: SearchResult) -> tuple[object, ...]:
    receipt: Receipt = dataclasses.replace(result.receipt, timings=StageTimings())
    return tuple(result.hits), receipt


def plain_item(item: Item) -> tuple[object, ...]:
    assert item.embedding is not None
    feature = item.embedding.feature
    content = None if feature is None else feature.tobytes()
    return item.id, item.embedding.code, content, item.payload, item.tags, item.expires_unix_ms
