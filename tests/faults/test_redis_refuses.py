"""Redis is there and will not: loading, read-only, lonely, full, busy, restarted with other data.

Reading goes on with the same content; writes get the right error in time; nothing is written twice.
"""

from __future__ import annotations

import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from hashlens.errors import HashlensError, LimitError, PreconditionError, UnavailableError
from hashlens.types import CollectionSpec
from search_service.storage import Collection, Store, StoreConfig
from tests.support.redis_server import RedisServer
from tests.support.stores import DEADLINE_S, Model, assert_holds, contents, wait_until
from tests.support.trouble import SPEC, assert_recovers, fill, refused


@pytest.fixture
def config(server: RedisServer, tmp_path: Path) -> StoreConfig:
    return StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=server.url,
        redis_timeout_s=0.5,
        discovery_interval_s=0.1,
    )


@pytest.fixture
def store(config: StoreConfig) -> Iterator[Store]:
    with Store.open(config) as store:
        yield store


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


def assert_refuses(
    collection: Collection, model: Model, kind: type[HashlensError], says: str
) -> None:
    """Writes are refused, the state says why, and reading goes on."""
    # Away it stays for as long as it is waited for; any other refusal comes as soon as it is known.
    error = refused(collection, 0.3 if kind is UnavailableError else DEADLINE_S)
    assert type(error) is kind
    assert error.retriable == (kind is UnavailableError)
    wait_until(lambda: says in collection.info().detail, f"the state says {says}")
    info = collection.info()
    assert not info.writable
    assert (info.version, info.n_items) == (model.version, len(model.items))
    assert contents(collection.snapshot()) == model.items


