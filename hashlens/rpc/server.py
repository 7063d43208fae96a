"""Building a server and running it from start to graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

import grpc

from hashlens.errors import HashlensError, InternalError
from hashlens.rpc import health, method_limits
from hashlens.rpc.admission import Admission
from hashlens.rpc.admission_interceptor import AdmissionInterceptor
from hashlens.rpc.auth import access
from hashlens.rpc.health import HealthServicer, ServiceState
from hashlens.rpc.intake import Intake
from hashlens.rpc.interceptors import ErrorInterceptor, GateInterceptor
from hashlens.rpc.metrics import Metric
from hashlens.rpc.metrics_http import exposed
from hashlens.rpc.ports import bind
from hashlens.rpc.reflection import reflect
from hashlens.rpc.server_config import ServerConfig
from hashlens.rpc.server_metrics import server_metrics
from hashlens.rpc.side_servers import side_servers
from hashlens.rpc.stop_signals import stop_signals
from hashlens.rpc.telemetry import Telemetry
from hashlens.rpc.watchdog import LoopWatchdog, end_within

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Between two looks at how the service is, for health."""

_LATECOMERS_S = 0.2
"""How long calls are still answered, with UNAVAILABLE, before the server closes its connections."""


class Service(Protocol):
    """What `serve` runs."""

    @property
    def names(self) -> Sequence[str]:
        """Full names of the gRPC services, as health reports them."""

    @property
    def method_limits(self) -> Mapping[str, int]:
        """Calls of each method that may be in the works at a time, by its short name."""

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers; nothing is called before `warm_up` has returned."""

    def listens(self, address: str) -> None:
        """Learn where the server listens, before `warm_up`: host:port, the port a real one."""

    async def warm_up(self) -> None:
        """Load, compile and connect what the first call would else wait for."""

    def state(self) -> ServiceState:
        """Return how the service is, at any time after `register`; asks nobody and waits not."""

    def drain(self) -> None:
        """Learn that the server stops: streams that would go on for ever are to end now."""

    def metrics(self) -> Iterable[Metric]:
        """Return what Prometheus is told; called from another thread, after `warm_up`."""

    async def close(self) -> None:
        """Release everything, after the last call or a `warm_up` that failed."""


async def serve(config: ServerConfig, service: Service) -> None:
    """Run a service until SIGTERM or SIGINT; a second one ends the process at once.

    Health says NOT_SERVING until the service has warmed up, and first of all on a signal; running
    calls then get `grace_s`. When it serves, one line of JSON on standard output says where:
    ``{"listening": "127.0.0.1:50051", "pid": 4711}``, and under ``metrics`` where those are read.

    For a process's main thread: after the signal, the process ends in bounded time.

    Raises
    ------
    HashlensError
        What `warm_up` raises; OSError if the address cannot be had.
    """
    telemetry = Telemetry(config, service.names)
    limits = method_limits.resolve(
        service.names, service.method_limits, method_limits.parse(config.method_limits)
    )
    admission = Admission(
        limits,
        Intake(
            max_bytes=config.max_bytes_in_flight,
            max_message_bytes=config.max_message_bytes,
            request_s=config.max_request_s,
        ),
        request_s=config.max_request_s,
        default_deadline_s=config.default_deadline_s,
    )
    gate = GateInterceptor()
    server = grpc.aio.server(
        interceptors=[
            telemetry,
            ErrorInterceptor(),
            gate,
            *access(config.tokens),
            AdmissionInterceptor(admission),
        ],
        options=[
            ("grpc.max_send_message_length", config.max_message_bytes),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.max_allowed_incoming_connections", config.max_connections),
            ("grpc.server_handshake_timeout_ms", int(config.handshake_s * 1000)),
            ("grpc.max_concurrent_streams", config.max_connection_streams),
            ("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(config.grace_s * 1000)),
            ("grpc.enable_channelz", int(bool(config.admin_listen))),
        ],
    )
    checks = HealthServicer(service.names)
    health.add_to(server, checks)
    service.register(server)
    if config.reflection:
        reflect(server, service.names)
    watchdog = LoopWatchdog(config.stall_s)
    async with contextlib.AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        stack.enter_context(watchdog.watching())
        await stack.enter_async_context(side_servers(config, checks))
        address = bind(server, config)
        service.listens(address)
        await server.start()
        metrics = stack.enter_context(contextlib.ExitStack())
        looking = asyncio.create_task(_keep_looking(service, checks, gate))
        try:
            if await _finished_first(service.warm_up(), stop):
                # What is loaded by now stays: looking through it again and again takes the garbage
                # collector tens of milliseconds, in the middle of calls.
                gc.collect()
                gc.freeze()
                gate.open()
                checks.note(service.state(), is_open=True)
                said = {"listening": address, "pid": os.getpid()}
                if config.metrics_listen:
                    source = telemetry.collecting(
                        service.metrics, lambda: server_metrics(admission, watchdog)
                    )
                    said["metrics"] = metrics.enter_context(exposed(config.metrics_listen, source))
                    logger.info("metrics on http://%s/metrics", said["metrics"])
                sys.stdout.write(json.dumps(said) + "\n")
                sys.stdout.flush()
                logger.info("serving %s on %s", ", ".join(service.names), address)
                if await _finished_first(_until_ended(server), stop):
                    raise InternalError("gRPC has stopped to serve by itself")
            logger.info("stopping: calls in flight have %g s", config.grace_s)
        finally:
            end_within(config.grace_s + _LATECOMERS_S + config.flush_s)
            checks.end()
            looking.cancel()
            service.drain()
            # What is on its way is told to go elsewhere; gRPC would cancel it.
            gate.close()
            await asyncio.sleep(min(_LATECOMERS_S, config.grace_s))
            await server.stop(config.grace_s)
            metrics.close()
            await service.close()
            await telemetry.close()


async def _keep_looking(service: Service, checks: HealthServicer, gate: GateInterceptor) -> None:
    """Tell health how the service is, again and again."""
    is_broken = False
    while True:
        try:
            state = service.state()
        except Exception:
            # The service may well serve; what it says of itself is not worth its life.
            state = ServiceState(reasons=("its state cannot be told: see the log",))
            if not is_broken:
                logger.exception("the state of the service")
            is_broken = True
        checks.note(state, is_open=gate.is_open)
        await asyncio.sleep(_LOOK_S)


async def _until_ended(server: grpc.aio.Server) -> None:
    """Wait for gRPC's own loop to end, which only a defect in it makes it do."""
    try:
        # With a time-out, because giving up the other wait would break `stop`.
        while await server.wait_for_termination(_LOOK_S):
            pass
    except Exception as error:
        raise InternalError(f"gRPC has stopped to serve by itself: {error!r}") from error


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
    except InternalError as error:
        logger.critical("%s. The process ends, to be started again", error)
        return 1
    except (HashlensError, OSError) as error:
        logger.error("cannot start: %s", error)
        return 1
    return 0
