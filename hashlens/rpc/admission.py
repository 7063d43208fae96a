"""Admission: so many calls of a method at a time, so many bytes of requests; what is too much is
refused at once, before its request is read.

A place is taken when a call arrives and given back when its task ends, however it ends: answered,
failed, aborted, cancelled by its caller, or never begun because its request did not come.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

import grpc

from hashlens.errors import DeadlineError, HashlensError, InvalidInputError, OverloadedError
from hashlens.rpc import status
from hashlens.rpc.decoding import parsed
from hashlens.rpc.intake import Intake
from hashlens.rpc.refusal import Handler, refusing

Context = grpc.aio.ServicerContext[Any, Any]

_RETRY_S: Final = (0.05, 10.0)
"""Soonest and latest that a refused caller is told to come back."""

_SWEEP_S: Final = 1.0
"""Between two looks at calls that nothing else would end."""

_OVERTIME_S: Final = 2.0
"""Beyond its deadline, for a handler that ends by itself to do so."""

_FREE_READS: Final = 4
"""Requests of methods without a limit that are read at a time. They come from anybody, each may be
as long as a message can be, and an honest one is read at once."""

_FREE_BYTES: Final = 1 << 16
"""Longest of them that is taken."""

_FREE_PATIENCE_S: Final = 0.25
"""How long such a request may take while others wait for its turn."""


@dataclass(slots=True, eq=False)
class Lane:
    """One method: its limit and what has become of its calls."""

    method: str
    """Full path."""
    max_in_flight: int
    has_end: bool = True
    """Whether a call whose client sets no deadline gets the default one."""
    in_flight: int = 0
    """Calls that have been admitted and are not over."""
    n_admitted: int = 0
    n_refused: int = 0
    """Calls that met a full house."""
    n_expired: int = 0
    """Calls whose deadline had passed when their request was there."""
    n_cut: int = 0
    """Calls that were ended because their caller did not send, or did not read."""
    mean_s: float = 0.05
    """How long a call takes, a moving average."""

    chance: random.Random = field(default_factory=random.Random, repr=False)

    def retry_after_s(self) -> float:
        """Return when to come back: about when the calls of now are done, not all at once."""
        soonest_s, latest_s = _RETRY_S
        mean_s = self.mean_s * self.chance.uniform(0.5, 1.5)
        return round(min(max(mean_s, soonest_s), latest_s), 3)


@dataclass(slots=True, eq=False)
class _Call:
    """A call that has been admitted."""

    lane: Lane
    task: asyncio.Task[Any]
    began_s: float
    ends_s: float
    """When it is ended whatever it does; on the clock of `time.monotonic`."""
    around: contextvars.Context
    """The context variables of its task."""
    context: Context | None = None
    has_begun: bool = False
    """Whether its request is there."""


@dataclass(eq=False)
class Admission:
    """Who is let in.

    Parameters
    ----------
    limits
        Calls of each method at a time, by full path. Other methods are always let in: health. A
        few of their requests are read at a time, beside those that `intake` counts.
    intake
        How many bytes of requests.
    request_s
        Longest for a request to arrive, in seconds.
    default_deadline_s
        Time of a call whose client sets none.
    """

    limits: Mapping[str, int]
    intake: Intake
    request_s: float
    default_deadline_s: float
    lanes: dict[str, Lane] = field(init=False)
    """By full path."""
    free: Lane = field(init=False)
    """Stands for all other methods."""
    free_intake: Intake = field(init=False)
    _calls: set[_Call] = field(init=False, default_factory=set)
    _cutting: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _is_sweeping: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.lanes = {method: Lane(method, limit) for method, limit in self.limits.items()}
        self.free = Lane("/other", sys.maxsize, has_end=False)
        message_bytes = self.intake.max_message_bytes
        self.free_intake = Intake(
            max_bytes=_FREE_READS * message_bytes,
            max_message_bytes=message_bytes,
            request_s=self.request_s,
            patience_s=_FREE_PATIENCE_S,
        )

    def admit(self, lane: Lane) -> _Call:
        """Take a place for the running task, until it ends."""
        task = asyncio.current_task()
        assert task is not None
        began_s = time.monotonic()
        ends_s = began_s + self.request_s + _OVERTIME_S
        call = _Call(lane, task, began_s, ends_s, contextvars.copy_context())
        lane.in_flight += 1
        lane.n_admitted += 1
        self._calls.add(call)
        task.add_done_callback(lambda _: self._over(call))
        if not self._is_sweeping:
            self._is_sweeping = True
            # It is not this call's: what it does for others must not be told of this one.
            asyncio.get_running_loop().call_later(
                _SWEEP_S, self._sweep, context=contextvars.Context()
            )
        return call

    def begin(self, call: _Call, context: Context) -> None:
        """Note that a call's request is there.

        Raises
        ------
        DeadlineError
            Too late for anybody.
        """
        call.context = context
        call.has_begun = True
        # None, whatever the stubs say, when the client set no deadline.
        left_s = cast(float | None, context.time_remaining())
        if left_s is not None and left_s <= 0:
            call.lane.n_expired += 1
            raise DeadlineError("the deadline passed before the call was begun")
        if left_s is None:
            left_s = self.default_deadline_s if call.lane.has_end else float("inf")
        call.ends_s = time.monotonic() + left_s + _OVERTIME_S

    def begin_stream(self, call: _Call, context: Context) -> None:
        """Note that a call is one of many requests, which says itself when it has waited enough."""
        call.context = context
        call.ends_s = float("inf")

    def _over(self, call: _Call) -> None:
        self._calls.discard(call)
        lane = call.lane
        lane.in_flight -= 1
        lane.mean_s += (time.monotonic() - call.began_s - lane.mean_s) / 16

    def _sweep(self) -> None:
        """End the calls that have outlived their time: whose caller takes no reply, say."""
        now_s = time.monotonic()
        for call in [call for call in self._calls if call.ends_s <= now_s]:
            call.ends_s = float("inf")
            call.lane.n_cut += 1
            if call.context is None:
                call.task.cancel()
            else:
                cutting = asyncio.create_task(
                    _cut(call.context, call.task, has_begun=call.has_begun), context=call.around
                )
                self._cutting.add(cutting)
                cutting.add_done_callback(self._cutting.discard)
        self._is_sweeping = bool(self._calls)
        if self._is_sweeping:
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)


async def _cut(context: Context, task: asyncio.Task[Any], *, has_begun: bool) -> None:
    """End a call from outside: its caller is told, should it ever read again."""
    error = DeadlineError(
        "the call was over time, and its caller did not read: allow it more"
        if has_begun
        else "the request did not come in time: send it faster, or less of it"
    )
    told = asyncio.ensure_future(status.abort(context, error))
    await asyncio.wait([told], timeout=_OVERTIME_S)
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        told.cancel()
        await told


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of methods that have as many in the works as they may.

    Parameters
    ----------
    admission
        Who is let in.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._refusals = {
            method: refusing(lambda lane=lane: _full(lane))  # type: ignore[misc]
            for method, lane in admission.lanes.items()
        }
        self._refusals_of_bytes = {
            method: refusing(lambda lane=lane: _no_room(lane))  # type: ignore[misc]
            for method, lane in admission.lanes.items()
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Let a call in, or refuse it."""
        admission = self._admission
        method = handler_call_details.method
        lane = admission.lanes.get(method)
        if lane is None:
            return _free(admission, await continuation(handler_call_details))
        if lane.in_flight >= lane.max_in_flight:
            lane.n_refused += 1
            return self._refusals[method]
        call = admission.admit(lane)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.request_streaming:
            return _streaming(admission, call, handler)
        place = admission.intake.place()
        if place is None:
            place = await admission.intake.waited_place()
        if place is None:
            lane.n_refused += 1
            return self._refusals_of_bytes[method]
        call.task.add_done_callback(lambda _: place.leave())
        one = _One(admission, call, handler, place.filled)
        # Waiting for the sweep costs less than looking for oneself, and does where places are many.
        return one.reading(place.cut_s if place.is_scarce else None)


