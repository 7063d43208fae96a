"""A server of each kind for each test: these tests stop, pause and kill it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis_server import RedisServer, server_binaries


@pytest.fixture(params=server_binaries(), ids=lambda path: path.name)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A running server of each kind that is installed."""
    with RedisServer(request.param) as running:
        yield running