def test_a_redis_that_reads_its_data_is_waited_for(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    with client.pipeline(transaction=False) as pipeline:
        for number in range(40_000):
            pipeline.set("filler", number)
        pipeline.execute()
    server.stop()
    # Ten seconds or more; it takes the time to answer after each 1024 commands of its file.
    server.settings["key-load-delay"] = "200"
    server.launch()
    wait_until(lambda: "is loading" in collection.info().detail, "the state shows it")
    assert_refuses(collection, model, UnavailableError, "is loading")
    client.config_set("key-load-delay", "0")
    # A write whose deadline is long enough waits.
    assert_recovers(collection, model, server)
    wait_until(lambda: collection.info().durability == "always", "the level is known again")


def test_a_read_only_redis_is_no_place_to_write(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    client.replicaof("127.0.0.1", "1")
    assert_refuses(collection, model, UnavailableError, "READONLY")
    assert collection.info().durability == "unknown"
    client.replicaof("NO", "ONE")
    assert_recovers(collection, model, server)


def test_a_redis_without_its_replicas_refuses(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    client.config_set("min-replicas-to-write", "1")
    assert_refuses(collection, model, UnavailableError, "NOREPLICAS")
    client.config_set("min-replicas-to-write", "0")
    assert_recovers(collection, model, server)


def test_a_redis_that_takes_no_writes_for_now_is_waited_for(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    # What a planned failover does to its clients.
    client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
    assert_refuses(collection, model, UnavailableError, "Redis is away")
    client.execute_command("CLIENT", "UNPAUSE")
    assert_recovers(collection, model, server)


def test_a_redis_busy_with_a_script_is_waited_for(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    client.config_set("busy-reply-threshold", "10")

    def hang() -> None:
        with server.client() as other, pytest.raises(redis.ResponseError, match="killed"):
            other.eval("while true do end", 0)

    hanging = threading.Thread(target=hang)
    hanging.start()

    def is_busy() -> bool:
        try:
            return not client.ping()
        except redis.ResponseError as error:
            return "BUSY" in str(error)

    wait_until(is_busy, "it is busy")
    assert_refuses(collection, model, UnavailableError, "BUSY")
    client.script_kill()
    hanging.join(DEADLINE_S)
    assert not hanging.is_alive()
    assert_recovers(collection, model, server)


def test_a_redis_that_cannot_save_is_a_limit(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    client.config_set("save", "3600 1")
    (server.directory / "dump.rdb").mkdir()
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "it fails")
    assert_refuses(collection, model, LimitError, "cannot write to its disk")
    (server.directory / "dump.rdb").rmdir()
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok", "it saves")
    assert_recovers(collection, model, server)


def test_a_redis_without_memory_is_a_limit_and_can_be_given_room(
    server: RedisServer, store: Store, client: redis.Redis
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    store.create(CollectionSpec("other", "m", 8, 0))
    client.config_set("maxmemory", "1")
    assert_refuses(collection, model, LimitError, "out of memory")
    # What gives memory back works: the log is trimmed at a checkpoint, collections are dropped.
    assert client.xlen("hl:{c}:log") == 100
    wait_until(
        lambda: collection.checkpoint() == 100 and client.xlen("hl:{c}:log") == 1, "it is trimmed"
    )
    store.drop("other")
    assert client.keys("hl:{other}:*") == []
    # Nor is a lost connection the end of following.
    client.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: "out of memory" in collection.info().detail, "the state shows it again")
    client.config_set("maxmemory", "0")
    assert_recovers(collection, model, server)


def test_a_redis_whose_disk_is_full_ends_and_forgets_nothing(
    server: RedisServer, store: Store
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    appended = sum(path.stat().st_size for path in server.directory.glob("appendonlydir/*.incr.*"))
    # The next write fits in part: Redis cannot keep its promise, so it ends.
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (appended + 50, appended + 50))
    assert_refuses(collection, model, UnavailableError, "Redis is away")
    assert server.process.wait(DEADLINE_S) in (1, -signal.SIGXFSZ)
    server.start()
    assert_recovers(collection, model, server)


def assert_an_operator_decides(store: Store, collection: Collection, model: Model) -> None:
    """Nothing is wiped, nothing written, a restart included; to begin anew is a person's word."""
    assert type(refused(collection, DEADLINE_S)) is PreconditionError
    with pytest.raises(PreconditionError):
        store.create(SPEC)
    assert contents(collection.snapshot()) == model.items
    assert collection.checkpoint() == model.version


def test_a_redis_that_restarts_empty_stops_writes(server: RedisServer, config: StoreConfig) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection)
        server.kill()
        shutil.rmtree(server.directory / "appendonlydir")
        server.start()
        assert_refuses(collection, model, PreconditionError, "does not have it")
        assert_an_operator_decides(store, collection, model)
    with Store.open(config) as store:
        collection = store.get("c")
        assert_refuses(collection, model, PreconditionError, "does not have it")
        assert_an_operator_decides(store, collection, model)
        with server.client() as client:
            assert client.keys("hl:{c}*") == []
        store.drop("c")
        assert_holds(store.create(SPEC), Model())
        assert fill(store.create(SPEC), 7).version == 7
        assert store.get("c").info().writable


def test_a_lost_redis_that_is_brought_back_goes_on(
    server: RedisServer, store: Store, tmp_path: Path
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    server.stop()
    (server.directory / "appendonlydir").rename(tmp_path / "kept")
    server.start()
    assert_refuses(collection, model, PreconditionError, "does not have it")
    server.stop()
    shutil.rmtree(server.directory / "appendonlydir")
    (tmp_path / "kept").rename(server.directory / "appendonlydir")
    server.start()
    assert_recovers(collection, model, server)


@pytest.mark.parametrize("n_others", [0, 200])
def test_a_redis_that_restarts_with_another_epoch_stops_writes(
    server: RedisServer, config: StoreConfig, tmp_path: Path, n_others: int
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection)
        server.kill()
        with RedisServer(server.binary) as wrong:
            other = StoreConfig(data_dir=tmp_path / "other", redis_url=wrong.url)
            with Store.open(other) as elsewhere:
                theirs = elsewhere.create(SPEC)
                their_model = fill(theirs, n_others, prefix="other") if n_others else Model()
            wrong.stop()
            shutil.rmtree(server.directory / "appendonlydir")
            shutil.move(wrong.directory / "appendonlydir", server.directory / "appendonlydir")
        server.start()
        assert_refuses(collection, model, PreconditionError, "another one")
        assert_an_operator_decides(store, collection, model)
        # The operator takes what Redis has. Its log reaches back, so all of it comes.
        store.drop("c")
        assert_holds(store.create(SPEC), Model())
    assert their_model.version == n_others
