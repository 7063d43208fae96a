from __future__ import annotations

import socket
import time

import pytest
import redis

from hashlens.errors import (
    HashlensError,
    InternalError,
    InvalidInputError,
    LimitError,
    UnavailableError,
)
from search_service.storage.connection import Caller, connect, translate
from tests.support.redis_server import RedisServer


@pytest.mark.parametrize("url", ["", "localhost", "http://x", "redis://x:port"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="no Redis URL") as caught:
        connect(url, 1.0)
    assert caught.value.field == "redis_url"


def test_the_url_does_not_change_our_settings(server: RedisServer) -> None:
    options = "protocol=3&socket_timeout=99&decode_responses=true&retry_on_timeout=true"
    with connect(f"{server.url}?{options}", 1.5) as client:
        client.set("key", b"\xff")
        assert client.get("key") == b"\xff"
        kwargs = client.connection_pool.connection_kwargs
        assert (kwargs["protocol"], kwargs["socket_timeout"]) == (2, 1.5)


def test_what_the_server_says_becomes_an_error_of_ours(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some are worth another attempt. The last one has to have the time for its answer.
    monkeypatch.setattr("search_service.storage.connection._MAX_ATTEMPTS", 2)
    caller = Caller(server.url, 20.0)

    def fail(*command: str) -> HashlensError:
        with pytest.raises(HashlensError) as caught:
            caller.run(lambda each: each.execute_command(*command), 60.0)
        return caught.value

    client.set("text", "x")
    assert isinstance(fail("HGETALL", "text"), InternalError)
    assert isinstance(fail("EVAL", "return redis.error_reply('OOM used memory')", "0"), LimitError)
    assert isinstance(fail("EVAL", "return redis.error_reply('MISCONF disk')", "0"), LimitError)
    for code in ("READONLY", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "NOPERM"):
        error = fail("EVAL", f"return redis.error_reply('{code} because')", "0")
        assert type(error) is UnavailableError
        assert code in error.message
    caller.close()


@pytest.mark.parametrize("code", ["READONLY", "MASTERDOWN"])
def test_a_server_that_is_no_primary_is_asked_again_on_a_new_connection(
    server: RedisServer, code: str
) -> None:
    caller = Caller(server.url, 20.0)
    connections = []

    def ask(client: redis.Redis) -> object:
        connections.append(client.client_id())
        if len(connections) == 1:
            client.eval(f"return redis.error_reply('{code} because')", 0)
        return client.ping()

    assert caller.run(ask, 60.0) is True
    first, second = connections
    assert first != second
    caller.close()


def test_a_full_memory_is_a_limit(server: RedisServer, client: redis.Redis) -> None:
    caller = Caller(server.url, 1.0)
    client.config_set("maxmemory", "1")
    try:
        with pytest.raises(LimitError, match="out of memory"):
            caller.run(lambda each: each.set("key", "value"), 5.0)
    finally:
        client.config_set("maxmemory", "0")
    caller.close()


def test_a_wrong_password_is_not_tried_again(server: RedisServer) -> None:
    caller = Caller(f"{server.url}?username=nobody&password=wrong", 20.0)
    attempts = []

    def ask(client: redis.Redis) -> object:
        attempts.append(1)
        return client.ping()

    with pytest.raises(UnavailableError):
        caller.run(ask, 60.0)
    assert len(attempts) == 1
    caller.close()


def test_transient_errors_are_tried_again(server: RedisServer) -> None:
    caller = Caller(server.url, 1.0)
    failures = iter([redis.ConnectionError("gone"), redis.TimeoutError("slow")])

    def ask(client: redis.Redis) -> object:
        for failure in failures:
            raise failure
        return client.ping()

    assert caller.run(ask, 5.0) is True
    caller.close()


@pytest.mark.parametrize("deadline_s", [0.0, 0.05, 0.4, 1.0])
def test_a_deadline_holds_when_nobody_answers(deadline_s: float) -> None:
    # Accepts connections, as the kernel does for a process that hangs, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        caller = Caller(f"redis://127.0.0.1:{silent.getsockname()[1]}", 60.0)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="Redis is away"):
            caller.run(lambda client: client.ping(), deadline_s)
        # A bound for hanging, not a measurement: an attempt alone may take a minute.
        assert time.monotonic() - began < deadline_s + 20.0
        caller.close()


def test_unknown_errors_are_ours_to_explain() -> None:
    assert isinstance(translate(redis.ResponseError("ERR strange")), InternalError)
    assert isinstance(translate(redis.TimeoutError()), UnavailableError)
