"""Calls to Redis that end: every wait has a bound, every failure is one of `hashlens.errors`."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hashlens.errors import (
    HashlensError,
    InternalError,
    InvalidInputError,
    LimitError,
    UnavailableError,
)

T = TypeVar("T")

_MAX_ATTEMPTS: Final = 8
_FIRST_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 1.0
_SHORTEST_TIMEOUT_S: Final = 0.05
_MAX_CONNECTIONS: Final = 256
_READ_BYTES: Final = 1 << 16

_TRANSIENT: Final = ("BUSY", "TRYAGAIN", "LOADING", "UNBLOCKED")
_DEMOTED: Final = ("READONLY", "MASTERDOWN")
"""This server is no primary any more, or not yet: the URL may lead to another one by now."""
_AWAY: Final = ("CLUSTERDOWN", "NOREPLICAS", "MOVED", "ASK", "NOPERM")


def connect(url: str, timeout_s: float) -> redis.Redis:
    """Return a client whose every wait is at most `timeout_s`; it connects when first used.

    Retries are off: the same command must not run twice behind the caller's back. Beside what
    redis-py knows, the URL's query may have a ``password_file``. It and the files of TLS are read
    at each connection.

    Raises
    ------
    InvalidInputError
        The URL is not one of Redis.
    """
    settings: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "decode_responses": False,
        "socket_read_size": _READ_BYTES,
    }
    try:
        pool = redis.ConnectionPool.from_url(url, max_connections=_MAX_CONNECTIONS, **settings)
    except ValueError as error:
        # Neither the URL nor the parser's words: they may hold a password.
        raise InvalidInputError(
            f"this is no Redis URL ({type(error).__name__}). Give redis://, rediss:// or unix://.",
            field="redis_url",
        ) from None
    given = pool.connection_kwargs
    # What the URL's own query string says must not undo them.
    given.update(settings)
    if pool.connection_class is redis.SSLConnection:
        given["ssl_min_version"] = ssl.TLSVersion.TLSv1_2
    if (path := given.pop("password_file", None)) is not None:
        if given.pop("password", None):
            raise InvalidInputError(
                "the URL of Redis has a password, and there is a file with one: give one of them",
                field="redis_password_file",
            )
        given["credential_provider"] = _PasswordFile(Path(path), given.pop("username", None))
    client = redis.Redis.from_pool(pool)
    client.set_response_callback("XREAD", lambda response, **_: response)
    return client


class _PasswordFile(redis.CredentialProvider):
    """The password that a file holds at the moment."""

    def __init__(self, path: Path, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text("utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise redis.AuthenticationError(
                f"{self._path} cannot be read: {type(error).__name__}"
            ) from None
        return (password,) if self._username is None else (self._username, password)


def run_script(
    client: redis.Redis, source: str, keys: Sequence[str], arguments: Sequence[Any]
) -> Any:
    """Run a script by its hash, loading it where the server does not have it."""
    return client.register_script(source)(keys=keys, args=arguments)


@dataclass(slots=True)
class RedisState:
    """How calls to Redis went; thread-safe to write, read field by field."""

    is_connected: bool = False
    """Whether the last call got an answer, be it a refusal."""
    last_s: float = 0.0
    """How long the last call took."""
    total_s: float = 0.0
    n_calls: int = 0
    n_failures: int = 0
    """Calls that got no answer, or a refusal."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, took_s: float, *, is_connected: bool, has_failed: bool = False) -> None:
        """Count a call."""
        with self._lock:
            self.is_connected = is_connected
            self.last_s = took_s
            self.total_s += took_s
            self.n_calls += 1
            self.n_failures += has_failed


class Caller:
    """Runs actions against Redis within a deadline, trying again while it makes sense.

    An action may be run several times, so it must be idempotent.

    Parameters
    ----------
    url
        Where Redis is.
    attempt_timeout_s
        The longest wait for one reply.
    """

    def __init__(self, url: str, attempt_timeout_s: float) -> None:
        # A socket's time-out belongs to its connection, so there is a client for each of a few
        # time-outs; a call takes the longest that still leaves time for a second wait.
        self._clients: dict[float, redis.Redis] = {}
        timeout_s = attempt_timeout_s
        while timeout_s > _SHORTEST_TIMEOUT_S:
            self._clients[timeout_s] = connect(url, timeout_s)
            timeout_s /= 2
        self._clients[_SHORTEST_TIMEOUT_S] = connect(url, _SHORTEST_TIMEOUT_S)
        self.state = RedisState()
        """How the calls went."""

    def run(self, action: Callable[[redis.Redis], T], deadline_s: float) -> T:
        """Return what `action` returns.

        Raises
        ------
        UnavailableError
            Redis is away or refuses for now. Whether the last attempt did something is unknown.
        LimitError
            Redis is out of memory or disk.
        InternalError
            Redis answered what it never should.
        """
        give_up = time.monotonic() + deadline_s
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            client = self._client(give_up - time.monotonic())
            began_s = time.monotonic()
            try:
                value = action(client)
                self.state.note(time.monotonic() - began_s, is_connected=True)
                return value
            except redis.RedisError as error:
                is_away = isinstance(error, redis.ConnectionError | redis.TimeoutError)
                took_s = time.monotonic() - began_s
                self.state.note(took_s, is_connected=not is_away, has_failed=True)
                if _code(error) in _DEMOTED:
                    # A demoted server keeps its clients; only new connections find the primary.
                    self._disconnect()
                wait_s = pause_s * random.uniform(0.5, 1.0)
                over = time.monotonic() + wait_s + _SHORTEST_TIMEOUT_S >= give_up
                if over or attempt == _MAX_ATTEMPTS or not _is_transient(error):
                    raise translate(error) from error
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()

    def _disconnect(self) -> None:
        """Give up the connections that no call is using."""
        for client in self._clients.values():
            client.connection_pool.disconnect(inuse_connections=False)

    def _client(self, remaining_s: float) -> redis.Redis:
        fitting = [timeout_s for timeout_s in self._clients if 2 * timeout_s <= remaining_s]
        return self._clients[max(fitting, default=_SHORTEST_TIMEOUT_S)]


def translate(error: redis.RedisError) -> HashlensError:
    """Return our error for one of redis-py."""
    text = str(error) or type(error).__name__
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return LimitError(f"Redis is out of memory ({text}). Give it more, or drop collections.")
    if text.startswith("MISCONF"):
        return LimitError(f"Redis cannot write to its disk ({text}). Free space there.")
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | redis.exceptions.AskError):
        return UnavailableError(f"Redis is away ({text}). Try again.")
    if _is_transient(error) or _code(error) in _AWAY:
        return UnavailableError(f"Redis refuses for now ({_code(error)} {text}).")
    return InternalError(f"Redis answered: {text}")


def _is_transient(error: redis.RedisError) -> bool:
    """Tell whether the same call may succeed a moment later."""
    if isinstance(error, redis.exceptions.AuthenticationError):
        return False
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return True
    return _code(error) in _TRANSIENT + _DEMOTED


def _code(error: redis.RedisError) -> str:
    """Return the first word of the server's reply, which redis-py strips where it knows it."""
    known = {
        redis.exceptions.ReadOnlyError: "READONLY",
        redis.exceptions.MasterDownError: "MASTERDOWN",
        redis.exceptions.ClusterDownError: "CLUSTERDOWN",
        redis.exceptions.TryAgainError: "TRYAGAIN",
        redis.exceptions.NoPermissionError: "NOPERM",
    }
    for kind, code in known.items():
        if isinstance(error, kind):
            return code
    return str(error).partition(" ")[0]