def _free(admission: Admission, handler: Handler | None) -> Handler | None:
    """Return a handler of a method without a limit that waits for its turn to read."""
    if handler is None or handler.request_streaming:
        return handler

    async def stream(requests: Any, context: Context) -> AsyncIterator[Any]:
        place = admission.free_intake.place() or await admission.free_intake.waited_place()
        if place is None:
            raise OverloadedError("too many requests are on their way: come back later")
        call = admission.admit(admission.free)
        call.task.add_done_callback(lambda _: place.leave())

        def read(n_bytes: int) -> None:
            place.leave()  # What is short does not count, however long its call goes on.
            if n_bytes > _FREE_BYTES:
                raise InvalidInputError(f"a request of this call has at most {_FREE_BYTES} bytes")

        one = _One(admission, call, handler, read)
        async for reply in one.replies(context, place.cut_s):
            yield reply

    return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)


def _full(lane: Lane) -> HashlensError:
    return OverloadedError(
        f"{lane.max_in_flight} calls of {lane.method.rpartition('/')[2]} are in the works, as many "
        "as may be (method_limits): come back later, or ask another replica",
        retry_after_s=lane.retry_after_s(),
    )


def _no_room(lane: Lane) -> HashlensError:
    return OverloadedError(
        "the requests that are read or in the works hold all bytes that they may "
        "(max_bytes_in_flight): come back later, or ask another replica",
        retry_after_s=lane.retry_after_s(),
    )


