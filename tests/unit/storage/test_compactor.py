"""Compaction by the store's own thread: when it is due, asked for, stopped, out of room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from hashlens.errors import DataLossError, LimitError, PreconditionError, UnavailableError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Collection, Store, StoreConfig, failpoints, layout
from search_service.storage.connection import Caller
from search_service.storage.erasure import Eraser
from search_service.storage.keys import Keys
from search_service.storage.local import LocalCollection
from tests.support.redis_server import RedisServer
from tests.support.stores import DEADLINE_S, Model, assert_holds, make_records, wait_until

NewName = Callable[[], str]


def config_of(data_dir: Path, server: RedisServer, **changes: object) -> StoreConfig:
    config = StoreConfig(
        data_dir=data_dir, redis_url=server.url, segment_bytes=4096, discovery_interval_s=0.05
    )
    return replace(config, **changes)


def spec_of(name: str, dim: int = 8) -> CollectionSpec:
    return CollectionSpec(name, "m", 64, dim, FeatureDtype.F16, 1000)


def fill(collection: Collection, n: int = 300, n_dead: int = 100) -> Model:
    """Write items and replace some."""
    model = Model()
    for seed, count in ((0, n), (1, n_dead)):
        records = make_records(collection.spec, count, seed=seed)
        collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
        model.upsert(records)
    collection.wait_for(model.version, DEADLINE_S)
    return model


def test_it_comes_when_enough_is_dead(
    server: RedisServer, data_dir: Path, new_name: NewName
) -> None:
    config = config_of(data_dir, server, compaction_share=0.2, compaction_min_rows=50)
    with Store.open(config) as store:
        few = store.create(spec_of(new_name()))
        fill(few, n_dead=40)
        collection = store.create(spec_of(new_name()))
        model = fill(collection)
        wait_until(lambda: collection.info().n_dead_rows == 0, "it is compacted")
        assert_holds(collection, model)
        assert few.info().n_dead_rows == 40


def test_a_share_of_0_waits_to_be_asked(
    server: RedisServer, data_dir: Path, new_name: NewName
) -> None:
    config = config_of(data_dir, server, compaction_share=0.0, compaction_min_rows=0)
    with Store.open(config) as store:
        collection = store.create(spec_of(new_name()))
        fill(collection)
        asked = store.create(spec_of(new_name()))
        fill(asked)
        assert store.compact(asked.spec.name, deadline_s=DEADLINE_S).n_rows_erased == 100
        assert collection.info().n_dead_rows == 100


def test_all_replicas_do_it(
    server: RedisServer, data_dir: Path, tmp_path: Path, new_name: NewName
) -> None:
    other_config = config_of(tmp_path / "other", server)
    with Store.open(config_of(data_dir, server)) as store, Store.open(other_config) as other:
        collection = store.create(spec_of(new_name()))
        name = collection.spec.name
        follower = other.get(name, deadline_s=DEADLINE_S)
        model = fill(collection)
        follower.wait_for(model.version, DEADLINE_S)
        result = store.compact(name, wait_for_replicas=True, deadline_s=DEADLINE_S)
        assert result.complete
        assert len(result.replicas) == 2
        model.version = result.version
        for one in (collection, follower):
            assert_holds(one, model)
            assert one.info().n_dead_rows == 0
            assert one.erased_seq >= result.version
        # Without dead rows there is nothing to do, and still something to tell.
        again = other.compact(name, wait_for_replicas=True, deadline_s=DEADLINE_S)
        assert again.complete
        assert again.version == result.version + 1


def test_a_replica_that_was_away_does_it_when_it_comes_back(
    server: RedisServer, data_dir: Path, tmp_path: Path, new_name: NewName
) -> None:
    other_config = config_of(tmp_path / "other", server)
    with Store.open(config_of(data_dir, server)) as store:
        collection = store.create(spec_of(new_name()))
        name = collection.spec.name
        with Store.open(other_config) as other:
            model = fill(collection)
            other.get(name, deadline_s=DEADLINE_S).wait_for(model.version, DEADLINE_S)
        result = store.compact(name, deadline_s=DEADLINE_S)
        # It still counts, and the log still waits for it.
        assert not result.complete
        assert result.log_begins_after < result.version - 1
        assert not result.redis_rewritten
        with Store.open(other_config) as other:
            wait_until(lambda: other.get(name).erased_seq >= result.version, "it erases, too")
            again = store.compact(name, wait_for_replicas=True, deadline_s=DEADLINE_S)
            assert again.complete
            assert again.n_rows_erased == result.n_rows_erased == 100


def test_a_full_disk_is_an_error_and_changes_nothing(
    server: RedisServer, data_dir: Path, new_name: NewName
) -> None:
    with Store.open(config_of(data_dir, server)) as store:
        collection = store.create(spec_of(new_name()))
        model = fill(collection)
        directory = data_dir / "collections" / collection.spec.name

        def generations() -> set[int | None]:
            return {layout.generation_of(path.name) for path in directory.iterdir()}

        with failpoints.arm("compact.copy", "enospc"):
            with pytest.raises(LimitError, match="No space left"):
                store.compact(collection.spec.name, deadline_s=DEADLINE_S)
            # It is tried again at once, once: what was asked for is due.
            wait_until(lambda: generations() == {0, None}, "nothing half-done is left")
        model.version += 1
        assert_holds(collection, model)
        # What was asked for stays asked for.
        assert store.compact(collection.spec.name, deadline_s=DEADLINE_S).n_rows_erased == 100


@pytest.mark.parametrize("how", ["drop", "close"])
def test_a_slow_compaction_keeps_nobody(
    server: RedisServer, data_dir: Path, new_name: NewName, how: str
) -> None:
    store = Store.open(config_of(data_dir, server, compaction_mb_per_s=1e-6))
    collection = store.create(spec_of(new_name()))
    name = collection.spec.name
    model = fill(collection)
    raised: list[Exception] = []

    def ask() -> None:
        try:
            store.compact(name, deadline_s=120)
        except (UnavailableError, PreconditionError) as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    directory = data_dir / "collections" / name
    wait_until(lambda: (directory / layout.rows_file(1)).exists(), "it has begun")
    if how == "drop":
        store.drop(name, deadline_s=DEADLINE_S)
        assert not directory.exists()
    store.close()
    thread.join(30)
    assert not thread.is_alive()
    assert len(raised) == 1
    if how == "close":
        LocalCollection.load(directory).close()
        assert not (directory / layout.rows_file(1)).exists()
        with Store.open(config_of(data_dir, server)) as store:  # Which does what was asked for.
            model.version += 1
            assert_holds(store.get(name), model)


def test_files_put_aside_are_not_gone(
    server: RedisServer, data_dir: Path, new_name: NewName
) -> None:
    with Store.open(config_of(data_dir, server)) as store:
        collection = store.create(spec_of(new_name()))
        fill(collection)
        name = collection.spec.name
        aside = data_dir / "quarantine" / f"{name}-20260101T000000Z-1-abcdef"
        aside.mkdir(parents=True)
        (aside / "ids-0.bin").write_bytes(b"old")
        (data_dir / "quarantine" / f"{name}-x-20260101T000000Z-1-abcdef").mkdir()
        result = store.compact(name, deadline_s=DEADLINE_S)
        left = [file for file in result.files if not file.gone]
        assert [file.path for file in left] == [f"quarantine/{aside.name}/ids-0.bin"]
        assert not result.complete


def test_a_redis_whose_nodes_are_not_known_is_not_called_clean(
    server: RedisServer, data_dir: Path, new_name: NewName, client: redis.Redis
) -> None:
    with Store.open(config_of(data_dir, server)) as store:
        collection = store.create(spec_of(new_name()))
        fill(collection)
        before = client.config_get("stream-node-max-bytes")["stream-node-max-bytes"]
        client.config_set("stream-node-max-bytes", 0)
        try:
            result = store.compact(collection.spec.name, deadline_s=DEADLINE_S)
        finally:
            client.config_set("stream-node-max-bytes", before)
        assert all(file.gone for file in result.files)
        assert (result.redis_rewritten, result.complete) == (False, False)


def test_a_mark_is_a_version_and_nothing_else(
    server: RedisServer, data_dir: Path, new_name: NewName, client: redis.Redis
) -> None:
    with Store.open(config_of(data_dir, server)) as store:
        collection = store.create(spec_of(new_name()))
        model = fill(collection)
        version = collection.ask_to_erase(DEADLINE_S)
        assert version == model.version + 1
        model.version = version
        assert_holds(collection, model)
        meta = client.hgetall(Keys(collection.spec.name).meta)
        assert (meta[b"seq"], meta[b"erase_seq"]) == (b"%d" % version,) * 2
        (entry_id, fields), *_ = client.xrevrange(Keys(collection.spec.name).log, count=1)
        assert entry_id == b"%d-1" % version
        assert fields[b"r"] == b"\x03" + bytes(2 + 4) + b"\x00\x00\x01\x00" + bytes(1 << 16)
        record = layout.unpack_record(version, fields[b"r"], 64, 16)
        assert (record.op, record.id, record.feature) == (layout.MARK, "", b"")
        for damaged in (fields[b"r"][:-1], fields[b"r"] + b"\0", b"\x03\x01" + fields[b"r"][2:]):
            with pytest.raises(DataLossError):
                layout.unpack_record(version, damaged, 64, 16)


def test_a_rewriting_that_was_under_way_does_not_count(
    server: RedisServer, client: redis.Redis
) -> None:
    eraser = Eraser(Caller(server.url, 5.0))
    rewrites = client.info("persistence")["aof_rewrites"]
    client.bgrewriteaof()
    assert eraser.rewrite(DEADLINE_S)
    assert client.info("persistence")["aof_rewrites"] == rewrites + 2
