"""A server of each kind, shared by the tests of this folder; each test uses names of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Store, StoreConfig
from search_service.storage.catalog import Catalog
from tests.support.around import Around
from tests.support.redis_server import RedisServer, server_binaries


@pytest.fixture(scope="session", params=server_binaries(), ids=lambda path: path.name)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A running server of each kind that is installed."""
    with RedisServer(request.param) as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    """A client for questions past the store."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def new_name() -> Callable[[], str]:
    """Names of collections that no other test has."""
    numbers = itertools.count()
    return lambda: f"c{next(numbers)}"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def around(
    server: RedisServer,
    data_dir: Path,
    new_name: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Around]]:
    """Makes collections in a store of the test's own; arguments change the specification."""
    # What the log has no more is what many tests are about.
    monkeypatch.setattr("search_service.storage.upkeep._TRIM_S", 60.0)
    names: list[str] = []
    # Nobody else finds what a test has damaged.
    config = StoreConfig(
        data_dir=data_dir, redis_url=server.url, segment_bytes=4096, scrub_mb_per_s=0
    )
    with Store.open(config) as store:

        def make(**changes: object) -> Around:
            spec = CollectionSpec("unset", "m", 100, 8, FeatureDtype.F16, 1000)
            spec = replace(spec, name=new_name(), **changes)  # type: ignore[arg-type]
            names.append(spec.name)
            return Around(server, store, spec, tmp_path)

        yield make
    # Not by the store, which a test may have closed: other tests' stores would open them all.
    with contextlib.closing(Catalog(server.url, 5.0)) as catalog:
        for name in names:
            catalog.drop(name, 20.0)
