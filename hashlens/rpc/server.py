"""Building a server and running it from start to graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hashlens.config import setting
from hashlens.errors import DeadlineError, HashlensError, InvalidInputError
from hashlens.rpc.interceptors import ErrorInterceptor, GateInterceptor
from hashlens.rpc.limits import DEADLINE_S, MAX_MESSAGE_BYTES
from hashlens.rpc.logs import LogFormat
from hashlens.rpc.metrics import Metric, exposed

logger = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_ANSWER_S = 0.5
"""Time kept back from a call's deadline for its answer to travel, at most a fifth of it."""

_LATECOMERS_S = 0.2
"""How long calls are still answered, with UNAVAILABLE, before the server closes its connections."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What every server can be told; a service's own configuration extends it."""

    listen: str = setting("127.0.0.1:0", "Address and port to serve on; port 0 takes a free one.")
    max_message_bytes: int = setting(MAX_MESSAGE_BYTES, "Largest request or reply, in bytes.")
    default_deadline_s: float = setting(
        DEADLINE_S, "Time for a call whose client sets none, in seconds."
    )
    max_connection_age_s: float = setting(
        300.0, "A connection is closed after this long, so that clients find new servers."
    )
    grace_s: float = setting(10.0, "Time that running calls get to end on SIGTERM, in seconds.")
    metrics_listen: str = setting(
        "", "Address and port of /metrics over HTTP, for Prometheus; empty: none."
    )
    log_level: str = setting("info", "Lowest level that is logged.")
    log_format: LogFormat = setting("text", "How logs are written.")

    def __post_init__(self) -> None:
        for name in ("listen", "metrics_listen"):
            value = getattr(self, name)
            host, _, port = value.rpartition(":")
            fits = bool(host) and port.isdecimal() and int(port) < 65536
            if not fits and (value or name == "listen"):
                raise InvalidInputError(f"{name} is host:port, not {value!r}", field=name)
        if self.log_level.upper() not in logging.getLevelNamesMapping():
            raise InvalidInputError(f"log_level {self.log_level!r} is none of logging's")
        for name in ("max_message_bytes", "default_deadline_s", "max_connection_age_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} is above 0", field=name)
        if self.grace_s < 0:
            raise InvalidInputError("grace_s is 0 or more", field="grace_s")


class HealthServicer(health.aio.HealthServicer):
    """The standard health service, whose open watches end when the server stops.

    Without that, ``stop(grace)`` would wait for all of its grace.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[Any]] = set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - the contract's name
        """Stream the status until the caller leaves or the server stops."""
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await super().Watch(request, context)
        finally:
            self._watches.discard(task)

    async def end(self) -> None:
        """Say NOT_SERVING to everybody, for good, and end the watches."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(0)  # Let the watches send it.
        for task in list(self._watches):
            task.cancel()


def deadline_s(context: grpc.aio.ServicerContext[Any, Any], config: ServerConfig) -> float:
    """Return the time that a handler has, in seconds.

    A little less than what the client set, so that an answer such as "Redis is away" still reaches
    it before it gives up.

    Raises
    ------
    DeadlineError
        None is left.
    """
    # None, whatever the stubs say, when the client set no deadline.
    left_s = cast(float | None, context.time_remaining())
    if left_s is None:
        return config.default_deadline_s
    if left_s <= 0:
        raise DeadlineError("the deadline passed before the call was begun")
    return left_s - min(_ANSWER_S, left_s / 5)


class Service(Protocol):
    """What `serve` runs."""

    @property
    def names(self) -> Sequence[str]:
        """Full names of the gRPC services, as health reports them."""

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers; nothing is called before `warm_up` has returned."""

    def listens(self, address: str) -> None:
        """Learn where the server listens, before `warm_up`: host:port, the port a real one."""

    async def warm_up(self) -> None:
        """Load, compile and connect what the first call would else wait for."""

    def metrics(self) -> Iterable[Metric]:
        """Return what Prometheus is told; called from another thread, after `warm_up`."""

    async def close(self) -> None:
        """Release everything, after the last call or a `warm_up` that failed."""


async def serve(config: ServerConfig, service: Service) -> None:
    """Run a service until SIGTERM or SIGINT.

    Health says NOT_SERVING until the service has warmed up, and first of all on a signal; running
    calls then get `grace_s`. When it serves, one line of JSON on standard output says where:
    ``{"listening": "127.0.0.1:50051", "pid": 4711}``.

    Raises
    ------
    HashlensError
        What `warm_up` raises; OSError if the address cannot be had.
    """
    gate = GateInterceptor()
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(), gate],
        options=[
            ("grpc.max_send_message_length", config.max_message_bytes),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(config.grace_s * 1000)),
        ],
    )
    health_servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    service.register(server)
    health_names = ["", *service.names]
    for name in health_names:
        await health_servicer.set(name, _NOT_SERVING)

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        port = server.add_insecure_port(config.listen)
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {config.listen}: it is in use, or no address of this machine "
            f"({error})"
        ) from None
    address = f"{config.listen.rpartition(':')[0]}:{port}"
    service.listens(address)
    await server.start()
    try:
        if await _finished_first(service.warm_up(), stop):
            # What is loaded by now stays: looking through it again and again takes the garbage
            # collector tens of milliseconds, in the middle of calls.
            gc.collect()
            gc.freeze()
            gate.open()
            for name in health_names:
                await health_servicer.set(name, _SERVING)
            sys.stdout.write(json.dumps({"listening": address, "pid": os.getpid()}) + "\n")
            sys.stdout.flush()
            logger.info("serving %s on %s", ", ".join(service.names), address)
            with contextlib.ExitStack() as stack:
                if config.metrics_listen:
                    where = stack.enter_context(exposed(config.metrics_listen, service.metrics))
                    logger.info("metrics on http://%s/metrics", where)
                await stop.wait()
        logger.info("stopping: calls in flight have %g s", config.grace_s)
    finally:
        await health_servicer.end()
        # What is on its way is told to go elsewhere; gRPC would cancel it.
        gate.close()
        await asyncio.sleep(min(_LATECOMERS_S, config.grace_s))
        await server.stop(config.grace_s)
        await service.close()


async def _finished_first(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Run `work` unless `stop` comes first; tell whether it finished."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        await working
        return True
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
    return False


def run(config: ServerConfig, service: Service) -> int:
    """Run `serve` as a process's main function and return its exit status."""
    try:
        asyncio.run(serve(config, service))
    except (HashlensError, OSError) as error:
        logger.error("cannot start: %s", error)
        return 1
    return 0
