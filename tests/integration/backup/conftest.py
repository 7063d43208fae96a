"""A Redis that is written, one that is empty, and a data directory for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from search_service.backup.put_back import RestoreConfig
from search_service.storage import StoreConfig
from tests.support.redis_server import RedisServer, server_binaries

SEGMENT_BYTES = 4096
"""A feature file of the tests is full after 32 rows."""


@pytest.fixture(scope="module")
def live(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """One kind, but where a test asks for each."""
    with RedisServer(getattr(request, "param", server_binaries()[0])) as running:
        yield running


@pytest.fixture(scope="module")
def empty(live: RedisServer) -> Iterator[RedisServer]:
    """Where backups are restored to; of the same kind."""
    with RedisServer(live.binary) as running:
        yield running


@pytest.fixture
def config(live: RedisServer, empty: RedisServer, tmp_path: Path) -> StoreConfig:
    for server in (live, empty):
        with server.client() as client:
            client.flushall()
    return StoreConfig(data_dir=tmp_path / "live", redis_url=live.url, segment_bytes=SEGMENT_BYTES)


@pytest.fixture
def target(empty: RedisServer, tmp_path: Path) -> RestoreConfig:
    return RestoreConfig(data_dir=tmp_path / "restored", redis_url=empty.url)
