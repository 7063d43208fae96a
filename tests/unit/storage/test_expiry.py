"""Items that remove themselves: by the log, once, by the server's clock, whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from hashlens.errors import PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Collection, Record, Store, StoreConfig, layout
from search_service.storage.catalog import Catalog
from search_service.storage.chunks import Raw
from search_service.storage.due import DueRows
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import (
    DEADLINE_S,
    FAR_MS,
    Model,
    assert_holds,
    assert_in_redis,
    make_records,
    wait_until,
)

NEVER_S = 3600.0
"""An interval at which a store does not look by itself within a test."""


def now_ms() -> int:
    return int(time.time() * 1000)


def config_of(server: RedisServer, data_dir: Path, *, interval_s: float = 0.05) -> StoreConfig:
    return StoreConfig(
        data_dir=data_dir,
        redis_url=server.url,
        discovery_interval_s=0.1,
        expire_interval_s=interval_s,
    )


def spec_of(name: str) -> CollectionSpec:
    return CollectionSpec(name, "m", 12, 2, FeatureDtype.F16, 1000)


def lasting(spec: CollectionSpec, n: int, expires_ms: int, prefix: str = "i") -> list[Record]:
    records = make_records(spec, n, prefix=prefix)
    return [replace(record, expires_ms=expires_ms) for record in records]


def write(collection: Collection, model: Model, records: list[Record]) -> None:
    collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
    model.upsert(records)
    collection.wait_for(model.version, DEADLINE_S)


def expire(collection: Collection) -> int:
    return collection.expire(lambda: False)


def test_what_has_expired_goes_and_the_rest_stays(
    server: RedisServer, client: redis.Redis, data_dir: Path, new_name: Callable[[], str]
) -> None:
    spec, model = spec_of(new_name()), Model()
    with Store.open(config_of(server, data_dir)) as store:
        collection = store.create(spec)
        past = lasting(spec, 600, now_ms() - 1, "past")  # more than one script call takes
        soon = lasting(spec, 5, now_ms() + 200, "soon")
        write(collection, model, lasting(spec, 5, 0, "stays"))
        write(collection, model, lasting(spec, 5, FAR_MS, "far"))
        collection.upsert(past, request_id="", deadline_s=DEADLINE_S)
        collection.upsert(soon, request_id="", deadline_s=DEADLINE_S)
        model.version += 605
        model.version += 605  # and as many deletes
        assert_holds(collection, model)
        assert_in_redis(client, spec.name, model)
    with Store.open(config_of(server, data_dir)) as store:
        assert_holds(store.get(spec.name), model)


def test_an_update_prolongs_shortens_and_revokes(
    server: RedisServer, data_dir: Path, new_name: Callable[[], str]
) -> None:
    spec, model = spec_of(new_name()), Model()
    with Store.open(config_of(server, data_dir, interval_s=NEVER_S)) as store:
        collection = store.create(spec)
        a, b, c, d = make_records(spec, 4)
        past = now_ms() - 1
        write(collection, model, [replace(a, expires_ms=past), replace(b, expires_ms=past)])
        write(collection, model, [replace(c, expires_ms=FAR_MS), replace(d, expires_ms=past)])
        write(collection, model, [replace(a, expires_ms=FAR_MS), replace(b, expires_ms=0)])
        write(collection, model, [replace(c, expires_ms=past)])
        assert expire(collection) == 2
        model.delete([c.id, d.id])
        assert_holds(collection, model)
        assert expire(collection) == 0


def test_redis_decides_whether_it_is_still_that_write_and_still_that_time(
    server: RedisServer, client: redis.Redis, data_dir: Path, new_name: Callable[[], str]
) -> None:
    """A replica that is behind, or whose clock is ahead, does no harm."""
    spec, model = spec_of(new_name()), Model()
    catalog = Catalog(server.url, 5.0)
    with Store.open(config_of(server, data_dir, interval_s=NEVER_S)) as store:
        collection = store.create(spec)
        past, far = now_ms() - 1, now_ms() + 3_600_000
        a, b, c, d = lasting(spec, 4, past)
        write(collection, model, [a, replace(b, expires_ms=far), replace(c, expires_ms=0), d])
        write(collection, model, [replace(a, expires_ms=past)])
        meta = catalog.meta(spec.name, DEADLINE_S)

        def asked(item: Record, seq: int) -> int:
            item_id = item.id.encode()
            raw = Raw(item_id, layout.pack_expire(item_id, seq))
            return catalog.expire(meta, [raw], DEADLINE_S).n_items

        assert asked(a, 1) == 0  # written again since
        assert asked(b, 2) == 0  # not yet
        assert asked(c, 3) == 0  # never
        assert asked(replace(a, id="nobody"), 1) == 0
        assert_in_redis(client, spec.name, model)
        assert asked(d, 4) == 1
        assert asked(d, 4) == 0  # once
        model.delete([d.id])
        assert_holds(collection, model)
        assert_in_redis(client, spec.name, model)
        raw = Raw(a.id.encode(), layout.pack_expire(a.id.encode(), 5))
        with pytest.raises(PreconditionError, match="went back"):
            catalog.expire(meta, [raw], DEADLINE_S, model.version + 1)
        assert_in_redis(client, spec.name, model)
        assert catalog.expire(meta, [raw], DEADLINE_S, model.version).n_items == 1
        with pytest.raises(PreconditionError):
            catalog.expire(replace(meta, epoch="another"), [], DEADLINE_S)
    catalog.close()


def test_two_replicas_lose_an_item_once(
    server: RedisServer, client: redis.Redis, tmp_path: Path, new_name: Callable[[], str]
) -> None:
    spec, model = spec_of(new_name()), Model()
    with (
        Store.open(config_of(server, tmp_path / "one")) as one,
        Store.open(config_of(server, tmp_path / "two")) as two,
    ):
        first = one.create(spec)
        second = two.get(spec.name, deadline_s=DEADLINE_S)
        write(first, model, lasting(spec, 20, 0, "stays"))
        first.upsert(
            lasting(spec, 300, now_ms() + 100, "goes"), request_id="", deadline_s=DEADLINE_S
        )
        model.version += 600
        assert_holds(first, model)
        assert_holds(second, model)
        assert_in_redis(client, spec.name, model)
        for collection in (first, second):
            assert expire(collection) == 0
            assert collection.snapshot().version == model.version


def test_what_expired_while_nobody_was_there_goes_at_the_start(
    server: RedisServer, data_dir: Path, new_name: Callable[[], str]
) -> None:
    spec, model = spec_of(new_name()), Model()
    with Store.open(config_of(server, data_dir, interval_s=NEVER_S)) as store:
        collection = store.create(spec)
        write(collection, model, lasting(spec, 10, 0, "stays"))
        ends_ms = now_ms() + 50
        write(collection, model, lasting(spec, 10, ends_ms, "goes"))
    wait_until(lambda: now_ms() > ends_ms, "it has expired")
    model.delete([f"goes{i}" for i in range(10)])
    with Store.open(config_of(server, data_dir)) as store:
        assert_holds(store.get(spec.name), model)


@pytest.mark.parametrize("binary", server_binaries(), ids=lambda path: path.name)
def test_nothing_expires_while_redis_is_away(
    binary: Path, data_dir: Path, new_name: Callable[[], str]
) -> None:
    spec, model = spec_of(new_name()), Model()
    with RedisServer(binary) as server, Store.open(config_of(server, data_dir)) as store:
        collection = store.create(spec)
        write(collection, model, lasting(spec, 10, 0, "stays"))
        soon_ms = now_ms() + 400
        goes = lasting(spec, 10, soon_ms, "goes")
        write(collection, model, goes)
        server.stop()
        wait_until(lambda: not collection.info().writable, "Redis is missed")
        wait_until(lambda: now_ms() > soon_ms, "it has expired")
        held = collection.snapshot()
        assert expire(collection) == 0
        assert collection.snapshot() is held
        server.start()
        gone = [record.id for record in goes]
        model.delete(gone)
        assert_holds(collection, model)


@pytest.mark.parametrize("seed", range(3))
def test_due_rows_against_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    due = DueRows()
    records = np.zeros(3000, dtype=layout.ROW)
    records["expires_ms"] = rng.choice([0, 100, 200, 300, FAR_MS], 3000)
    dead = np.zeros(3000, np.uint8)
    rows, clock_ms = 0, 0
    for _ in range(40):
        rows = min(rows + int(rng.integers(0, 200)), 3000)
        clock_ms += int(rng.integers(0, 20))
        known, flags = records[:rows], dead[:rows]
        expected = [
            row
            for row in range(rows)
            if not dead[row] and 0 < int(records["expires_ms"][row]) <= clock_ms
        ]
        found = due.find(known, flags if flags.any() else None, clock_ms)
        assert found.tolist() == expected
        dead[[row for row in expected if rng.random() < 0.7]] = 1
        dead[rng.integers(0, max(rows, 1), 5)] = 1


def test_looking_costs_nothing_before_anything_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records are read once; then only those that are new."""
    read: list[int] = []
    real = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda a: (read.append(len(a)), real(a))[1])
    due = DueRows()
    records = np.zeros(100, dtype=layout.ROW)
    records["expires_ms"][7] = 1000
    for _ in range(3):
        assert len(due.find(records, None, 999)) == 0
    assert read == []
    assert due.find(records, None, 1000).tolist() == [7]
    assert read == [100]
