"""The health service: what it says, to whom, and that watches end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens.errors import NotFoundError, UnimplementedError
from hashlens.rpc import health
from hashlens.rpc.health import LIVENESS, READINESS, HealthServicer, ServiceState, reasons_of
from hashlens.rpc.interceptors import ErrorInterceptor
from hashlens.rpc.limits import channel_options

SERVICE = "hashlens.v1.SearchService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Context:
    """Takes trailing metadata."""

    trailing: Any = ()

    def set_trailing_metadata(self, trailing: Any) -> None:
        self.trailing = trailing


async def statuses(servicer: HealthServicer) -> dict[str, int]:
    return {
        name: (await servicer.Check(health_pb2.HealthCheckRequest(service=name), Context())).status
        for name in ("", SERVICE, READINESS, LIVENESS)
    }


def of(whole: int, service: int, ready: int, live: int) -> dict[str, int]:
    return {"": whole, SERVICE: service, READINESS: ready, LIVENESS: live}


class Watches(grpc.aio.ServerInterceptor):
    """Notes those that begin."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        if handler_call_details.method.endswith("/Watch"):
            self.begun.append(handler_call_details.method)
        return await continuation(handler_call_details)


@asynccontextmanager
async def watched_server() -> AsyncIterator[tuple[HealthServicer, grpc.aio.Channel, list[str]]]:
    """A server on a real port, a channel as our clients have it, and the watches it begins."""
    watches = Watches()
    servicer = HealthServicer([SERVICE])
    server = grpc.aio.server(interceptors=[ErrorInterceptor(), watches])
    health.add_to(server, servicer)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", channel_options()) as channel:
            yield servicer, channel, watches.begun
    finally:
        await server.stop(0)


def test_each_name_says_its_own() -> None:
    async def run() -> None:
        servicer = HealthServicer([SERVICE])
        assert await statuses(servicer) == of(NOT_SERVING, NOT_SERVING, NOT_SERVING, SERVING)
        servicer.note(ServiceState(), is_open=True)
        assert await statuses(servicer) == of(SERVING, SERVING, SERVING, SERVING)
        servicer.note(ServiceState(is_ready=False), is_open=True)
        assert await statuses(servicer) == of(SERVING, SERVING, NOT_SERVING, SERVING)
        servicer.note(ServiceState(is_live=False, is_ready=False), is_open=True)
        assert await statuses(servicer) == of(SERVING, SERVING, NOT_SERVING, NOT_SERVING)
        servicer.note(ServiceState(), is_open=False)
        assert await statuses(servicer) == of(NOT_SERVING, NOT_SERVING, NOT_SERVING, SERVING)
        with pytest.raises(NotFoundError):
            await servicer.Check(health_pb2.HealthCheckRequest(service="nobody"), Context())

    asyncio.run(run())


def test_a_check_says_why() -> None:
    async def run() -> None:
        servicer = HealthServicer([SERVICE])
        context = Context()
        servicer.note(ServiceState(reasons=("Größe", "b")), is_open=True)
        await servicer.Check(health_pb2.HealthCheckRequest(), context)
        assert reasons_of(context.trailing) == ("Größe", "b")
        servicer.end()
        await servicer.Check(health_pb2.HealthCheckRequest(), context)
        assert reasons_of(context.trailing) == ("the server is stopping",)

    asyncio.run(run())
    assert reasons_of(((health.REASONS_KEY, b"\xff{"),)) == ()
    assert reasons_of(None) == ()


def test_all_who_watch_are_told_and_let_go_also_after_one_has_left() -> None:
    async def run() -> None:
        servicer = HealthServicer([SERVICE])
        servicer.note(ServiceState(), is_open=True)
        heard: list[list[int]] = [[] for _ in range(5)]

        async def watch(number: int) -> None:
            request = health_pb2.HealthCheckRequest(service="nobody" if number == 4 else SERVICE)
            async for reply in servicer.Watch(request, Context()):
                heard[number].append(reply.status)

        tasks = [asyncio.create_task(watch(number)) for number in range(5)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        servicer.note(ServiceState(), is_open=False)
        await asyncio.sleep(0.01)
        servicer.note(ServiceState(), is_open=True)
        await asyncio.sleep(0.01)
        servicer.end()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks[1:])
        servicer.note(ServiceState(), is_open=True)
        assert (await statuses(servicer))[SERVICE] == NOT_SERVING, "the end is the end"
        assert heard[0] == [SERVING]
        assert heard[1:4] == [[SERVING, NOT_SERVING, SERVING, NOT_SERVING]] * 3
        assert heard[4] == [UNKNOWN]

    asyncio.run(run())


def test_watches_are_bounded_and_checks_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_MAX_WATCHES", 2)

    async def run() -> None:
        servicer = HealthServicer([SERVICE])
        request = health_pb2.HealthCheckRequest()
        watches = [servicer.Watch(request, Context()) for _ in range(3)]
        for watch in watches[:2]:
            await anext(watch)
        with pytest.raises(UnimplementedError):
            await anext(watches[2])
        await statuses(servicer)
        await watches[0].aclose()
        await anext(servicer.Watch(request, Context()))

    asyncio.run(run())


def test_a_channel_is_served_where_too_many_watch_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_MAX_WATCHES", 0)

    async def run() -> None:
        async with watched_server() as (servicer, channel, _):
            servicer.note(ServiceState(), is_open=True)
            request = health_pb2.HealthCheckRequest()
            check = health_pb2_grpc.HealthStub(channel).Check
            assert (await check(request, timeout=30)).status == SERVING

    asyncio.run(run())


def test_who_is_told_of_the_end_does_not_ask_again_and_again() -> None:
    async def run() -> None:
        async with watched_server() as (servicer, channel, watches):
            servicer.note(ServiceState(), is_open=True)
            request = health_pb2.HealthCheckRequest()
            await health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
            servicer.end()
            await asyncio.sleep(0.2)  # The server's connections take calls for as long.
            assert len(watches) == 1

    asyncio.run(run())
