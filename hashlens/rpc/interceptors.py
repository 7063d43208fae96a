"""What happens around every call of a server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hashlens.errors import CancelledError, HashlensError, InvalidInputError, UnavailableError
from hashlens.rpc import status
from hashlens.rpc.refusal import Handler as _Handler
from hashlens.rpc.refusal import refusing

logger = logging.getLogger(__name__)


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
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method),
                _tolerant(handler.request_deserializer),
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method),
                _tolerant(handler.request_deserializer),
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(
                    _reading(handler.stream_stream, _tolerant(handler.request_deserializer)), method
                ),
                None,
                handler.response_serializer,
            )
        return handler


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAVAILABLE until it is opened and after it is closed; health is exempt."""

    def __init__(self) -> None:
        self._refusal: _Handler | None = refusing(
            lambda: UnavailableError("the service is warming up: try again in a few seconds")
        )

    def open(self) -> None:
        """Let calls pass from now on."""
        self._refusal = None

    def close(self) -> None:
        """Refuse calls from now on; those that have begun go on."""
        self._refusal = refusing(
            lambda: UnavailableError("the service is stopping: try another, or again later")
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Pass the call on, or refuse it."""
        is_health = handler_call_details.method.startswith("/grpc.health.")
        if self._refusal is not None and not is_health:
            return self._refusal
        return await continuation(handler_call_details)


_UNREADABLE = object()
"""Stands for a request whose bytes are no message of the call."""


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Let the handler refuse what cannot be read; gRPC would call it UNKNOWN, with a traceback."""
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _UNREADABLE

    return parse


def _reading(
    behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None
) -> Callable[..., Any]:
    """Have a handler of many requests read them through `parse`, and refuse what is none."""

    async def each(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in requests:
            request = data if parse is None else parse(data)
            # One that is large is not kept until the next has come.
            del data
            _check_readable(request)
            yield request
            del request

    return lambda requests, context: behaviour(each(requests), context)


def _check_readable(request: Any) -> None:
    if request is _UNREADABLE:
        raise InvalidInputError("the request's bytes are no message of this call: check the proto")


def _guard_unary(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        started_ns = time.monotonic_ns()
        try:
            _check_readable(request)
            return await behaviour(request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            _log(method, error, started_ns)
            return await status.abort(context, error)

    return guarded


def _guard_stream(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def guarded(
        request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        started_ns = time.monotonic_ns()
        try:
            _check_readable(request)
            async for reply in behaviour(request, context):
                yield reply
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            _log(method, error, started_ns)
            await status.abort(context, error)

    return guarded


def _log(method: str, error: Exception, started_ns: int) -> None:
    spent_ms = (time.monotonic_ns() - started_ns) / 1e6
    if isinstance(error, NotImplementedError):
        return
    if not isinstance(error, HashlensError):
        logger.error("%s failed after %.1f ms", method, spent_ms, exc_info=error)
    elif not error.is_input_error and not isinstance(error, CancelledError):
        logger.warning(
            "%s: %s after %.1f ms: %s", method, type(error).__name__, spent_ms, error.message
        )
