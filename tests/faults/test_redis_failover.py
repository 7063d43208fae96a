"""A replica of Redis takes over: with all, without the last writes, with others in their place.

Redis replicates after it acknowledges, so a takeover may lose writes. That is never silent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hashlens.errors import PreconditionError, UnavailableError
from search_service.storage import Collection, Store, StoreConfig
from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    contents,
    make_records,
    wait_until,
)
from tests.support.trouble import SPEC, assert_recovers, assert_writes_again, fill, refused


@pytest.fixture
def front(server: RedisServer) -> Iterator[Proxy]:
    """Where the store looks for Redis."""
    with Proxy(server.socket) as running:
        yield running


@pytest.fixture
def config(front: Proxy, tmp_path: Path) -> StoreConfig:
    return StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=front.url,
        redis_timeout_s=0.5,
        discovery_interval_s=0.1,
        # What is in a checkpoint is for the tests to say.
        checkpoint_interval_s=3600.0,
    )


@pytest.fixture
def link(server: RedisServer) -> Iterator[Proxy]:
    """Through which the replica hears from the primary."""
    with Proxy(server.socket) as running:
        yield running


@pytest.fixture
def replica(server: RedisServer, link: Proxy) -> Iterator[RedisServer]:
    """A replica of the server, with a durability of its own so that the two can be told apart."""
    with server.client() as client:
        client.config_set("repl-diskless-sync-delay", "0")
    with RedisServer(server.binary, appendfsync="everysec") as running:
        follow(running, link)
        yield running


def follow(replica: RedisServer, link: Proxy) -> None:
    with replica.client() as client:
        client.replicaof("127.0.0.1", str(link.port))
        wait_until(
            lambda: client.info("replication")["master_link_status"] == "up", "the replica follows"
        )


def promote(replica: RedisServer) -> None:
    with replica.client() as client:
        client.replicaof("NO", "ONE")


def wait_level(server: RedisServer, replica: RedisServer) -> None:
    """Wait until the replica has all that the server has."""
    with server.client() as one, replica.client() as other:
        wait_until(
            lambda: (
                one.info("replication")["master_repl_offset"]
                == other.info("replication")["slave_repl_offset"]
            ),
            "the replica has everything",
        )


def sever(link: Proxy) -> None:
    """From here on the replica misses what is written."""
    link.lead_to(None)
    link.cut()


def take_over(server: RedisServer, replica: RedisServer, front: Proxy) -> None:
    """The primary dies, the replica is made one, and the store's URL leads to it."""
    server.kill()
    promote(replica)
    front.lead_to(replica.socket)


def seq_in(server: RedisServer) -> int:
    with server.client() as client:
        return int(client.hget("hl:{c}:meta", "seq"))


def assert_stopped(collection: Collection, model: Model, server: RedisServer, says: str) -> None:
    """Reading goes on with what is here, nothing more is written, and the state says why."""
    seq = seq_in(server)
    assert type(refused(collection, DEADLINE_S)) is PreconditionError
    wait_until(lambda: says in collection.info().detail, f"the state says {says}")
    assert not collection.info().writable
    assert type(refused(collection, DEADLINE_S)) is PreconditionError
    collection.checkpoint()
    assert contents(collection.snapshot()) == model.items
    assert seq_in(server) == seq


def test_a_takeover_that_loses_nothing_goes_on(
    server: RedisServer, replica: RedisServer, front: Proxy, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection)
        wait_until(lambda: collection.info().durability == "always", "the level is known")
        wait_level(server, replica)
        server.kill()
        front.lead_to(replica.socket)
        # Not promoted yet: it is read-only.
        assert type(refused(collection)) is UnavailableError
        assert contents(collection.snapshot()) == model.items
        wait_until(lambda: "READONLY" in collection.info().detail, "the state shows it")
        promote(replica)
        assert_recovers(collection, model, replica)
        wait_until(lambda: collection.info().durability == "everysec", "the new level is reported")


def test_a_demoted_primary_is_left_though_it_keeps_its_connections(
    server: RedisServer, replica: RedisServer, front: Proxy, config: StoreConfig
) -> None:
    with Store.open(config) as store, Proxy(replica.socket) as back:
        collection = store.create(SPEC)
        model = fill(collection)
        wait_level(server, replica)
        front.lead_to(replica.socket)
        promote(replica)
        follow(server, back)
        # Within the deadline of the first write.
        records = make_records(SPEC, 3, seed=5, prefix="first")
        assert collection.upsert(records, request_id="f", deadline_s=DEADLINE_S) == 103
        model.upsert(records)
        assert seq_in(replica) == 103
        assert_writes_again(collection, model)
        with replica.client() as client:
            assert_in_redis(client, "c", model)


