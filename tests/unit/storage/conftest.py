"""A server of each kind, shared by the tests of this folder; each test uses names of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

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