def _streaming(admission: Admission, call: _Call, handler: Any) -> Handler:
    """Return a handler of many requests that is known to have begun."""

    async def stream(requests: Any, context: Context) -> AsyncIterator[Any]:
        admission.begin_stream(call, context)
        async for reply in handler.stream_stream(requests, context):
            yield reply

    return grpc.stream_stream_rpc_method_handler(
        stream, handler.request_deserializer, handler.response_serializer
    )


@dataclass(slots=True, eq=False)
class _One:
    """A handler of one request."""

    admission: Admission
    call: _Call
    handler: Any
    """The stubs know handlers of the other kind of server only."""
    filled: Callable[[int], None]
    """Told how long the request is."""

    def reading(self, cut_s: Callable[[], float] | None) -> Handler:
        """Return a handler of the kind that reads by itself, and parses by itself.

        gRPC reads the request of the other kind, and nobody can end that: neither would its caller
        be told nor what is there of the request be let go.

        Parameters
        ----------
        cut_s
            How much longer to wait for the request, asked for again and again; None: until the
            sweep ends the call.
        """
        serialize = self.handler.response_serializer
        if self.handler.response_streaming:

            def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
                return self.replies(context, cut_s)

            return grpc.stream_stream_rpc_method_handler(stream, None, serialize)

        async def single(requests: AsyncIterator[Any], context: Context) -> Any:
            return await self._reply(await self._read(context, cut_s), context)

        return grpc.stream_unary_rpc_method_handler(single, None, serialize)

    async def replies(
        self, context: Context, cut_s: Callable[[], float] | None
    ) -> AsyncIterator[Any]:
        """Yield the replies; see `reading`."""
        data = await self._read(context, cut_s)
        if self.handler.response_streaming:
            async for reply in self._replies(data, context):
                yield reply
        else:
            yield await self._reply(data, context)

    async def _read(self, context: Context, cut_s: Callable[[], float] | None) -> bytes:
        self.call.context = context
        data = await (context.read() if cut_s is None else self._read_soon(context, cut_s))
        if data is grpc.aio.EOF:
            raise InvalidInputError("the call ended before its request was there: send one")
        return cast(bytes, data)

    async def _read_soon(self, context: Context, cut_s: Callable[[], float]) -> Any:
        reading = asyncio.ensure_future(context.read())
        try:
            while (left_s := cut_s()) > 0:
                done, _ = await asyncio.wait([reading], timeout=min(left_s, 0.25))
                if done:
                    return reading.result()
            self.call.lane.n_cut += 1
            raise OverloadedError(
                "the request came too slowly, and others wait to send theirs: send it again",
                retry_after_s=self.call.lane.retry_after_s(),
            )
        finally:
            reading.cancel()

    async def _reply(self, data: bytes, context: Context) -> Any:
        self.filled(len(data))
        self.admission.begin(self.call, context)
        request = parsed(self.handler.request_deserializer, data)
        del data
        return await self.handler.unary_unary(request, context)

    async def _replies(self, data: bytes, context: Context) -> AsyncIterator[Any]:
        self.filled(len(data))
        self.admission.begin(self.call, context)
        request = parsed(self.handler.request_deserializer, data)
        del data
        async for reply in self.handler.unary_stream(request, context):
            yield reply