def test_a_primary_that_was_left_behind_is_not_followed_for_ever(
    server: RedisServer, replica: RedisServer, front: Proxy, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection)
        wait_level(server, replica)
        promote(replica)
        front.lead_to(replica.socket)
        # Nobody told the old primary, and the one that follows its log keeps its connection.
        with server.client() as client:
            wait_until(
                lambda: any("xread" in each["cmd"] for each in client.client_list()), "it is read"
            )
            for each in client.client_list():
                if "xread" not in each["cmd"] and int(each["id"]) != client.client_id():
                    client.client_kill_filter(_id=each["id"])
        records = make_records(SPEC, 3, seed=5, prefix="first")
        assert collection.upsert(records, request_id="f", deadline_s=DEADLINE_S) == 103
        model.upsert(records)
        assert (seq_in(server), seq_in(replica)) == (100, 103)
        assert_writes_again(collection, model)
        with replica.client() as client:
            assert_in_redis(client, "c", model)


def test_writing_goes_on_through_a_planned_takeover(
    server: RedisServer, replica: RedisServer, front: Proxy, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = Model()
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                records = make_records(SPEC, 20, seed=number, prefix=f"{number % 7}-")
                while True:
                    try:
                        version = collection.upsert(
                            records, request_id=f"r{number}", deadline_s=DEADLINE_S
                        )
                        break
                    except UnavailableError:
                        assert not stop.is_set()
                model.upsert(records)
                assert version == model.version
                number += 1

        writing = threading.Thread(target=write)
        writing.start()
        wait_until(lambda: model.version > 200, "it writes")
        with server.client() as client:
            client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
        wait_level(server, replica)
        take_over(server, replica, front)
        written = model.version
        wait_until(lambda: model.version > written + 200, "it writes on")
        stop.set()
        writing.join(DEADLINE_S * 2)
        assert not writing.is_alive()
        assert_holds(collection, model)
        with replica.client() as client:
            assert_in_redis(client, "c", model)


def test_a_takeover_that_loses_writes_stops_writing(
    server: RedisServer, replica: RedisServer, link: Proxy, front: Proxy, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        fill(collection, 50)
        wait_level(server, replica)
        sever(link)
        fill(collection, 50, prefix="lost")
        model = Model(contents(collection.snapshot()), 100)
        take_over(server, replica, front)
        assert_stopped(collection, model, replica, "went back from version 100 to 50")
        # The right server is brought back: all is well.
        server.start()
        front.lead_to(server.socket)
        front.cut()
        assert_recovers(collection, model, server)


def test_an_acknowledged_write_that_is_lost_before_it_came_here_is_missed(
    server: RedisServer, replica: RedisServer, link: Proxy, front: Proxy, config: StoreConfig
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection, 50)
        wait_level(server, replica)
        sever(link)
        front.harm(b"XREAD", 0, "stall", always=True)
        # The log is read once more at most; from then on, what is acknowledged does not come.
        assert front.harmed.wait(DEADLINE_S)
        records = make_records(SPEC, 10, seed=3, prefix="lost")
        assert collection.upsert(records, request_id="lost", deadline_s=DEADLINE_S) == 60
        assert collection.snapshot().version == 50
        take_over(server, replica, front)
        front.relent()
        assert_stopped(collection, model, replica, "went back from version 60 to 50")
    # A person restarts the service, which accepts the loss.
    with Store.open(config) as store:
        assert_recovers(store.get("c"), model, replica)


@pytest.mark.parametrize(("n_others", "is_safe"), [(50, True), (70, False)])
def test_other_writes_in_the_place_of_lost_ones_are_not_mixed_in(
    server: RedisServer,
    replica: RedisServer,
    link: Proxy,
    front: Proxy,
    config: StoreConfig,
    tmp_path: Path,
    n_others: int,
    is_safe: bool,
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        fill(collection, 50)
        wait_level(server, replica)
        sever(link)
        fill(collection, 50, prefix="lost")
        model = Model(contents(collection.snapshot()), 100)
        if is_safe:
            collection.checkpoint()
        sever(front)
        server.kill()
        promote(replica)
        # While this store is cut off, another one writes to the new primary.
        other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=replica.url)
        with Store.open(other_config) as other:
            found = other.get("c", deadline_s=DEADLINE_S)
            found.wait_for(50, DEADLINE_S)
            their_model = fill(found, n_others, prefix="new")
            their_model = Model(contents(found.snapshot()), their_model.version)
            front.lead_to(replica.socket)
            wait_until(lambda: "another write" in collection.info().detail, "the state shows it")
            assert_stopped(collection, model, replica, "another write as version 100")
            assert_writes_again(found, their_model)
    with Store.open(config) as store:
        if is_safe:
            assert_stopped(store.get("c"), model, replica, "another write as version 100")
        else:
            # The lost writes were not in a checkpoint, so a restart takes what Redis has.
            assert_holds(store.get("c"), their_model)


def test_data_that_are_replaced_under_a_connection_are_not_mixed_in(
    server: RedisServer,
    replica: RedisServer,
    link: Proxy,
    config: StoreConfig,
    tmp_path: Path,
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        fill(collection, 50)
        wait_level(server, replica)
        sever(link)
        fill(collection, 50, prefix="lost")
        model = Model(contents(collection.snapshot()), 100)
        promote(replica)
        other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=replica.url)
        with Store.open(other_config) as other:
            other.get("c", deadline_s=DEADLINE_S).wait_for(50, DEADLINE_S)
            fill(other.get("c"), 70, prefix="new")
        with replica.client() as client:
            theirs = client.xrange("hl:{c}:log")
        # As a primary that becomes a replica of the new one does, in one step.
        with server.client() as client, client.pipeline() as pipeline:
            pipeline.delete("hl:{c}:log")
            for entry_id, fields in theirs:
                pipeline.xadd("hl:{c}:log", fields, id=entry_id)
            pipeline.hset("hl:{c}:meta", "seq", 120)
            pipeline.execute()
        wait_until(lambda: "another write" in collection.info().detail, "the state shows it")
        assert contents(collection.snapshot()) == model.items
        assert type(refused(collection, DEADLINE_S)) is PreconditionError


def test_a_demoted_primary_that_took_over_other_data_is_not_mixed_in(
    server: RedisServer,
    replica: RedisServer,
    link: Proxy,
    config: StoreConfig,
    tmp_path: Path,
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        fill(collection, 50)
        wait_level(server, replica)
        sever(link)
        fill(collection, 50, prefix="lost")
        model = Model(contents(collection.snapshot()), 100)
        promote(replica)
        with replica.client() as client:
            client.config_set("repl-diskless-sync-delay", "0")
        other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=replica.url)
        with Store.open(other_config) as other, Proxy(replica.socket) as back:
            found = other.get("c", deadline_s=DEADLINE_S)
            found.wait_for(50, DEADLINE_S)
            follow(server, back)
            # This store's URL still leads to the old one, which gets the others' writes now.
            fill(found, 70, prefix="new")
            wait_level(replica, server)
            assert type(refused(collection)) is UnavailableError
            wait_until(lambda: "READONLY" in collection.info().detail, "the state shows it")
            assert contents(collection.snapshot()) == model.items
            promote(server)
            wait_until(lambda: "another write" in collection.info().detail, "the state shows it")
        assert_stopped(collection, model, server, "another write as version 100")


def test_files_that_the_log_does_not_show_to_be_its_own_are_replaced(
    server: RedisServer, front: Proxy, config: StoreConfig, tmp_path: Path
) -> None:
    with Store.open(config) as store:
        collection = store.create(SPEC)
        model = fill(collection, 100)
        sever(front)
        other_config = StoreConfig(data_dir=tmp_path / "other", redis_url=server.url)
        with Store.open(other_config) as other:
            found = other.get("c", deadline_s=DEADLINE_S)
            found.wait_for(100, DEADLINE_S)
            new = fill(found, 20, prefix="new")
        with server.client() as client:
            client.xtrim("hl:{c}:log", minid="101-1", approximate=False)
        front.lead_to(server.socket)
        wait_until(lambda: store.get("c").info().version == new.version, "files are made anew")
        assert contents(store.get("c").snapshot()) == model.items | new.items
