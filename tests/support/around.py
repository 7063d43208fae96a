"""A collection of a running store with a model beside it, and rebuilds of its files."""

from __future__ import annotations

import uuid
from pathlib import Path

from hashlens.types import CollectionSpec
from search_service.storage import Collection, Record, Store
from search_service.storage.catalog import Catalog
from search_service.storage.keys import Meta
from search_service.storage.local import LocalCollection
from search_service.storage.rebuild import Rebuilt, install, rebuild
from tests.support.redis_server import RedisServer
from tests.support.stores import DEADLINE_S, Model


class Around:
    """A collection of a store, its model, and rebuilds of it."""

    def __init__(self, server: RedisServer, store: Store, spec: CollectionSpec, at: Path) -> None:
        self.store = store
        self.collection: Collection = store.create(spec)
        self.model = Model()
        self.files = at / "data" / "collections" / spec.name
        self.at = at / "made"
        self.at.mkdir(exist_ok=True)
        self.url = server.url
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
            "url": self.url,
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
