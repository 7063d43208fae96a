"""The call that this code runs for: its request id, its trace, what became of it so far.

`hashlens.rpc.telemetry` begins and ends it. It lives in a context variable, so it follows tasks and
`asyncio.to_thread`; another thread sees it where the context was copied to it.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from hashlens.rpc import trace
from hashlens.rpc.trace import TraceContext

REQUEST_ID = "x-request-id"
"""Metadata by which a caller names its call, and the server says how it was named."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,63}")


class Span(Protocol):
    """What is recorded of a call or a part of it."""

    @property
    def context(self) -> TraceContext:
        """Its place in the trace."""

    @property
    def is_recording(self) -> bool:
        """Whether it is one of the sample."""

    def begin(self, name: str) -> Span:
        """Begin a part in which another service is called."""

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """Add a part that is over, by the clock of `time.time_ns`."""

    def end(self, code: str, attributes: dict[str, str | int]) -> None:
        """End it with a status code's name."""


class Call:
    """One call that is being answered."""

    __slots__ = ("_place", "began_ns", "error", "method", "request_id", "span")

    def __init__(
        self, method: str, request_id: str, place: TraceContext | None, span: Span | None = None
    ) -> None:
        self.method = method
        """Service and method, ``SearchService/Search``; ``other`` if the server has none such."""
        self.request_id = request_id
        self._place = place
        self.span = span
        """None: no spans are exported."""
        self.began_ns = time.monotonic_ns()
        self.error = ""
        """Kind of the error that was answered, such as ``overloaded``."""

    @property
    def trace(self) -> TraceContext:
        """What is called from here names this as its parent; a new trace if none was joined."""
        if self._place is None:  # Not made before somebody asks: most calls log and call nothing.
            self._place = trace.new_trace()
        return self._place

    def note_stages(self, stages: Iterable[tuple[str, int]]) -> None:
        """Record stages that followed each other and end now, each with its nanoseconds."""
        if self.span is None or not self.span.is_recording:
            return
        end_ns = time.time_ns()
        for name, took_ns in reversed(list(stages)):
            if took_ns:
                self.span.add(name, end_ns - took_ns, end_ns)
                end_ns -= took_ns


_current: ContextVar[Call | None] = ContextVar("hashlens-call", default=None)
_joined: ContextVar[TraceContext | None] = ContextVar("hashlens-trace", default=None)


def current() -> Call | None:
    """Return the call that this code runs for; None outside of one."""
    return _current.get()


def enter(call: Call) -> None:
    """Make a call the current one, for the rest of this task."""
    _current.set(call)


def request_id_of(given: str | None) -> str:
    """Return a caller's request id if it is 1 to 64 harmless characters, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"{random.getrandbits(64):016x}"


@contextmanager
def joined(place: TraceContext) -> Iterator[None]:
    """Have the calls that clients make in the block carry a place in a trace.

    For programs without OpenTelemetry; where that is loaded, clients take its current span.
    """
    token = _joined.set(place)
    try:
        yield
    finally:
        _joined.reset(token)


def outgoing() -> tuple[tuple[str, str], ...]:
    """Return the metadata that takes request id and trace along to another service."""
    call = _current.get()
    if call is not None:
        return ((REQUEST_ID, call.request_id), *call.trace.headers())
    place = _joined.get() or _active_elsewhere()
    return () if place is None else place.headers()


@contextmanager
def calling(name: str) -> Iterator[None]:
    """Record the block as a part of the current call in which another service is called."""
    call = _current.get()
    if call is None or call.span is None or not call.span.is_recording:
        yield
        return
    part = call.span.begin(name)
    inner = Call(call.method, call.request_id, part.context, part)
    token = _current.set(inner)
    code = "UNKNOWN"
    try:
        yield
        code = "OK"
    finally:
        part.end(code, {})
        _current.reset(token)


def _active_elsewhere() -> TraceContext | None:
    """Return where a program that uses OpenTelemetry is in its trace."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace import get_current_span

    place = get_current_span().get_span_context()
    if not place.is_valid:
        return None
    parent = f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags & 0xFF:02x}"
    return trace.read([parent], [place.trace_state.to_header()])
