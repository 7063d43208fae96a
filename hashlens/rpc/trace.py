"""W3C trace context: which trace a call belongs to, and who called.

The headers are read as https://www.w3.org/TR/trace-context/ defines them. What is malformed is
treated as absent: a stranger's header never fails a call.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

SAMPLED = 0x01
"""Flag: whoever called records this trace."""

_KNOWN_FLAGS = 0x03
"""Sampled, and that the trace id is random; others have no meaning yet."""

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[^\s]*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16

_MAX_MEMBERS = 32
_MAX_STATE_CHARS = 512
_MEMBER = re.compile(
    r"(?:[a-z0-9][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A place in a trace: what is called from there names it as its parent."""

    trace_id: str
    """32 hexadecimal digits, not all 0."""
    span_id: str
    """Of the caller's span, 16 hexadecimal digits, not all 0."""
    flags: int = 0
    state: str = ""
    """What tracing systems along the way keep for themselves: ``key=value,key=value``."""

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records the trace."""
        return bool(self.flags & SAMPLED)

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that carries this place."""
        parent = (TRACEPARENT, f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}")
        return (parent, (TRACESTATE, self.state)) if self.state else (parent,)


def new_trace() -> TraceContext:
    """Return the beginning of a trace that nobody records."""
    return TraceContext(
        # Zero is no id.
        f"{random.getrandbits(128) or 1:032x}",
        f"{random.getrandbits(64) or 1:016x}",
    )


def read(parents: Iterable[str], states: Iterable[str] = ()) -> TraceContext | None:
    """Return the caller's place in its trace; None if it sent none, or nothing that is valid.

    Parameters
    ----------
    parents
        Values of all ``traceparent`` headers; more than one is not valid.
    states
        Values of all ``tracestate`` headers, in order. What is malformed among them costs the
        states only.
    """
    found = list(parents)
    match = _PARENT.fullmatch(found[0]) if len(found) == 1 else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    if version == "00" and more is not None:
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & _KNOWN_FLAGS, _state(states))


def _state(states: Iterable[str]) -> str:
    members = [part.strip(" \t") for value in states for part in value.split(",")]
    members = [member for member in members if member]
    keys = {member.partition("=")[0] for member in members}
    if (
        len(members) > _MAX_MEMBERS
        or len(keys) < len(members)
        or not all(map(_MEMBER.fullmatch, members))
    ):
        return ""
    while len(state := ",".join(members)) > _MAX_STATE_CHARS:
        members.pop()  # The last one was there first: who passed it on most recently comes first.
    return state
