"""The standard health service, fit for a server that stops, and saying why it does not serve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens.errors import NotFoundError, UnimplementedError

LIVENESS: Final = "liveness"
"""Restart the process if this one is not serving."""

READINESS: Final = "readiness"
"""Send no traffic to the process while this one is not serving."""

REASONS_KEY: Final = "hashlens-reasons-bin"
"""Trailing metadata of a check: what there is to say, a JSON list of sentences as UTF-8."""

_MAX_WATCHES: Final = 1000

_LAST_S: Final = 0.4
"""Between the last status of a watch and its end: a client whose watch ends while its connection
takes calls begins another at once, and the next."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """How a service is, as it sees itself."""

    is_live: bool = True
    """Whether it can still help itself; if not, only a new start can."""
    is_ready: bool = True
    """Whether callers should come."""
    reasons: tuple[str, ...] = ()
    """Why not, or what else there is to say. Everybody may read them: they name nothing."""


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The standard health service: of the server (an empty name), its services, and two probes.

    Parameters
    ----------
    services
        Full names of the server's services.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._serving = dict.fromkeys(("", *services, READINESS), False) | {LIVENESS: True}
        self._services = ("", *services)
        self._changed = asyncio.Event()
        self._reasons: bytes = b"[]"
        self._is_over = False
        self._n_watches = 0

    def note(self, state: ServiceState, *, is_open: bool) -> None:
        """Take over how the service is.

        Parameters
        ----------
        state
            How it sees itself.
        is_open
            Whether calls are let through.
        """
        if self._is_over:
            return
        self._reasons = json.dumps(list(state.reasons), ensure_ascii=False).encode()
        serving = dict.fromkeys(self._services, is_open)
        serving |= {READINESS: is_open and state.is_ready, LIVENESS: state.is_live}
        self._set(serving)

    def end(self) -> None:
        """Say NOT_SERVING for good, to those who watch as well, and end the watches.

        The process is alive until it is gone: liveness stays as it is. Without an end of the
        watches, ``stop(grace)`` would wait for all of its grace.
        """
        if self._is_over:
            return
        self._is_over = True
        self._reasons = json.dumps(["the server is stopping"]).encode()
        self._set(dict.fromkeys((*self._services, READINESS), False))
        self._wake()

    async def Check(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """Return a status, and in the trailing metadata why."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            raise NotFoundError("nothing of that name is served here")
        if self._reasons != b"[]":
            context.set_trailing_metadata(((REASONS_KEY, self._reasons),))
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Stream a status until the caller leaves or the server stops."""
        if self._n_watches >= _MAX_WATCHES:
            # Of all statuses, the one with which a channel that watches goes on without: any other
            # tells it that the server cannot be used.
            raise UnimplementedError("too many watch already: ask with Check")
        self._n_watches += 1
        try:
            last = None
            while True:
                changed, is_over = self._changed, self._is_over
                status = self._status(request.service)
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                    last = status
                if is_over:
                    await asyncio.sleep(_LAST_S)
                    return
                await changed.wait()
        finally:
            self._n_watches -= 1

    def _status(self, name: str) -> Any:
        serving = self._serving.get(name)
        if serving is None:
            return _UNKNOWN
        return _SERVING if serving else _NOT_SERVING

    def _set(self, serving: dict[str, bool]) -> None:
        if any(self._serving[name] != value for name, value in serving.items()):
            self._serving |= serving
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def reasons_of(trailing: Any) -> tuple[str, ...]:
    """Read the reasons in a check's trailing metadata; none where they cannot be read."""
    for key, value in trailing or ():
        if key == REASONS_KEY and isinstance(value, bytes):
            try:
                return tuple(str(reason) for reason in json.loads(value))
            except (ValueError, TypeError):
                return ()
    return ()


def add_to(server: grpc.aio.Server, servicer: HealthServicer) -> None:
    """Have a server answer health checks."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
