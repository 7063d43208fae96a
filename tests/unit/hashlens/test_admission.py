"""Who is let in, and that a place is given back however its call ends; real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from hashlens.errors import DeadlineError, InvalidInputError, OverloadedError
from hashlens.rpc import admission, call, intake, method_limits
from hashlens.rpc.admission import Admission
from hashlens.rpc.admission_interceptor import AdmissionInterceptor
from hashlens.rpc.intake import Intake
from hashlens.rpc.interceptors import ErrorInterceptor
from hashlens.rpc.server_config import ServerConfig
from hashlens.rpc.status import error_of_call
from hashlens.rpc.telemetry import Telemetry

MESSAGE_BYTES = 1 << 20
WAIT_S = 30.0
"""Longest that any of these takes; none does."""
UNARY, STREAM, BOTH, FREE = "/t.T/Unary", "/t.T/Stream", "/t.T/Both", "/t.T/Free"


@dataclass
class Handlers(grpc.GenericRpcHandler):
    """Methods that do what the test says."""

    act: Callable[[bytes], Awaitable[None]]
    n_parsed: int = 0
    n_begun: int = 0
    cancelled: int = field(default=0)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        parse, serialize = self._parse, BytesValue.SerializeToString
        return {
            UNARY: grpc.unary_unary_rpc_method_handler(self._unary, parse, serialize),
            FREE: grpc.unary_unary_rpc_method_handler(self._unary, parse, serialize),
            STREAM: grpc.unary_stream_rpc_method_handler(self._stream, parse, serialize),
            BOTH: grpc.stream_stream_rpc_method_handler(self._both, parse, serialize),
        }.get(details.method)

    def _parse(self, data: bytes) -> BytesValue:
        self.n_parsed += 1
        return BytesValue.FromString(data)

    async def _unary(self, request: BytesValue, context: Any) -> BytesValue:
        self.n_begun += 1
        try:
            await self.act(request.value)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return request

    async def _stream(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        for _ in range(100):
            await self.act(request.value)
            yield request

    async def _both(
        self, requests: AsyncIterator[BytesValue], context: Any
    ) -> AsyncIterator[BytesValue]:
        async for request in requests:
            await self.act(request.value)
            yield request


@dataclass
class Bed:
    """A server, and a channel to it."""

    admission: Admission
    handlers: Handlers
    channel: grpc.aio.Channel

    def in_flight(self) -> int:
        return sum(lane.in_flight for lane in self.admission.lanes.values())

    async def settled(self) -> None:
        """Wait until nothing is in the works; fail if that does not come."""
        async with asyncio.timeout(WAIT_S):
            while self.in_flight() or self.admission.intake.held_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert self.admission.intake.n_reading == 0

    def call(self, method: str, value: bytes = b"", timeout: float | None = WAIT_S) -> Any:
        return self.channel.unary_unary(
            method, BytesValue.SerializeToString, BytesValue.FromString
        )(BytesValue(value=value), timeout=timeout)


async def _nothing(_: bytes) -> None:
    return


@asynccontextmanager
async def serving(
    act: Callable[[bytes], Awaitable[None]] = _nothing,
    *,
    limit: int = 2,
    max_bytes: int = 64 * MESSAGE_BYTES,
    request_s: float = 30,
    default_deadline_s: float = 30,
    named: bool = False,
) -> AsyncIterator[Bed]:
    made = Admission(
        dict.fromkeys((UNARY, STREAM, BOTH), limit),
        Intake(max_bytes=max_bytes, max_message_bytes=MESSAGE_BYTES, request_s=request_s),
        request_s=request_s,
        default_deadline_s=default_deadline_s,
    )
    handlers = Handlers(act)
    server = grpc.aio.server(
        interceptors=[
            *([Telemetry(ServerConfig(), ())] if named else []),
            ErrorInterceptor(),
            AdmissionInterceptor(made),
        ],
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES)],
    )
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", [("grpc.enable_retries", 0)]
        ) as channel:
            yield Bed(made, handlers, channel)
    finally:
        await server.stop(0)


async def _refused(call: Any) -> OverloadedError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = error_of_call(caught.value)
    assert isinstance(error, OverloadedError), error
    assert error.retry_after_s >= 0.05
    return error


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - polled, so that the server needs no hook
            await asyncio.sleep(0.01)


def test_one_more_than_the_limit_is_refused_unparsed_and_others_are_not_held_up() -> None:
    async def run() -> None:
        gate = asyncio.Event()

        async def wait(_: bytes) -> None:
            await gate.wait()

        async with serving(wait) as bed:
            held = [bed.call(UNARY), bed.call(UNARY)]
            await _until(lambda: bed.handlers.n_begun == 2)
            error = await _refused(bed.call(UNARY, bytes(1000)))
            assert "2 calls of Unary" in error.message
            assert "method_limits" in error.message
            assert bed.handlers.n_parsed == 2
            lane = bed.admission.lanes[UNARY]
            assert (lane.in_flight, lane.n_admitted, lane.n_refused) == (2, 2, 1)
            free = bed.call(FREE)  # Of no lane, as health is.
            await _until(lambda: bed.handlers.n_begun == 3)
            gate.set()
            await asyncio.gather(*held, free)
            await bed.call(UNARY)
            await bed.settled()

    asyncio.run(run())


async def _cancelled(bed: Bed) -> None:
    call = bed.call(UNARY, b"wait")
    await _until(lambda: bed.in_flight() == 1)
    await asyncio.sleep(0.02)
    call.cancel()


async def _late(bed: Bed) -> None:
    with pytest.raises(grpc.RpcError):
        await bed.call(UNARY, b"wait", timeout=0.1)


async def _wrong(bed: Bed) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await bed.call(UNARY, b"wrong")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def _broken(bed: Bed) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await bed.call(UNARY, b"broken")
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def _noise(bed: Bed) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await bed.channel.unary_unary(UNARY)(b"\xff\xff", timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def _oversize(bed: Bed) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await bed.call(UNARY, bytes(2 * MESSAGE_BYTES))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def _silent(bed: Bed) -> None:
    call = bed.channel.stream_unary(UNARY)(timeout=WAIT_S)
    await _until(lambda: bed.in_flight() == 1)
    call.cancel()


async def _half_read(bed: Bed) -> None:
    call = bed.channel.unary_stream(STREAM)(b"", timeout=WAIT_S)
    await call.read()
    call.cancel()


async def _read(bed: Bed) -> None:
    call = bed.channel.unary_stream(STREAM)(b"", timeout=WAIT_S)
    assert len([reply async for reply in call]) == 100


async def _left_open(bed: Bed) -> None:
    call = bed.channel.stream_stream(BOTH)(timeout=WAIT_S)
    await call.write(b"")
    await call.read()
    call.cancel()


async def _fine(bed: Bed) -> None:
    await bed.call(UNARY)


@pytest.mark.parametrize(
    "end",
    [
        *(_cancelled, _late, _wrong, _broken, _noise, _oversize, _silent),
        *(_half_read, _read, _left_open, _fine),
    ],
)
def test_a_place_is_given_back_however_the_call_ends(end: Callable[[Bed], Awaitable[None]]) -> None:
    async def act(value: bytes) -> None:
        if value == b"wait":
            await asyncio.sleep(2 * WAIT_S)
        if value == b"wrong":
            raise InvalidInputError("no")
        if value == b"broken":
            raise ZeroDivisionError

    async def run() -> None:
        async with serving(act) as bed:
            for _ in range(3):  # One more than there are places.
                await end(bed)
                await bed.settled()
            await bed.call(UNARY)

    asyncio.run(run())


def test_the_work_of_who_has_left_is_cancelled() -> None:
    async def wait(_: bytes) -> None:
        await asyncio.sleep(2 * WAIT_S)

    async def run() -> None:
        async with serving(wait) as bed:
            call = bed.call(UNARY)
            await _until(lambda: bed.handlers.n_begun == 1)
            call.cancel()
            await _until(lambda: bed.handlers.cancelled == 1)

    asyncio.run(run())


def test_bytes_in_flight_are_bounded_and_what_waits_too_long_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "_WAIT_S", 0.2)
    # Those that are read make no room for those that wait, however slowly they come.
    monkeypatch.setattr(intake, "_PATIENCE_S", WAIT_S)

    async def run() -> None:
        gate = asyncio.Event()

        async def wait(_: bytes) -> None:
            await gate.wait()

        async with serving(wait, limit=20, max_bytes=3 * MESSAGE_BYTES) as bed:
            large = bytes(MESSAGE_BYTES - 100)
            calls = [asyncio.ensure_future(_outcome(bed.call(UNARY, large))) for _ in range(10)]
            await _until(lambda: sum(call.done() for call in calls) == 7)
            error = await _refused(bed.call(UNARY, large))
            assert "max_bytes_in_flight" in error.message
            assert bed.handlers.n_begun == 3
            assert 0 < bed.admission.intake.held_bytes <= 3 * MESSAGE_BYTES
            gate.set()
            outcomes = await asyncio.gather(*calls)
            assert outcomes.count(None) == 3
            assert outcomes.count("OverloadedError") == 7
            await bed.settled()
            monkeypatch.setattr(intake, "_WAIT_S", WAIT_S)
            await asyncio.gather(*(bed.call(UNARY, large) for _ in range(12)))
            await bed.settled()

    asyncio.run(run())


async def _outcome(call: Any) -> str | None:
    try:
        await call
    except grpc.RpcError as failure:
        return type(error_of_call(failure)).__name__
    return None


def test_who_sends_slowly_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(intake, "_WAIT_S", WAIT_S)

    async def run() -> None:
        async with serving(limit=20, max_bytes=2 * MESSAGE_BYTES) as bed:
            silent = [bed.channel.stream_unary(UNARY)(timeout=2 * WAIT_S) for _ in range(2)]
            await _until(lambda: bed.admission.intake.n_reading == 2)
            await bed.call(UNARY)
            # Both have had their time: the other one is cut, too, if it is looked at just then.
            assert 1 <= bed.admission.lanes[UNARY].n_cut <= 2
            for call in silent:
                call.cancel()
            await bed.settled()

    asyncio.run(run())


def test_a_request_that_does_not_come_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_OVERTIME_S", WAIT_S)  # The sweep is not to come before.

    async def run() -> None:
        async with serving(max_bytes=MESSAGE_BYTES, request_s=0.3) as bed:
            # Of the last places, so somebody looks; no deadline, so nobody else ends it.
            error = await _refused(bed.channel.stream_unary(UNARY)())
            assert "too slowly" in error.message
            await bed.settled()

    asyncio.run(run())


@pytest.fixture
def often_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_SWEEP_S", 0.05)


@pytest.mark.usefixtures("often_swept")
def test_a_reply_that_is_not_read_ends() -> None:
    async def run() -> None:
        async with serving(max_bytes=MESSAGE_BYTES, default_deadline_s=0.3) as bed:
            stream = bed.channel.unary_stream(STREAM)
            call = stream(BytesValue(value=bytes(MESSAGE_BYTES // 2)).SerializeToString())
            await call.read()
            await bed.settled()
            assert bed.admission.lanes[STREAM].n_cut == 1
            call.cancel()

    asyncio.run(run())


def test_what_comes_after_its_deadline_is_not_begun() -> None:
    async def run() -> None:
        async with serving() as bed:
            lane = bed.admission.lanes[UNARY]

            class Late:
                def time_remaining(self) -> float:
                    return -0.1

            async def arrive() -> None:
                call = bed.admission.admit(lane)
                with pytest.raises(Exception, match="before the call was begun"):
                    bed.admission.begin(call, Late())  # type: ignore[arg-type]

            await asyncio.create_task(arrive())
            assert lane.n_expired == 1
            await bed.settled()

    asyncio.run(run())


def test_limits_are_read_and_checked() -> None:
    assert method_limits.parse("") == {}
    assert method_limits.parse("Search=256, Encode = 512,") == {"Search": 256, "Encode": 512}
    for wrong in ("Search", "Search=0", "Search=-1", "=3", "Search=many"):
        with pytest.raises(InvalidInputError):
            method_limits.parse(wrong)


def _contract() -> Iterator[tuple[str, Any, Any]]:
    from encoder_service.method_limits import METHOD_LIMITS as OF_ENCODER
    from hashlens.v1 import encoder_service_pb2 as enc
    from hashlens.v1 import replica_service_pb2 as rpb
    from hashlens.v1 import search_service_pb2 as spb
    from search_service.method_limits import METHOD_LIMITS as OF_SEARCH

    yield "EncoderService", enc, OF_ENCODER
    yield "SearchService", spb, OF_SEARCH
    yield "ReplicaService", rpb, OF_SEARCH


def test_each_method_of_the_contract_has_a_limit() -> None:
    known: dict[int, set[str]] = {}
    for name, module, limits in _contract():
        paths = method_limits.resolve([f"hashlens.v1.{name}"], limits, {})
        methods = module.DESCRIPTOR.services_by_name[name].methods_by_name
        assert set(paths) == {f"/hashlens.v1.{name}/{method}" for method in methods}
        known.setdefault(id(limits), set()).update(methods)
        assert set(limits) >= set(methods)
    for _, _, limits in _contract():
        assert set(limits) == known[id(limits)]
    name, _, limits = list(_contract())[1]
    with pytest.raises(InvalidInputError, match="no method Serch here, but"):
        method_limits.resolve([f"hashlens.v1.{name}"], limits, {"Serch": 1})


def test_requests_of_methods_without_a_limit_are_read_in_turn_and_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "_WAIT_S", WAIT_S)

    async def run() -> None:
        async with serving() as bed:
            turns = bed.admission.free_intake
            silent = [bed.channel.stream_unary(FREE)(timeout=2 * WAIT_S) for _ in range(4)]
            await _until(lambda: turns.n_reading == 4)
            assert turns.held_bytes == turns.max_bytes
            # Whoever waits is not kept for long by those who do not send.
            await bed.call(FREE)
            assert bed.admission.free.n_cut
            for call in silent:
                call.cancel()
            assert await _outcome(bed.call(FREE, bytes(1 << 17))) == "InvalidInputError"
            await _until(lambda: not turns.held_bytes and not bed.admission.free.in_flight)

    asyncio.run(run())


async def _read_out(running: Any) -> None:
    while await running.read() is not grpc.aio.EOF:
        pass


@pytest.mark.usefixtures("often_swept")
def test_who_is_cut_is_told_of_its_own_call() -> None:
    async def run() -> None:
        async with serving(limit=3, default_deadline_s=0.3, named=True) as bed:
            stream = bed.channel.unary_stream(STREAM)
            data = BytesValue(value=bytes(MESSAGE_BYTES // 2)).SerializeToString()
            calls = {
                name: stream(data, metadata=[(call.REQUEST_ID, name)]) for name in ("one", "two")
            }
            for running in calls.values():
                await running.read()
            await bed.settled()
            for name, running in calls.items():
                with pytest.raises(grpc.RpcError) as caught:
                    await _read_out(running)
                assert isinstance(error_of_call(caught.value), DeadlineError)
                trailing = dict(await running.trailing_metadata())
                assert trailing[call.REQUEST_ID] == name

    asyncio.run(run())


@pytest.mark.usefixtures("often_swept")
@pytest.mark.parametrize("method", [UNARY, STREAM])
def test_who_does_not_send_is_told_also_where_places_are_many(method: str) -> None:
    async def run() -> None:
        async with serving(request_s=0.2) as bed:
            with pytest.raises(grpc.RpcError, match="did not come in time"):
                await bed.channel.stream_unary(method)(timeout=2 * WAIT_S)
            assert bed.admission.lanes[method].n_cut == 1
            assert (
                await _outcome(bed.channel.stream_unary(method)(iter(()), timeout=WAIT_S))
                == "InvalidInputError"
            )
            await bed.settled()

    asyncio.run(run())
