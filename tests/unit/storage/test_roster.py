"""A collection that is dropped while it is being looked for does not come back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from hashlens.errors import NotFoundError
from hashlens.types import CollectionSpec
from search_service.storage import Store, StoreConfig
from search_service.storage.catalog import Catalog
from search_service.storage.keys import Meta
from tests.support.redis_server import RedisServer
from tests.support.stores import DEADLINE_S, wait_until

NEVER_S = 3600.0


@pytest.fixture
def store(server: RedisServer, data_dir: Path, client: redis.Redis) -> Iterator[Store]:
    """One that does not look by itself any more, nor is made to by a collection of its own."""
    client.flushall()
    config = StoreConfig(data_dir=data_dir, redis_url=server.url, discovery_interval_s=NEVER_S)
    with Store.open(config) as store:
        wait_until(lambda: store._roster._has_synchronized, "it has looked once")
        yield store


@pytest.fixture
def name(server: RedisServer, store: Store, new_name: Callable[[], str]) -> str:
    """Of a collection that somebody else has made since."""
    with contextlib.closing(Catalog(server.url, 5.0)) as catalog:
        return catalog.create(CollectionSpec(new_name(), "m", 8, 0), DEADLINE_S).spec.name


@pytest.mark.parametrize("how", ["get", "list"])
def test_what_is_dropped_meanwhile_does_not_come_back(
    store: Store, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping = threading.Thread(target=store.drop, args=(name,))
    real = store._catalog.meta

    def slow(asked: str, deadline_s: float) -> Meta | None:
        found = real(asked, deadline_s)
        if asked == name and dropping.ident is None and threading.current_thread() is asking:
            dropping.start()
            # Where it has to wait for us, it goes on behind us.
            dropping.join(0.3 if how == "list" else DEADLINE_S)
        return found

    asking = threading.current_thread()
    monkeypatch.setattr(store._catalog, "meta", slow)
    if how == "get":
        with pytest.raises(NotFoundError):
            store.get(name, deadline_s=DEADLINE_S)
    else:
        store.list(deadline_s=DEADLINE_S)
    dropping.join(DEADLINE_S)
    assert not dropping.is_alive()
    assert store.find(name) is None
