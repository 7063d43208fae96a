"""Redis hangs, goes, comes back empty, comes back older: reading goes on, nothing is silent."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hashlens.errors import LimitError, NotFoundError, PreconditionError, UnavailableError
from hashlens.types import CollectionSpec
from search_service.storage import Store, StoreConfig
from search_service.storage.local import LocalCollection
from tests.support.redis_server import RedisServer
from tests.support.stores import DEADLINE_S, contents, make_records, wait_until
from tests.support.trouble import SPEC, assert_writes_again, fill, refused, repeat_refused


@pytest.fixture
def config(server: RedisServer, tmp_path: Path) -> StoreConfig:
    return StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=server.url,
        redis_timeout_s=0.5,
        discovery_interval_s=0.1,
        # What is in a checkpoint is for the tests to say.
        checkpoint_interval_s=3600.0,
    )


@pytest.fixture
def store(config: StoreConfig) -> Iterator[Store]:
    with Store.open(config) as store:
        yield store


@pytest.mark.parametrize("how", ["paused", "stopped"])
def test_while_redis_is_away_reading_goes_on(server: RedisServer, store: Store, how: str) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    server.pause() if how == "paused" else server.stop()
    began = time.monotonic()
    error = refused(collection)
    # A bound for hanging, not a measurement: without its deadline, each call would try eight times.
    assert time.monotonic() - began < 12.0
    assert type(error) is UnavailableError
    assert contents(collection.snapshot()) == model.items
    assert store.get("c") is collection
    wait_until(lambda: not collection.info().writable, "the state shows it")
    info = collection.info()
    assert "Redis is away" in info.detail
    assert (info.durability, info.version, info.n_items) == ("unknown", 100, 100)
    assert [each.spec for each in store.list(deadline_s=0.2)] == [SPEC]
    for call in (store.get, store.drop):
        with pytest.raises(UnavailableError):
            call("unknown", deadline_s=0.2)  # type: ignore[operator]
    with pytest.raises(UnavailableError):
        store.create(CollectionSpec("d", "m", 8, 0), deadline_s=0.2)
    assert collection.checkpoint() == 100
    server.resume() if how == "paused" else server.start()
    repeat_refused(collection, model)
    assert_writes_again(collection, model)


def test_a_write_waits_for_a_redis_that_comes_back_in_time(
    server: RedisServer, store: Store
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    server.stop()
    wait_until(lambda: not collection.info().writable, "the state shows it")
    server.start()
    assert_writes_again(collection, model)


def test_a_store_opens_without_redis_and_connects_later(
    server: RedisServer, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        model = fill(store.create(SPEC))
    server.stop()
    with Store.open(config) as store:
        collection = store.get("c")
        assert contents(collection.snapshot()) == model.items
        info = collection.info()
        assert (info.version, info.n_items, info.checkpoint_version) == (100, 100, 100)
        assert type(refused(collection)) is UnavailableError
        server.start()
        assert_writes_again(collection, model)
        wait_until(lambda: collection.info().durability == "always", "the level is known")


def test_an_emptied_redis_stops_writing_and_wipes_nothing(
    server: RedisServer, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection)
        with server.client() as client:
            client.flushall()
        wait_until(lambda: not collection.info().writable, "the state shows it")
        error = refused(collection, DEADLINE_S)
        assert type(error) is PreconditionError
        assert "index again" in error.message
        assert contents(collection.snapshot()) == model.items
        with pytest.raises(PreconditionError, match="does not have it"):
            store.create(SPEC)
    with Store.open(config) as store:
        collection = store.get("c")
        assert contents(collection.snapshot()) == model.items
        assert type(refused(collection, DEADLINE_S)) is PreconditionError
        # What a person decides: to begin anew.
        store.drop("c")
        assert fill(store.create(SPEC), 7).version == 7
        assert store.get("c").info().writable


def test_a_collection_of_the_same_name_is_not_mixed_in(
    server: RedisServer, config: StoreConfig, tmp_path: Path
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection)
        with server.client() as client:
            client.flushall()
        # Somebody else indexes again, further than this replica ever was.
        other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=server.url)
        with Store.open(other_config) as other:
            fill(other.create(SPEC), 300, prefix="other")
        wait_until(lambda: "another one" in collection.info().detail, "the state shows it")
        assert contents(collection.snapshot()) == model.items
        assert type(refused(collection, DEADLINE_S)) is PreconditionError
        with pytest.raises(PreconditionError, match="another one of that name"):
            store.create(SPEC)
    with Store.open(config) as store:
        assert contents(store.get("c").snapshot()) == model.items


def test_a_redis_that_went_back_is_noticed(
    server: RedisServer, config: StoreConfig, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    with Store.open(config) as store:
        collection = store.create(SPEC)
        fill(collection, 50)
        server.stop()
        shutil.copytree(server.directory / "appendonlydir", saved)
        server.start()
        wait_until(lambda: collection.info().writable, "the log is followed")
        fill(collection, 50, prefix="lost")
        server.stop()
        shutil.rmtree(server.directory / "appendonlydir")
        shutil.copytree(saved, server.directory / "appendonlydir")
        server.start()
        wait_until(lambda: "went back" in collection.info().detail, "the state shows it")
        before = contents(collection.snapshot())
        assert len(before) == 100
        assert type(refused(collection, DEADLINE_S)) is PreconditionError
        # Redis goes on as if nothing had been; what it has now is not what is here.
        with server.client() as client:
            assert client.hget("hl:{c}:meta", "seq") == b"50"
        other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=server.url)
        with Store.open(other_config) as other:
            found = other.get("c", deadline_s=DEADLINE_S)
            found.wait_for(50, DEADLINE_S)
            fill(found, 60, prefix="new")
        wait_until(lambda: "another write" in collection.info().detail, "the state shows it")
        assert contents(collection.snapshot()) == before


def test_a_restart_heals_what_was_not_checkpointed_when_redis_went_back(
    server: RedisServer, config: StoreConfig, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection, 50)
        collection.checkpoint()
        server.stop()
        shutil.copytree(server.directory / "appendonlydir", saved)
        server.start()
        wait_until(lambda: collection.info().writable, "the log is followed")
        fill(collection, 50, prefix="lost")
        server.stop()
        shutil.rmtree(server.directory / "appendonlydir")
        shutil.copytree(saved, server.directory / "appendonlydir")
        server.start()
        wait_until(lambda: "went back" in collection.info().detail, "the state shows it")
    with Store.open(config) as store:
        collection = store.get("c")
        assert contents(collection.snapshot()) == model.items
        assert_writes_again(collection, model)


def test_a_log_that_was_trimmed_too_far_is_made_up_for_from_redis(
    server: RedisServer, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        fill(store.create(SPEC), 100)
        with server.client() as client:
            wait_until(
                lambda: store.get("c").checkpoint() == 100 and client.xlen("hl:{c}:log") == 1,
                "the log is trimmed",
            )
    shutil.rmtree(config.data_dir)
    with Store.open(config) as store:
        wait_until(lambda: store.get("c").info().writable, "the collection is back")
        info = store.get("c").info()
        # Redis has everything but the features, of which the log has the last, and nobody else is
        # there.
        assert (info.version, info.n_items, info.n_missing_features) == (100, 100, 99)
        store.drop("c")
        assert fill(store.create(SPEC), 3).version == 3


def test_a_damaged_log_is_no_wrong_answer(server: RedisServer, store: Store) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    with server.client() as client:
        client.xadd("hl:{c}:log", {"r": b"nonsense"}, id="101-1")
        client.hset("hl:{c}:meta", "seq", 101)
    wait_until(lambda: "Log entry 101" in collection.info().detail, "the state shows it")
    ends_s = time.monotonic() + 1.5
    while time.monotonic() < ends_s:  # And goes on to, however often it is tried again.
        info = collection.info()
        assert not info.writable
        assert "Log entry 101" in info.detail
    assert contents(collection.snapshot()) == model.items


def test_a_defect_is_no_reason_to_take_writes_or_to_hurry(
    server: RedisServer, config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[float] = []

    def broken(self: LocalCollection, records: object) -> None:
        attempts.append(time.monotonic())
        raise RuntimeError("a defect")

    with Store.open(config) as store:
        collection = store.create(SPEC)
        assert fill(collection, 10).version == 10
        with monkeypatch.context() as patched:
            patched.setattr(LocalCollection, "apply", broken)
            late = make_records(SPEC, 1, seed=3, prefix="late")
            collection.upsert(late, request_id="late", deadline_s=DEADLINE_S)
            wait_until(lambda: len(attempts) > 0, "it was tried")
            wait_until(lambda: not collection.info().writable, "the state shows it")
            n_before, ends_s = len(attempts), time.monotonic() + 2.0
            while time.monotonic() < ends_s:
                assert not collection.info().writable
            assert len(attempts) - n_before < 10
        wait_until(lambda: collection.info().writable, "it goes on")
        assert collection.snapshot().version == 11


def test_a_hole_in_the_log_is_no_wrong_answer(
    server: RedisServer, config: StoreConfig, tmp_path: Path
) -> None:
    other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=server.url)
    with Store.open(other_config) as other:
        with Store.open(config) as store:
            collection = store.create(SPEC)
            # The other is there from the beginning, so it does not miss what is trimmed.
            assert other.get("c", deadline_s=DEADLINE_S).wait_for(0, 0).version == 0
            wait_until(lambda: other.get("c").info().writable, "the other follows")
            model = fill(collection)
        fill(other.get("c"), 30, prefix="more")
    with server.client() as client:
        assert client.xdel("hl:{c}:log", "110-1") == 1
    with Store.open(config) as store:
        collection = store.get("c")
        wait_until(lambda: "hole" in collection.info().detail, "the state shows it")
        assert contents(collection.snapshot()) == model.items


def test_a_full_redis_refuses_and_recovers(server: RedisServer, store: Store) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    with server.client() as client:
        client.config_set("maxmemory", "1")
        assert type(refused(collection, DEADLINE_S)) is LimitError
        client.config_set("maxmemory", "0")
    assert_writes_again(collection, model)


def test_forgotten_scripts_are_loaded_again(server: RedisServer, store: Store) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    with server.client() as client:
        client.script_flush()
    assert_writes_again(collection, model)


def test_unknown_names_are_not_found(server: RedisServer, store: Store) -> None:
    for name in ("unknown", "Not a name!", "../c", ""):
        assert store.find(name) is None
        for call in (store.get, store.drop):
            with pytest.raises(NotFoundError):
                call(name)
