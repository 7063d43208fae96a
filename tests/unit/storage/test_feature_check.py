"""Features are compared with their checksums before they are first used, and scrubbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import DataLossError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, SearchOptions
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.exhaustive import ExhaustiveScan
from search_service.sketches import Sketches
from search_service.storage import Store, StoreConfig, failpoints
from search_service.storage.feature_check import FeatureChecks
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import DEADLINE_S, Model, assert_holds, make_records, wait_until

SPEC = CollectionSpec("c", "m", 64, 8, FeatureDtype.F32, 1000)
OTHER = replace(SPEC, name="other")
WIDTH = 32
ROWS_PER_SEGMENT = 64


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(server_binaries()[0]) as running:
        yield running


@pytest.fixture
def config(server: RedisServer, tmp_path: Path) -> StoreConfig:
    with server.client() as client:
        client.flushall()
    return StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=server.url,
        segment_bytes=WIDTH * ROWS_PER_SEGMENT,
        discovery_interval_s=0.1,
        scrub_mb_per_s=0,
    )


def fill(config: StoreConfig, spec: CollectionSpec = SPEC) -> Model:
    model = Model()
    with Store.open(config) as store:
        records = make_records(spec, 200)
        store.create(spec).upsert(records, request_id=spec.name, deadline_s=DEADLINE_S)
        model.upsert(records)
        assert_holds(store.get(spec.name), model)
    return model


def damage(config: StoreConfig, row: int, how: str) -> Path:
    segment, position = divmod(row, ROWS_PER_SEGMENT)
    path = config.data_dir / "collections" / "c" / f"features-0.s{segment:05d}.f32"
    data = bytearray(path.read_bytes())
    part = slice(position * WIDTH, (position + 1) * WIDTH)
    if how == "zeros":
        data[part] = bytes(WIDTH)
    elif how == "garbage":
        data[part] = bytes(range(200, 200 + WIDTH))
    else:
        data[part.start + 5] ^= 4
    with path.open("r+b") as file:  # In place: who has mapped it sees it.
        file.write(data)
    return path


def query_of(model: Model, item_id: str) -> Embedding:
    record = model.items[item_id]
    return Embedding(record.code, 64, "m", np.frombuffer(record.feature, dtype=np.float32))


@pytest.mark.parametrize("how", ["bit", "zeros", "garbage"])
@pytest.mark.parametrize("with_sketch", [False, True])
def test_a_damaged_feature_is_never_compared(
    config: StoreConfig, how: str, with_sketch: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = fill(config)
    damage(config, 70, how)
    with Store.open(config) as store:
        collection = store.get("c")
        sketches = Sketches(1 << 24) if with_sketch else None
        engine = Engine(sketches=sketches)
        query = query_of(model, "i70")
        for k in (1, 10, 300):
            found = engine.search(collection.snapshot(), query, SearchOptions(k=k))
            assert "i70" not in [hit.id for hit in found.hits]
            assert len(found.hits) == min(k, 199)
            assert (found.receipt.rows_without_feature, found.receipt.exact) == (1, False)
            others = [hit for hit in found.hits if hit.distance is not None]
            for hit in others:
                feature = np.frombuffer(model.items[hit.id].feature, dtype=np.float32)
                assert query.feature is not None
                assert hit.distance == pytest.approx(np.linalg.norm(feature - query.feature))
        assert sum("do not match their checksums" in text for text in caplog.messages) == 1
        assert "70" in caplog.text
        snapshot = collection.snapshot()
        assert snapshot.feature_of(70) is None
        feature = snapshot.feature_of(71)
        assert feature is not None
        assert feature.tobytes() == model.items["i71"].feature
        assert collection.info().n_missing_features == 1
        scan = ExhaustiveScan(snapshot, query, 300)
        for first in scan.blocks:
            scan.scan(first, Cancel())
        assert set(scan.nearest().ids) == set(model.items) - {"i70"}
        # Hamming distance is as good as before, and so is what is written over it.
        record = model.items["i70"]
        collection.upsert([record], request_id="again", deadline_s=DEADLINE_S)
        model.upsert([record])
        assert_holds(collection, model)
        assert collection.info().n_missing_features == 0
        found = engine.search(collection.snapshot(), query, SearchOptions(k=1))
        assert (found.hits[0].id, found.hits[0].distance) == ("i70", 0)
        if sketches is not None:
            sketches.close()


def test_rows_are_looked_at_once_and_new_ones_not_at_all(config: StoreConfig) -> None:
    model = fill(config)
    with Store.open(config) as store:
        collection = store.get("c")
        checks = collection.local.checks
        assert checks.n_unchecked == 200
        query = query_of(model, "i3")
        Engine().search(collection.snapshot(), query, SearchOptions(k=1, max_hamming_bits=0))
        assert checks.n_unchecked == 199
        Engine().search(collection.snapshot(), query, SearchOptions(k=1))
        assert checks.n_unchecked == 0
        more = make_records(SPEC, 50, seed=1, prefix="new")
        collection.upsert(more, request_id="more", deadline_s=DEADLINE_S)
        model.upsert(more)
        assert_holds(collection, model)
        assert checks.n_unchecked == 0
        # Once good, good until the scrubber comes by: that is the promise.
        damage(config, 3, "bit")
        found = Engine().search(collection.snapshot(), query, SearchOptions(k=1))
        assert found.hits[0].id == "i3"


def test_once_damaged_always_damaged() -> None:
    seen: list[int] = []
    checks = FeatureChecks(4, lambda rows: seen.extend(rows.tolist()))
    rows = np.arange(3)
    checks.note(rows, np.array([True, False, True]))
    checks.note(rows, np.array([True, True, False]))
    flags = checks.damaged(np.array([0, 1, 2, 3, 99]))
    assert flags is not None
    assert flags.tolist() == [False, True, True, False, False]
    assert seen == [1, 2]
    assert checks.unchecked(np.array([0, 3, 99])).tolist() == [3]
    checks.note(np.array([6]), np.array([False]))
    assert checks.damaged_rows() == [1, 2, 6]
    assert (checks.n_damaged, checks.n_unchecked) == (3, 1)


def test_the_scrubber_finds_what_no_search_reads(config: StoreConfig) -> None:
    fill(config)
    fill(config, OTHER)
    damage(config, 190, "bit")
    scrubbing = replace(config, scrub_mb_per_s=100, scrub_interval_s=0.2)
    with Store.open(scrubbing) as store:
        collection = store.get("c")
        wait_until(lambda: collection.info().n_missing_features == 1, "the scrubber came by")
        assert collection.local.checks.damaged_rows() == [190]
        damage(config, 20, "zeros")  # Under a running process, in a row that was good before.
        wait_until(lambda: collection.info().n_missing_features == 2, "it comes again")
        wait_until(
            lambda: not store.get("other").local.checks.n_unchecked, "the other is read, too"
        )
        assert store.get("other").info().n_missing_features == 0


@pytest.mark.parametrize("name", ["codes-0.w0.u64", "rows-0.rec", "ids-0.bin", "tags-0.bin"])
def test_the_scrubber_puts_aside_what_it_cannot_trust(config: StoreConfig, name: str) -> None:
    fill(config)
    model = fill(config, OTHER)
    scrubbing = replace(config, scrub_mb_per_s=100, scrub_interval_s=0.2)
    with Store.open(scrubbing) as store:
        path = config.data_dir / "collections" / "c" / name
        with path.open("r+b") as file:
            file.seek(9)
            byte = file.read(1)
            file.seek(9)
            file.write(bytes([byte[0] ^ 16]))
        quarantine = config.data_dir / "quarantine"
        wait_until(lambda: quarantine.exists() and any(quarantine.iterdir()), "it is put aside")
        aside = list(quarantine.iterdir())
        assert [path.name[:2] for path in aside] == ["c-"]
        assert_holds(store.get("other"), model)


@pytest.mark.parametrize("how", ["cut", "deleted", "replaced"])
def test_a_file_that_goes_under_a_running_process_kills_nobody(
    config: StoreConfig, how: str
) -> None:
    fill(config)
    model = fill(config, OTHER)
    with Store.open(config) as store:
        path = config.data_dir / "collections" / "c" / "features-0.s00001.f32"
        if how == "cut":
            with path.open("r+b") as file:
                file.truncate(0)
        elif how == "deleted":
            path.unlink()
        else:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
        wait_until((config.data_dir / "quarantine").exists, "it is put aside")
        assert_holds(store.get("other"), model)


def test_a_start_puts_odd_things_aside_and_serves_the_rest(config: StoreConfig) -> None:
    model = fill(config)
    directory = config.data_dir / "collections"
    (directory / "file").write_text("not a directory")
    (directory / "empty").mkdir()
    (directory / "link").symlink_to(directory / "c")
    (directory / "Not a name").mkdir()
    (config.data_dir / "replica_id").write_bytes(b"\xff garbage")
    for _ in range(2):  # And never again and again.
        with Store.open(config) as store:
            assert_holds(store.get("c"), model)
        aside = {path.name.split("-")[0] for path in (config.data_dir / "quarantine").iterdir()}
        assert aside == {"file", "empty", "link"}
    assert sorted(path.name for path in directory.iterdir()) == ["Not a name", "c"]


def test_writing_stops_when_the_disk_has_lost_writes(config: StoreConfig) -> None:
    model = fill(config)
    with Store.open(config) as store:
        collection = store.get("c")
        records = make_records(SPEC, 10, seed=3, prefix="n")
        collection.upsert(records, request_id="n", deadline_s=DEADLINE_S)
        model.upsert(records)
        assert_holds(collection, model)
        with failpoints.arm("checkpoint.sync", "eio"), pytest.raises(OSError, match="failpoint"):
            collection.checkpoint()
        with pytest.raises(DataLossError, match="lost writes"):
            collection.upsert(records, request_id="m", deadline_s=DEADLINE_S)
        with pytest.raises(DataLossError, match="lost writes"):
            collection.delete(["i1"], request_id="d", deadline_s=DEADLINE_S)
        with pytest.raises(DataLossError):
            collection.checkpoint()
        info = collection.info()
        assert not info.writable
        assert "restart" in info.detail
        assert_holds(collection, model)
    with Store.open(config) as store:
        assert_holds(store.get("c"), model)
        store.get("c").upsert(records, request_id="m", deadline_s=DEADLINE_S)
