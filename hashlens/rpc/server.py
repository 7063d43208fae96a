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
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens.errors import HashlensError
from hashlens.rpc.health import HealthServicer
from hashlens.rpc.interceptors import ErrorInterceptor, GateInterceptor
from hashlens.rpc.metrics import Metric, exposed
from hashlens.rpc.ports import bind
from hashlens.rpc.server_config import ServerConfig

logger = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_LATECOMERS_S = 0.2
"""How long calls are still answered, with UNAVAILABLE, before the server closes its connections."""


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

    def drain(self) -> None:
        """Learn that the server stops: streams that would go on for ever are to end now."""

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
    address = bind(server, config)
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
        service.drain()
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
