"""Damaged files and full disks: put aside and rebuilt, or said; never a wrong answer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hashlens.errors import DataLossError, PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Store, StoreConfig
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    contents,
    make_records,
    on_disk,
    wait_until,
)

SPEC = CollectionSpec("c", "m", 100, 4, FeatureDtype.F16, 1000)
OTHER = CollectionSpec("other", "m", 32, 0, expected_rows=1000)
FILES = ["codes-0.w1.u64", "rows-0.rec", "ids-0.bin", "payloads-0.bin", "dead-0.u64"]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """One kind is enough: what is damaged here is ours."""
    with RedisServer(server_binaries()[0]) as running:
        yield running


@pytest.fixture
def config(server: RedisServer, tmp_path: Path) -> StoreConfig:
    return StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=server.url,
        segment_bytes=512,
        discovery_interval_s=0.1,
    )


def fill(store: Store, spec: CollectionSpec) -> Model:
    """Write, replace and delete."""
    collection, model = store.create(spec), Model()
    for seed, n in ((0, 150), (1, 20)):
        records = make_records(spec, n, seed)
        collection.upsert(records, request_id=f"r{seed}", deadline_s=DEADLINE_S)
        model.upsert(records)
    collection.delete(["i3", "i30"], request_id="d", deadline_s=DEADLINE_S)
    model.delete(["i3", "i30"])
    assert_holds(collection, model)
    return model


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, 10)
    elif how == "flipped":
        path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    else:
        path.write_bytes(bytes(len(data)))


CASES = [(name, how) for name in FILES for how in ("cut", "flipped", "zeroed")]
CASES += [("MANIFEST.json", "cut"), ("MANIFEST.json", "zeroed"), ("MANIFEST.json", "missing")]
CASES += [("features-0.s00001.f16", "cut"), ("features-0.s00000.f16", "missing")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_damaged_files_are_put_aside_and_rebuilt_from_the_log(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    # Redis keeps the whole log: the checkpoint is there, the trimming is not.
    monkeypatch.setattr("search_service.storage.catalog.Catalog.trim", lambda *_, **__: "ok")
    with Store.open(config) as store:
        model, other = fill(store, SPEC), fill(store, OTHER)
    damage(config.data_dir / "collections" / "c" / name, how)
    with Store.open(config) as store:
        assert contents(store.get("other").snapshot()) == other.items
        assert_holds(store.get("c"), model)
        assert store.get("c").checkpoint() == model.version
        aside = list((config.data_dir / "quarantine").iterdir())
        assert [path.name[:2] for path in aside] == ["c-"]
    assert on_disk(config.data_dir / "collections" / "c") == (model.version, model.items)
    with Store.open(config) as store:
        assert contents(store.get("c").snapshot()) == model.items
        assert len(list((config.data_dir / "quarantine").iterdir())) == 1


def test_where_the_log_is_trimmed_damaged_files_are_made_anew_from_redis(
    config: StoreConfig,
) -> None:
    with Store.open(config) as store:
        model = fill(store, SPEC)
        other = fill(store, OTHER)
    damage(config.data_dir / "collections" / "c" / "payloads-0.bin", "flipped")
    for _ in range(2):
        with Store.open(config) as store:
            wait_until(lambda s=store: s.get("c").info().writable, "the collection is back")
            # The features come out of the files that were put aside.
            assert contents(store.get("c").snapshot()) == model.items
            assert contents(store.get("other").snapshot()) == other.items
    assert len(list((config.data_dir / "quarantine").iterdir())) == 1


def test_damage_while_redis_is_away_is_rebuilt_when_it_comes(
    config: StoreConfig, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_service.storage.catalog.Catalog.trim", lambda *_, **__: "ok")
    with Store.open(config) as store:
        model, other = fill(store, SPEC), fill(store, OTHER)
    damage(config.data_dir / "collections" / "c" / "rows-0.rec", "zeroed")
    server.stop()
    with Store.open(config) as store:
        assert store.find("c") is None
        assert contents(store.get("other").snapshot()) == other.items
        server.start()
        wait_until(lambda: store.find("c") is not None, "the collection is found")
        assert_holds(store.get("c"), model)


def test_two_processes_cannot_use_one_directory(config: StoreConfig) -> None:
    with Store.open(config) as store:
        model = fill(store, SPEC)
        with pytest.raises(PreconditionError, match=f"in use by another process .{os.getpid()}"):
            Store.open(config)
        assert_holds(store.get("c"), model)
    Store.open(config).close()


def test_a_disk_that_fails_to_sync_is_not_trusted_again(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(config) as store:
        model = fill(store, SPEC)
        collection = store.get("c")
        collection.checkpoint()
        records = make_records(SPEC, 5, seed=4, prefix="late")
        collection.upsert(records, request_id="late", deadline_s=DEADLINE_S)
        model.upsert(records)
        assert_holds(collection, model)

        def fail(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            collection.checkpoint()
        monkeypatch.undo()
        # The kernel would now report success without having written anything.
        with pytest.raises(DataLossError, match="restart"):
            collection.checkpoint()
        assert "Input/output" in collection.info().detail
        assert collection.info().checkpoint_version == model.version - 5
    with Store.open(config) as store:
        assert_holds(store.get("c"), model)
        assert store.get("c").checkpoint() == model.version


WRITER = """
import json, resource, sys, time
from pathlib import Path
from hashlens.errors import LimitError
from search_service.storage import Store, StoreConfig
from tests.faults.test_store_damaged import SPEC
from tests.support.stores import make_records

store = Store.open(StoreConfig(data_dir=Path(sys.argv[1]), redis_url=sys.argv[2]))
collection = store.create(SPEC)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
collection.upsert(make_records(SPEC, 6000), request_id="a", deadline_s=60)
while not collection.info().detail.startswith("The search service cannot write"):
    time.sleep(0.01)
version = collection.snapshot().version
try:
    collection.upsert(make_records(SPEC, 1), request_id="b", deadline_s=10)
    sys.exit("a write was accepted that could not be applied")
except LimitError:
    pass
limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
collection.wait_for(6000, 60)
while not collection.info().writable:
    time.sleep(0.01)
assert 0 <= version < 6000, version
collection.upsert(make_records(SPEC, 1), request_id="b", deadline_s=10)
collection.wait_for(6001, 60)
store.close()
"""


def test_a_full_disk_stops_writing_and_heals_by_itself(
    config: StoreConfig, server: RedisServer
) -> None:
    arguments = [sys.executable, "-c", WRITER, config.data_dir, server.url]
    root = Path(__file__).parents[2]
    subprocess.run(arguments, check=True, timeout=170, cwd=root)
    model = Model()
    model.upsert(make_records(SPEC, 6000))
    model.upsert(make_records(SPEC, 1))
    assert on_disk(config.data_dir / "collections" / "c") == (model.version, model.items)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
