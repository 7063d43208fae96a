"""The connection to Redis breaks at any byte: each write is made once, each record applied once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hashlens.errors import UnavailableError
from hashlens.types import CollectionSpec
from search_service.storage import Collection, Store, StoreConfig
from tests.support.proxy import How, Proxy
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
from tests.support.trouble import SPEC, assert_recovers, fill, refused

WRITE = b":req:"
"""What only a write's request contains."""


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with Proxy(server.socket) as running:
        yield running


@pytest.fixture
def store(proxy: Proxy, tmp_path: Path) -> Iterator[Store]:
    config = StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=proxy.url,
        redis_timeout_s=0.5,
        discovery_interval_s=0.1,
    )
    with Store.open(config) as store:
        yield store


def assert_is(collection: Collection, model: Model, server: RedisServer) -> None:
    """The files and Redis hold the model."""
    assert_holds(collection, model)
    with server.client() as client:
        assert_in_redis(client, collection.spec.name, model)


def test_a_reply_cut_at_any_byte_has_the_write_done_once(
    server: RedisServer, proxy: Proxy, store: Store
) -> None:
    collection = store.create(SPEC)
    model = fill(collection, 20)
    n_cut = 0
    while True:
        proxy.harm(WRITE, n_cut, "close")
        records = make_records(SPEC, 3, seed=n_cut, prefix=f"{n_cut % 5}-")
        version = collection.upsert(records, request_id=f"u{n_cut}", deadline_s=DEADLINE_S)
        model.upsert(records)
        assert version == model.version
        if not proxy.harmed.is_set():
            break
        proxy.harm(WRITE, n_cut, "reset")
        ids = [records[0].id, "nobody"]
        gone = collection.delete(ids, request_id=f"d{n_cut}", deadline_s=DEADLINE_S)
        assert (gone.n_deleted, gone.version) == (model.delete(ids), model.version)
        n_cut += 1
    proxy.relent()
    # Up to there, every byte of a reply such as "*3 $2 ok $3 123 :3" was the last that came.
    assert n_cut > 25
    assert_is(collection, model, server)


@pytest.mark.parametrize("how", ["lose", "close", "stall"])
def test_a_write_that_seemed_to_fail_is_made_once_when_repeated(
    server: RedisServer, proxy: Proxy, store: Store, how: How
) -> None:
    collection = store.create(SPEC)
    model = fill(collection, 20)
    records = make_records(SPEC, 3, seed=1)
    proxy.harm(WRITE, 0, how, always=True)
    with pytest.raises(UnavailableError):
        collection.upsert(records, request_id="once", deadline_s=0.8)
    assert proxy.harmed.wait(DEADLINE_S)
    proxy.relent()
    with server.client() as client:
        is_made = int(client.hget("hl:{c}:meta", "seq")) == 23
    assert is_made == (how != "lose")
    model.upsert(records)
    for _ in range(2):
        version = collection.upsert(records, request_id="once", deadline_s=DEADLINE_S)
        assert version == model.version
    assert_is(collection, model, server)


def test_a_reply_that_stalls_at_any_byte_costs_an_attempt_and_no_more(
    server: RedisServer, proxy: Proxy, store: Store
) -> None:
    collection = store.create(SPEC)
    model = fill(collection, 20)
    for n_passed in (1, 15):
        proxy.harm(WRITE, n_passed, "stall")
        records = make_records(SPEC, 3, seed=n_passed)
        version = collection.upsert(records, request_id=f"s{n_passed}", deadline_s=DEADLINE_S)
        assert proxy.harmed.is_set()
        model.upsert(records)
        assert version == model.version
    assert_is(collection, model, server)


def test_the_log_cut_at_any_byte_is_applied_once(
    server: RedisServer, proxy: Proxy, store: Store
) -> None:
    collection = store.create(SPEC)
    model = fill(collection, 20)
    # About the length of a reply with two records; a prime step meets every part of it.
    for n_cut in range(0, 400, 23):
        proxy.harm(b"XREAD", n_cut, "close" if n_cut % 2 else "reset")
        records = make_records(SPEC, 2, seed=n_cut, prefix=f"{n_cut % 7}-")
        collection.upsert(records, request_id=f"x{n_cut}", deadline_s=DEADLINE_S)
        model.upsert(records)
        assert_holds(collection, model)
        assert proxy.harmed.wait(DEADLINE_S)
    assert_is(collection, model, server)
    wait_until(lambda: collection.info().writable, "the log is followed")


def test_a_log_that_stalls_is_read_anew(server: RedisServer, proxy: Proxy, store: Store) -> None:
    collection = store.create(SPEC)
    model = fill(collection, 20)
    proxy.harm(b"XREAD", 100, "stall")
    records = make_records(SPEC, 2)
    collection.upsert(records, request_id="x", deadline_s=DEADLINE_S)
    model.upsert(records)
    assert_is(collection, model, server)
    assert proxy.harmed.is_set()


def test_collections_come_and_go_once_through_cut_replies(
    server: RedisServer, proxy: Proxy, store: Store
) -> None:
    spec = CollectionSpec("d", "m", 8, 0)
    for n_cut in (0, 3, 40):
        proxy.harm(b"hl:{d}:meta", n_cut, "close")
        # The store's own look for collections may be what is harmed, a moment later.
        collection = store.create(spec)
        assert proxy.harmed.wait(DEADLINE_S)
        fill(collection, 5)
        with server.client() as client:
            assert client.hget("hl:{d}:meta", "epoch").decode() == collection.epoch
        proxy.harm(b"hl:{d}:meta", min(n_cut, 8), "close")
        store.drop("d")
        assert proxy.harmed.wait(DEADLINE_S)
        with server.client() as client:
            assert [key for key in client.keys("hl:{d}:*") if b":req:" not in key] == []
            assert client.hexists("hl:dropped", collection.epoch)


def test_a_network_that_is_gone_is_waited_for(
    server: RedisServer, proxy: Proxy, store: Store
) -> None:
    collection = store.create(SPEC)
    model = fill(collection)
    proxy.lead_to(None)
    proxy.cut()
    assert type(refused(collection)) is UnavailableError
    wait_until(lambda: "Redis is away" in collection.info().detail, "the state shows it")
    assert contents(collection.snapshot()) == model.items
    proxy.lead_to(server.socket)
    assert_recovers(collection, model, server)
