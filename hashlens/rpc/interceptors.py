"""What happens around every call of a server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from hashlens.errors import CancelledError, HashlensError, UnavailableError
from hashlens.rpc import status
from hashlens.rpc.decoding import parsed
from hashlens.rpc.refusal import Handler as _Handler
from hashlens.rpc.refusal import refusing

logger = logging.getLogger(__name__)


_REPEAT_S = 10.0
"""What goes wrong again and again is logged once, and then summed up this often, in seconds."""

_MAX_KINDS = 1000

_HEALTH = "/grpc.health."


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status, and logs what was not meant to happen."""

    def __init__(self) -> None:
        self._log = _ErrorLog()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method, parse), None, serialize
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method, parse), None, serialize
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(_reading(handler.stream_stream, parse), method, None), None, serialize
            )
        return handler

    def _unary(
        self, behaviour: Callable[..., Any], method: str, parse: Callable[[bytes], Any] | None
    ) -> Callable[..., Any]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started_ns = time.monotonic_ns()
            try:
                return await behaviour(parsed(parse, request), context)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                self._log.note(method, error, started_ns)
                return await status.abort(context, error)

        return guarded

    def _stream(
        self, behaviour: Callable[..., Any], method: str, parse: Callable[[bytes], Any] | None
    ) -> Callable[..., Any]:
        async def guarded(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            started_ns = time.monotonic_ns()
            try:
                async for reply in behaviour(parsed(parse, request), context):
                    yield reply
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                self._log.note(method, error, started_ns)
                await status.abort(context, error)

        return guarded


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAVAILABLE until it is opened and after it is closed; health is exempt."""

    def __init__(self) -> None:
        self._refusal: _Handler | None = refusing(
            lambda: UnavailableError(
                "the service is warming up: try again in a few seconds", elsewhere=True
            )
        )

    @property
    def is_open(self) -> bool:
        """Whether calls pass."""
        return self._refusal is None

    def open(self) -> None:
        """Let calls pass from now on."""
        self._refusal = None

    def close(self) -> None:
        """Refuse calls from now on; those that have begun go on."""
        self._refusal = refusing(
            lambda: UnavailableError(
                "the service is stopping: try another, or again later", elsewhere=True
            )
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Pass the call on, or refuse it."""
        if self._refusal is not None and not handler_call_details.method.startswith(_HEALTH):
            return self._refusal
        return await continuation(handler_call_details)


class _ErrorLog:
    """Logs what went wrong: each kind once, its repetitions as a number every now and then."""

    def __init__(self) -> None:
        self._more: dict[tuple[str, type[Exception]], int] = {}

    def note(self, method: str, error: Exception, started_ns: int) -> None:
        """Log an error, or count it."""
        if isinstance(error, NotImplementedError | CancelledError):
            return
        spent_ms = (time.monotonic_ns() - started_ns) / 1e6
        if not isinstance(error, HashlensError):
            logger.error("%s failed after %.1f ms", method, spent_ms, exc_info=error)
            return
        if error.is_input_error:
            return
        kind = (method, type(error))
        if kind in self._more:
            self._more[kind] += 1
            return
        if len(self._more) < _MAX_KINDS:  # A stranger may make up names of methods.
            self._more[kind] = 0
            asyncio.get_running_loop().call_later(_REPEAT_S, self._sum_up, kind)
        logger.warning(
            "%s: %s after %.1f ms: %s", method, type(error).__name__, spent_ms, error.message
        )

    def _sum_up(self, kind: tuple[str, type[Exception]]) -> None:
        n = self._more.pop(kind)
        if n:
            method, error = kind
            logger.warning("%s: %s, %d times more in %g s", method, error.__name__, n, _REPEAT_S)
            # One that goes on is not news: only its number is.
            self._more[kind] = 0
            asyncio.get_running_loop().call_later(_REPEAT_S, self._sum_up, kind)


def _reading(
    behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None
) -> Callable[..., Any]:
    """Have a handler of many requests read them through `parse`, and refuse what is none."""

    async def each(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in requests:
            request = parsed(parse, data)
            # One that is large is not kept until the next has come.
            del data
            yield request
            del request

    return lambda requests, context: behaviour(each(requests), context)
