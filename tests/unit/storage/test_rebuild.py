"""Files made anew from Redis: what a replica that followed the log has, while writes go on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Collection, Record, Store, StoreConfig
from search_service.storage.catalog import Catalog
from search_service.storage.keys import Meta
from search_service.storage.local import LocalCollection
from search_service.storage.rebuild import Rebuilt, install, rebuild
from tests.support.redis_server import RedisServer
from tests.support.stores import DEADLINE_S, Model, contents, make_records

SPEC = CollectionSpec("unset", "m", 100, 8, FeatureDtype.F16, 1000)


@pytest.fixture
def store(server: RedisServer, data_dir: Path) -> Iterator[Store]:
    with Store.open(StoreConfig(data_dir=data_dir, redis_url=server.url, segment_bytes=4096)) as s:
        yield s


class Around:
    """A collection of a store, its model, and rebuilds of it."""

    def __init__(self, server: RedisServer, store: Store, spec: CollectionSpec, at: Path) -> None:
        self.collection: Collection = store.create(spec)
        self.model = Model()
        self.files = at / "data" / "collections" / spec.name
        self.at = at / "made"
        self.at.mkdir(exist_ok=True)
        self._url = server.url
        catalog = Catalog(server.url, 5.0)
        meta = catalog.meta(spec.name, DEADLINE_S)
        catalog.close()
        assert meta is not None
        self.meta: Meta = meta

    def upsert(self, records: list[Record]) -> None:
        self.collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
        self.model.upsert(records)

    def delete(self, ids: list[str]) -> None:
        self.collection.delete(ids, request_id="", deadline_s=DEADLINE_S)
        self.model.delete(ids)

    def settle(self) -> None:
        """Apply and checkpoint everything, which trims the log."""
        self.collection.wait_for(self.model.version, DEADLINE_S)
        self.collection.checkpoint()

    def rebuild(self, old: Path | None = None, **options: object) -> Rebuilt:
        given: dict[str, object] = {
            "url": self._url,
            "replica_id": str(uuid.uuid4()),
            "timeout_s": 5.0,
            "segment_bytes": 1024,
            "old": old,
        }
        return rebuild(self.at, self.meta, **(given | options))  # type: ignore[arg-type]

    def installed(self, made: Rebuilt) -> LocalCollection:
        directory = self.at / self.meta.spec.name
        install(made, directory)
        return LocalCollection.load(directory)


@pytest.fixture
def around(
    server: RedisServer, store: Store, new_name: Callable[[], str], tmp_path: Path
) -> Callable[..., Around]:
    def make(**changes: object) -> Around:
        spec = replace(SPEC, name=new_name(), **changes)  # type: ignore[arg-type]
        return Around(server, store, spec, tmp_path)

    return make


def rows_in_order(local: LocalCollection) -> list[str]:
    """Ids of the alive rows, by age."""
    snapshot = local.snapshot
    dead = np.zeros(snapshot.rows, np.uint8) if snapshot.dead is None else snapshot.dead
    return snapshot.ids_of(np.flatnonzero(dead == 0))


def test_codes_tags_and_payloads_come_back_in_the_order_of_their_writes(
    around: Callable[..., Around],
) -> None:
    here = around(dim=0)
    records = make_records(here.meta.spec, 3000)
    here.upsert(records)
    here.delete([f"i{i}" for i in range(0, 300, 7)])
    here.upsert(make_records(here.meta.spec, 500, seed=1))
    here.settle()
    made = here.rebuild()
    assert made.n_missing_features == 0
    assert made.rows == len(here.model.items)
    local = here.installed(made)
    assert local.seq == made.seq == here.model.version
    assert local.log_crc32 != 0
    assert contents(local.snapshot) == here.model.items
    ours = here.collection.snapshot()
    alive = np.flatnonzero(ours.dead == 0)
    assert rows_in_order(local) == ours.ids_of(alive)
    local.close()


def test_features_come_from_the_log(around: Callable[..., Around]) -> None:
    here = around()
    here.upsert(make_records(here.meta.spec, 700))
    here.delete(["i3", "i4"])
    local = here.installed(here.rebuild())
    assert contents(local.snapshot) == here.model.items
    local.close()
