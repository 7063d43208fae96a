"""What is known of every call: a name, a place in a trace, counts, latency, a line in the log.

The outermost interceptor: it sees the status that a caller gets, whoever decided on it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health

from hashlens.rpc import call, logs, trace
from hashlens.rpc.call import Call
from hashlens.rpc.metrics import Counter, Distribution, Gauge, Histogram, Metric, Number
from hashlens.rpc.metrics_http import Source
from hashlens.rpc.process import Process
from hashlens.rpc.refusal import Handler
from hashlens.rpc.server_config import ServerConfig

access_logger = logging.getLogger("hashlens.access")

OTHER = "other"
"""Stands for all methods that the server does not have: strangers must not make up labels."""

_LATE_S = 0.01
"""A call that gRPC ends with less time than this left was ended by its deadline."""

_Context = grpc.aio.ServicerContext[Any, Any]


class Telemetry(grpc.aio.ServerInterceptor):
    """Counts, names and traces calls; the first of a server's interceptors.

    Parameters
    ----------
    config
        Whether calls are logged, and where spans go.
    names
        Full names of the server's services.

    Raises
    ------
    PreconditionError
        Spans are to be exported, and what that needs is not installed.
    """

    def __init__(self, config: ServerConfig, names: Sequence[str]) -> None:
        self._logs_calls = config.access_log
        self._calls = Counter(
            "hashlens_rpc_calls", "Calls answered, by status.", ["method", "code"]
        )
        self._seconds = Histogram(
            "hashlens_rpc_seconds",
            "From a request's arrival to its last reply, as the server sees it.",
            ["method"],
        )
        self._in_flight = Gauge("hashlens_rpc_in_flight", "Calls being answered.", ["method"])
        self._refusals = Counter(
            "hashlens_rpc_refusals", "Calls answered with an error of ours.", ["method", "reason"]
        )
        self._methods = {
            method: _Method(label, self._seconds.of(label), self._in_flight.of(label))
            for method, label in _labels([*names, health.SERVICE_NAME])
        }
        self._other = _Method(OTHER, self._seconds.of(OTHER), self._in_flight.of(OTHER))
        self._process = Process()
        self._spans = None
        if config.otlp_endpoint:
            # Costs an import, and packages that are there only if they were asked for.
            from hashlens.rpc.otlp import Spans

            self._spans = Spans(
                config.otlp_endpoint,
                service=names[0],
                sample_ratio=config.trace_sample_ratio,
            )

    def collecting(self, *others: Source) -> Source:
        """Return what Prometheus is told: of calls, the process, and what others say."""

        def collect() -> Iterator[Metric]:
            for source in others:
                yield from source()
            for family in (self._calls, self._seconds, self._in_flight, self._refusals):
                yield family.collect()
            yield from logs.collect()
            yield from self._process.collect()

        return collect

    async def close(self) -> None:
        """Send the spans that are left; bounded."""
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Name the call, and wrap its handler."""
        method = self._methods.get(handler_call_details.method, self._other)
        now = self._begun(method.label, handler_call_details.invocation_metadata)
        # A task of its own runs each call, so this ends with it.
        call.enter(now)
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC answers it.
            method.in_flight.add()
            self._ended(now, method, "UNIMPLEMENTED", "")
            return None
        return self._wrapped(handler, now, method)

    def _begun(self, label: str, metadata: Iterable[tuple[str, str | bytes]]) -> Call:
        request_id = None
        parents: list[str] = []
        states: list[str] = []
        for key, value in metadata:
            if isinstance(value, str):
                if key == call.REQUEST_ID:
                    request_id = value
                elif key == trace.TRACEPARENT:
                    parents.append(value)
                elif key == trace.TRACESTATE:
                    states.append(value)
        parent = trace.read(parents, states) if parents else None
        request_id = call.request_id_of(request_id)
        if self._spans is None:
            # Passed on as it came: a span that nobody exports must not be anybody's parent.
            return Call(label, request_id, parent)
        span = self._spans.begin(label, parent)
        return Call(label, request_id, span.context, span)

    def _wrapped(self, handler: Handler, now: Call, method: _Method) -> Handler:
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._answering(handler.unary_unary, now, method, is_stream=False),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._answering(handler.unary_stream, now, method, is_stream=True),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._answering(handler.stream_stream, now, method, is_stream=True),
                handler.request_deserializer,
                handler.response_serializer,
            )
        assert handler.stream_unary is not None
        return grpc.stream_unary_rpc_method_handler(
            self._answering(handler.stream_unary, now, method, is_stream=False),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _answering(
        self, behaviour: Callable[..., Any], now: Call, method: _Method, *, is_stream: bool
    ) -> Callable[..., Any]:
        """Return a handler of the same kind, counted: one that yields, or one that is awaited."""

        def begin(context: _Context) -> None:
            method.in_flight.add()
            context.set_trailing_metadata(((call.REQUEST_ID, now.request_id),))

        def end(context: _Context, error: BaseException | None) -> None:
            peer = context.peer() if self._logs_calls else ""
            self._ended(now, method, _code_of(context, error), peer)

        if is_stream and inspect.isasyncgenfunction(behaviour):

            async def streaming(request: Any, context: _Context) -> AsyncIterator[Any]:
                begin(context)
                try:
                    async for reply in behaviour(request, context):
                        yield reply
                except BaseException as error:
                    end(context, error)
                    raise
                end(context, None)

            return streaming

        async def awaited(request: Any, context: _Context) -> Any:
            begin(context)
            try:
                reply = await behaviour(request, context)
            except BaseException as error:
                end(context, error)
                raise
            end(context, None)
            return reply

        return awaited

    def _ended(self, now: Call, method: _Method, code: str, peer: str) -> None:
        took_s = (time.monotonic_ns() - now.began_ns) / 1e9
        method.seconds.observe(took_s)
        counted = method.codes.get(code)
        if counted is None:
            counted = method.codes[code] = self._calls.of(method.label, code)
        counted.add()
        if now.error:
            self._refusals.of(method.label, now.error).add()
        method.in_flight.add(-1)  # Who sees none in flight finds all of them counted.
        if now.span is not None:
            now.span.end(code, {"hashlens.request_id": now.request_id})
        if self._logs_calls and not method.is_health:
            access_logger.info(
                "%s %s in %.1f ms",
                method.label,
                code,
                took_s * 1e3,
                extra={
                    "fields": {"code": code, "duration_ms": round(took_s * 1e3, 3), "peer": peer}
                },
            )


class _Method:
    """What is counted of one method."""

    __slots__ = ("codes", "in_flight", "is_health", "label", "seconds")

    def __init__(self, label: str, seconds: Distribution, in_flight: Number) -> None:
        self.label = label
        self.seconds = seconds
        self.in_flight = in_flight
        self.codes: dict[str, Number] = {}
        self.is_health = label.startswith("Health/")


def label_of(path: str) -> str:
    """Return what metrics and logs call the method of a full path: service and method."""
    return path.rpartition(".")[2]


def _labels(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Return the path and the label of each method of these services."""
    pool = descriptor_pool.Default()
    for name in names:
        service = pool.FindServiceByName(name)
        for method in service.methods:
            path = f"/{name}/{method.name}"
            yield path, label_of(path)


def _code_of(context: _Context, error: BaseException | None) -> str:
    """Return the name of the status that the caller gets."""
    code = cast(grpc.StatusCode | None, context.code())  # None, whatever the stubs say: not set.
    if code is not None:
        return code.name
    if error is None:
        return grpc.StatusCode.OK.name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        # gRPC cancels the handler for both.
        left_s = cast(float | None, context.time_remaining())
        is_late = left_s is not None and left_s < _LATE_S
        return (grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED).name
    return grpc.StatusCode.UNKNOWN.name
