"""How each call meets `hashlens.rpc.admission`: let in, refused, and its request read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc

from hashlens.errors import HashlensError, InvalidInputError, OverloadedError
from hashlens.rpc.admission import Admission, AdmittedCall, Context, Lane
from hashlens.rpc.decoding import parsed
from hashlens.rpc.refusal import Handler, refusing

_FREE_BYTES: Final = 1 << 16
"""Longest of them that is taken."""


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


def _streaming(admission: Admission, call: AdmittedCall, handler: Any) -> Handler:
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
    call: AdmittedCall
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
