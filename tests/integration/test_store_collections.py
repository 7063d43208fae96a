"""Several collections, several stores on one Redis, the embedded server."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import (
    AlreadyExistsError,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
)
from hashlens.types import CollectionSpec, DeleteResult, FeatureDtype
from search_service.storage import Collection, Record, Store, StoreConfig
from search_service.storage import writer as writer_module
from search_service.storage.layout import LogRecord
from search_service.storage.local import LocalCollection
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    contents,
    make_record,
    make_records,
    wait_until,
)

SPECS = [
    CollectionSpec("codes-only", "m1", 48, 0, expected_rows=1000),
    CollectionSpec("half", "m2", 64, 33, FeatureDtype.F16, 100_000),
    CollectionSpec("single_0", "m3", 512, 7, FeatureDtype.F32, 1),
]


@pytest.fixture(scope="module", params=server_binaries(), ids=lambda path: path.name)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as running:
        yield running


@pytest.fixture
def config(server: RedisServer, tmp_path: Path) -> Iterator[StoreConfig]:
    with server.client() as client:
        client.flushall()
        yield StoreConfig(data_dir=tmp_path / "one", redis_url=server.url, discovery_interval_s=0.1)


def other_of(config: StoreConfig, directory: Path) -> StoreConfig:
    """Another replica."""
    return StoreConfig(data_dir=directory, redis_url=config.redis_url, discovery_interval_s=0.1)


def fill(collection: Collection, model: Model, n: int = 50, seed: int = 0) -> None:
    records = make_records(collection.spec, n, seed)
    version = collection.upsert(records, request_id=f"f{seed}", deadline_s=DEADLINE_S)
    model.upsert(records)
    assert version == model.version


def test_collections_are_independent(config: StoreConfig, server: RedisServer) -> None:
    models = [Model() for _ in SPECS]
    with Store.open(config) as store:
        for spec, model in zip(SPECS, models, strict=True):
            collection = store.create(spec)
            assert (collection.spec, store.get(spec.name)) == (spec, collection)
            fill(collection, model)
        for spec, model in zip(SPECS, models, strict=True):
            fill(store.get(spec.name), model, n=20, seed=1)
            gone = store.get(spec.name).delete(["i1", "i2"], request_id="d", deadline_s=DEADLINE_S)
            model.delete(["i1", "i2"])
            assert gone == DeleteResult(version=model.version, n_deleted=2)
            assert_holds(store.get(spec.name), model)
        assert [info.spec for info in store.list()] == SPECS
        store.drop("half")
        assert [info.spec.name for info in store.list()] == ["codes-only", "single_0"]
        with pytest.raises(NotFoundError):
            store.get("half")
    with Store.open(config) as store, server.client() as client:
        assert store.find("half") is None
        for spec, model in zip(SPECS, models, strict=True):
            if spec.name != "half":
                assert_holds(store.get(spec.name), model)
                assert_in_redis(client, spec.name, model)


def test_creating_again(config: StoreConfig, tmp_path: Path) -> None:
    spec = SPECS[1]
    with Store.open(config) as store, Store.open(other_of(config, tmp_path / "two")) as other:
        collection = store.create(spec)
        model = Model()
        fill(collection, model)
        assert store.create(spec) is collection
        assert other.create(spec).epoch == collection.epoch
        assert_holds(other.get(spec.name), model)
        changed = CollectionSpec(spec.name, "another model", 64, 33, FeatureDtype.F16, 100_000)
        for each in (store, other):
            with pytest.raises(AlreadyExistsError, match="another specification"):
                each.create(changed)
        with pytest.raises(InvalidInputError):
            store.create(CollectionSpec("../x", "m", 8, 0))


def test_dropping_and_making_again(config: StoreConfig, server: RedisServer) -> None:
    spec = SPECS[1]
    with Store.open(config) as store, server.client() as client:
        old, model = store.create(spec), Model()
        fill(old, model)
        old.wait_for(model.version, DEADLINE_S)
        held = old.snapshot()
        before = contents(held)
        store.drop(spec.name)
        assert client.keys(f"hl:{{{spec.name}}}:[^r]*") == []
        with pytest.raises(NotFoundError, match="dropped"):
            old.upsert(make_records(spec, 1), request_id="x", deadline_s=DEADLINE_S)
        new, fresh = store.create(spec), Model()
        assert new.epoch != old.epoch
        # The same request ids as before the drop: they mean nothing here.
        fill(new, fresh, n=5)
        assert_holds(new, fresh)
        # A search that was under way keeps what it had.
        assert contents(held) == before
        store.drop(spec.name)
        with pytest.raises(NotFoundError):
            store.drop(spec.name)


def test_replicas_follow_each_other(config: StoreConfig, tmp_path: Path) -> None:
    spec = SPECS[1]
    with Store.open(config) as one, Store.open(other_of(config, tmp_path / "two")) as two:
        mine, model = one.create(spec), Model()
        wait_until(lambda: two.find(spec.name) is not None, "the other finds it")
        theirs = two.get(spec.name)
        for seed in range(6):
            fill((mine, theirs)[seed % 2], model, n=30, seed=seed)
            # Read your writes on any replica.
            for collection in (mine, theirs):
                assert contents(collection.wait_for(model.version, DEADLINE_S)) == model.items
        one.drop(spec.name)
        wait_until(lambda: two.find(spec.name) is None, "the other removes it")
        files = tmp_path / "two" / "collections" / spec.name
        wait_until(lambda: not files.exists(), "its files are gone")
        again = one.create(spec)
        wait_until(lambda: two.find(spec.name) is not None, "the other finds the new one")
        assert two.get(spec.name).epoch == again.epoch
    with Store.open(config) as one:
        one.drop(spec.name)
    # A drop while it was away is noticed when it is back.
    with Store.open(other_of(config, tmp_path / "two")) as two:
        wait_until(lambda: two.find(spec.name) is None, "the other removes it")


def test_a_slow_replica_keeps_the_log(
    config: StoreConfig, server: RedisServer, tmp_path: Path
) -> None:
    spec = SPECS[0]
    other = other_of(config, tmp_path / "two")
    with Store.open(config) as one, server.client() as client:
        collection, model = one.create(spec), Model()
        with Store.open(other) as two:
            fill(collection, model, n=40)
            two.get(spec.name).wait_for(40, DEADLINE_S)
        # The other closed with a checkpoint at 40; it is away while more is written.
        fill(collection, model, n=60, seed=1)
        collection.wait_for(100, DEADLINE_S)
        assert collection.checkpoint() == 100
        assert client.xinfo_stream(f"hl:{{{spec.name}}}:log")["first-entry"][0] == b"40-1"
        with Store.open(other) as two:
            assert_holds(two.get(spec.name), model)
            assert two.get(spec.name).checkpoint() == 100
        assert collection.checkpoint() == 100
        assert client.xinfo_stream(f"hl:{{{spec.name}}}:log")["first-entry"][0] == b"100-1"


def test_checkpoints_come_by_themselves(config: StoreConfig) -> None:
    spec = SPECS[0]
    for changes in (
        {"checkpoint_interval_s": 0.1},
        {"checkpoint_rows": 10},
        {"checkpoint_bytes": 1000},
    ):
        shutil.rmtree(config.data_dir, ignore_errors=True)
        eager = StoreConfig(data_dir=config.data_dir, redis_url=config.redis_url, **changes)
        with Store.open(eager) as store:
            collection, model = store.create(spec), Model()
            fill(collection, model)
            wait_until(lambda c=collection: c.info().checkpoint_version == 50, "a checkpoint")
            store.drop(spec.name)


def test_many_threads_write_at_once(config: StoreConfig, server: RedisServer) -> None:
    spec = SPECS[1]
    with Store.open(config) as store:
        collection = store.create(spec)
        written: list[tuple[int, list[Record]]] = []

        def write(thread: int) -> None:
            for step in range(10):
                records = make_records(spec, 15, seed=step, prefix=f"{step % 3}-")
                request_id = f"{thread}-{step}"
                version = collection.upsert(records, request_id=request_id, deadline_s=DEADLINE_S)
                written.append((version, records))

        threads = [threading.Thread(target=write, args=(thread,)) for thread in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        model = Model()
        for version, records in sorted(written, key=lambda each: each[0]):
            model.upsert(records)
            assert model.version == version
        assert_holds(collection, model)
        with server.client() as client:
            assert_in_redis(client, spec.name, model)


def test_writers_wait_for_files_that_fall_behind(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The log is in Redis's memory until the files have it.
    monkeypatch.setattr(writer_module, "_MAX_LAG_BYTES", 1)
    opened = threading.Event()
    apply = LocalCollection.apply

    def apply_later(self: LocalCollection, records: Sequence[LogRecord]) -> None:
        assert opened.wait(DEADLINE_S)
        apply(self, records)

    monkeypatch.setattr(LocalCollection, "apply", apply_later)
    with Store.open(config) as store:
        collection, model = store.create(SPECS[1]), Model()
        try:
            fill(collection, model, seed=1)
            late = make_records(SPECS[1], 50, seed=2)
            with pytest.raises(OverloadedError, match="faster"):
                collection.upsert(late, request_id="f2", deadline_s=0.2)
        finally:
            opened.set()
        fill(collection, model, seed=2)
        assert_holds(collection, model)


def test_what_does_not_fit_is_refused_before_it_is_written(config: StoreConfig) -> None:
    spec = SPECS[1]
    with Store.open(config) as store:
        collection = store.create(spec)
        good = make_records(spec, 3)[2]
        wrong = {
            "items[1].id": Record("", good.code, good.feature),
            "items[1].embedding.code": Record("x", good.code + b"x", good.feature),
            "items[1].embedding.feature": Record("x", good.code, good.feature[:-1]),
            "items[1].payload": Record("x", good.code, good.feature, b"x" * 65_537),
        }
        for field, record in wrong.items():
            with pytest.raises(InvalidInputError) as caught:
                collection.upsert([good, record], request_id="r", deadline_s=DEADLINE_S)
            assert caught.value.field == field
        for item_id in ("", "x" * 1025, "\ud800"):
            with pytest.raises(InvalidInputError) as caught:
                collection.delete(["i", item_id], request_id="r", deadline_s=DEADLINE_S)
            assert caught.value.field == "ids[1]"
        assert collection.upsert([], request_id="r", deadline_s=DEADLINE_S) == 0
        empty = collection.delete([], request_id="r", deadline_s=DEADLINE_S)
        assert empty == DeleteResult(version=0, n_deleted=0)
        assert collection.delete(["i"], request_id="d", deadline_s=DEADLINE_S).n_deleted == 0
        assert collection.snapshot().version == 0
        with pytest.raises(DeadlineError):
            collection.wait_for(1, 0.01)


def test_large_payloads_and_odd_ids_come_back(config: StoreConfig) -> None:
    spec = SPECS[2]
    rng = np.random.default_rng(8)
    ids = [
        "\u00e9",
        "e\u0301",
        "\U0001f469\u200d\U0001f467",
        " ",
        "a\tb",
        "x" * 1024,
        "/../",
        "{c}",
    ]
    records = [make_record(spec, item_id, rng, rng.bytes(65_536)) for item_id in ids]
    model = Model()
    with Store.open(config) as store:
        collection = store.create(spec)
        collection.upsert(records, request_id="\u00fc " * 10, deadline_s=DEADLINE_S)
        model.upsert(records)
        assert_holds(collection, model)
    with Store.open(config) as store:
        assert_holds(store.get(spec.name), model)


def test_the_embedded_server_needs_nothing_else(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=tmp_path / "data", redis_url=None)
    spec, model = SPECS[1], Model()
    with Store.open(config) as store:
        collection = store.create(spec)
        fill(collection, model)
        assert_holds(collection, model)
        wait_until(lambda: collection.info().durability == "always", "the level is known")
        with pytest.raises(PreconditionError, match="in use"):
            Store.open(config)
        # It crashes; the store gets a new one, and goes on by itself.
        embedded = store._resources._exit_callbacks[1][1].__self__  # type: ignore[attr-defined]
        first = embedded.pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: embedded.pid not in (None, first), "a new server")
        fill(collection, model, seed=1)
        assert_holds(collection, model)
    with Store.open(config) as store:
        assert_holds(store.get(spec.name), model)
