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


_HEALTH = "/grpc.health."


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status, and logs what was not meant to happen."""

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
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(_reading(handler.stream_unary, parse), method, None), None, serialize
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
                _log(method, error, started_ns)
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
                _log(method, error, started_ns)
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


def _log(method: str, error: Exception, started_ns: int) -> None:
    if isinstance(error, NotImplementedError | CancelledError):
        return
    if isinstance(error, UnavailableError) and error.elsewhere:
        # A start or a stop is no fault; and what is refused before anybody looks at it, a name of
        # a method that we do not have included, is not for the log.
        return
    spent_ms = (time.monotonic_ns() - started_ns) / 1e6
    if not isinstance(error, HashlensError):
        logger.error("%s failed after %.1f ms", method, spent_ms, exc_info=error)
    elif not error.is_input_error:
        logger.warning(
            "%s: %s after %.1f ms: %s", method, type(error).__name__, spent_ms, error.message
        )


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
