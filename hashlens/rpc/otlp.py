"""Spans to an OpenTelemetry collector, by OTLP over gRPC. Needs the extra ``otel``.

Spans wait in a bounded queue, and a thread sends them; those that do not fit are dropped, so a
collector that is away costs a warning and no call anything.
"""

from __future__ import annotations

import threading

import grpc

from hashlens import __version__
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.rpc.trace import TraceContext

try:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags, TraceState
except ImportError as _error:
    raise PreconditionError(
        f"otlp_endpoint is set, and OpenTelemetry is not installed ({_error}). Install "
        "hashlens[otel], or leave the endpoint out."
    ) from None

_TIMEOUT_S = 3.0
"""Longest for one batch of spans to be taken, and for all that are left at the end."""

_MAX_WAITING = 4096
_MAX_BATCH = 512
_DELAY_MS = 1000

_SERVERS_FAULT = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
"""Statuses that mark a server's span as failed, by OpenTelemetry's conventions for gRPC."""


class Spans:
    """Records the calls of one server, or a sample of them.

    Parameters
    ----------
    endpoint
        ``http://host:port`` of a collector, or ``https://`` for TLS.
    service
        Full name of the gRPC service that the spans are of.
    sample_ratio
        Share of the traces begun here that are recorded, 0 to 1. What a caller has decided holds.
    """

    def __init__(self, endpoint: str, *, service: str, sample_ratio: float) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise InvalidInputError(
                f"otlp_endpoint is http://host:port or https://host:port, not {endpoint!r}",
                field="otlp_endpoint",
            )
        exporter = OTLPSpanExporter(
            endpoint, insecure=endpoint.startswith("http://"), timeout=_TIMEOUT_S
        )
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.version": __version__}),
            sampler=ParentBasedTraceIdRatio(sample_ratio),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_MAX_WAITING,
                schedule_delay_millis=_DELAY_MS,
                max_export_batch_size=_MAX_BATCH,
            )
        )
        self._tracer = self._provider.get_tracer("hashlens", __version__)

    def begin(self, method: str, parent: TraceContext | None) -> OtelSpan:
        """Begin the span of a call.

        Parameters
        ----------
        method
            ``Service/Method``.
        parent
            Where the caller is in its trace; None begins one.
        """
        context = Context()
        if parent is not None:
            place = otel.SpanContext(
                int(parent.trace_id, 16),
                int(parent.span_id, 16),
                is_remote=True,
                trace_flags=TraceFlags(parent.flags),
                trace_state=TraceState.from_header([parent.state]) if parent.state else None,
            )
            context = otel.set_span_in_context(otel.NonRecordingSpan(place), context)
        span = self._tracer.start_span(method, context, kind=SpanKind.SERVER)
        service, _, name = method.partition("/")
        span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": name})
        return OtelSpan(self._tracer, span, "" if parent is None else parent.state)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        # It would wait for each batch by itself.
        ending = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        ending.start()
        ending.join(_TIMEOUT_S)


class OtelSpan:
    """A `hashlens.rpc.call.Span` that is exported.

    Parameters
    ----------
    tracer
        Begins its parts.
    span
        What it stands for.
    state
        The caller's ``tracestate``, passed on as it came.
    """

    def __init__(self, tracer: otel.Tracer, span: otel.Span, state: str) -> None:
        self._tracer = tracer
        self._span = span
        self._state = state

    @property
    def context(self) -> TraceContext:
        """Its place in the trace."""
        place = self._span.get_span_context()
        return TraceContext(
            f"{place.trace_id:032x}", f"{place.span_id:016x}", int(place.trace_flags), self._state
        )

    @property
    def is_recording(self) -> bool:
        """Whether it is one of the sample."""
        return self._span.is_recording()

    def begin(self, name: str) -> OtelSpan:
        """Begin a part in which another service is called."""
        span = self._tracer.start_span(name, self._inside(), kind=SpanKind.CLIENT)
        return OtelSpan(self._tracer, span, self._state)

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """Add a part that is over, by the clock of `time.time_ns`."""
        self._tracer.start_span(name, self._inside(), start_time=start_ns).end(end_ns)

    def end(self, code: str, attributes: dict[str, str | int]) -> None:
        """End it with a status code's name."""
        if self._span.is_recording():
            number = grpc.StatusCode[code].value[0]
            self._span.set_attributes({"rpc.grpc.status_code": number, **attributes})
            if code in _SERVERS_FAULT:
                self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()

    def _inside(self) -> Context:
        return otel.set_span_in_context(self._span, Context())
