"""What happens around every call of a server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from hashlens.errors import CancelledError, HashlensError, UnavailableError
from hashlens.rpc import status

logger = logging.getLogger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


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
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return handler


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAVAILABLE until it is opened; health is exempt."""

    def __init__(self) -> None:
        self._is_open = False

    def open(self) -> None:
        """Let calls pass from now on."""
        self._is_open = True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Pass the call on, or refuse it."""
        if not self._is_open and not handler_call_details.method.startswith("/grpc.health."):
            return _WARMING_UP
        return await continuation(handler_call_details)


async def _warming_up(_: Any, __: grpc.aio.ServicerContext[Any, Any]) -> Any:
    raise UnavailableError("the service is warming up: try again in a few seconds")


_WARMING_UP: _Handler = grpc.unary_unary_rpc_method_handler(_warming_up)


def _guard_unary(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        started_ns = time.monotonic_ns()
        try:
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
