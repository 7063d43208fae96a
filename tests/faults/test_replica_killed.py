"""kill -9 of a replica that copies and of one that serves: the copy is completed, and is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Store, StoreConfig
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.replica_process import ReplicaProcess
from tests.support.replicas import replica
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    make_records,
    on_disk,
    wait_until,
)

SPEC = CollectionSpec("c", "m", 100, 64, FeatureDtype.F16, 1000)
WITHIN_S = 60.0
ConfigFor = Callable[[str], StoreConfig]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """One kind is enough: what is killed here is ours."""
    with RedisServer(server_binaries()[0]) as running:
        yield running


@pytest.fixture
def config_for(server: RedisServer, tmp_path: Path) -> ConfigFor:
    def make(name: str) -> StoreConfig:
        return StoreConfig(
            data_dir=tmp_path / name,
            redis_url=server.url,
            segment_bytes=8192,
            discovery_interval_s=0.1,
            hello_interval_s=0.1,
            resync_patience_s=3600.0,
        )

    return make


def fill(store: Store) -> Model:
    """Write, replace, delete, and have the log begin at the newest write."""
    collection, model = store.create(SPEC), Model()
    for seed, n in ((1, 400), (2, 100)):
        records = make_records(SPEC, n, seed)
        collection.upsert(records, request_id=f"r{seed}", deadline_s=DEADLINE_S)
        model.upsert(records)
    collection.delete(["i3", "i300"], request_id="d", deadline_s=DEADLINE_S)
    model.delete(["i3", "i300"])
    assert_holds(collection, model)
    collection.checkpoint()
    return model


def assert_copied(store: Store, config: StoreConfig, model: Model) -> None:
    """The replica follows, with every feature, and nothing is left lying about."""
    wait_until(
        lambda: (found := store.find("c")) is not None and found.info().writable,
        "the replica follows",
        WITHIN_S,
    )
    collection = store.get("c")
    assert_holds(collection, model)
    collection.checkpoint()
    assert on_disk(config.data_dir / "collections" / "c") == (model.version, model.items)
    assert [path.name for path in (config.data_dir / "collections").iterdir()] == ["c"]


def test_a_copy_that_is_killed_anywhere_is_completed(config_for: ConfigFor) -> None:
    # The second renaming is when the old files are gone, and the new ones not yet in place.
    places = ["copy.begin", "copy.part", "copy.part@9", "copy.verify", "copy.rename"]
    with replica(config_for("source")) as source:
        model = fill(source)
        for number, place in enumerate([*places, "copy.rename@2"]):
            config = config_for(f"copy{number}")
            name, _, first = place.partition("@")
            failpoints = f"{name}=kill@{first or 1}"
            arguments = (config.data_dir, str(config.redis_url))
            with ReplicaProcess(*arguments, failpoints=failpoints) as copying:
                copying.wait_killed()
            with replica(config) as store:
                assert_copied(store, config, model)


def test_a_source_that_is_killed_in_mid_copy_is_gone_on_with(config_for: ConfigFor) -> None:
    config, source = config_for("copy"), config_for("source")
    with replica(source) as store:
        model = fill(store)
    draft = config.data_dir / "collections" / ".copy-c"

    def copied_bytes() -> int:
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in draft.iterdir())
        return 0

    arguments = (source.data_dir, str(source.redis_url))
    with ReplicaProcess(*arguments, bytes_per_s=30_000.0) as serving, replica(config) as store:
        wait_until(lambda: copied_bytes() > 20_000, "some is copied", WITHIN_S)
        serving.kill()
        wait_until(
            lambda: "not replaced yet" in store.get("c").info().detail,
            "the source is missed",
            WITHIN_S,
        )
        before = copied_bytes()
        assert before > 20_000
        assert store.get("c").snapshot().rows == 0
        with ReplicaProcess(*arguments):
            assert_copied(store, config, model)
