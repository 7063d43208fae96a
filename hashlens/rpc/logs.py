"""Logs: one line an event, for people or for machines; each says which call it belongs to.

What a caller sends is never part of a line, but for what an error message quotes of it. Line breaks
in a message are written as ``\\n``, so nobody can make a line up.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal

from hashlens.rpc import call
from hashlens.rpc.metrics import CounterMetricFamily, Metric

LogFormat = Literal["text", "json"]

LOG_BURST = 20
"""Default for how many like warnings are written in one window."""

_WINDOW_S = 10.0
_MAX_KINDS = 512
"""Kinds of warnings that are counted at a time; beyond, the one longest silent is forgotten."""

_LEVELS = ("debug", "info", "warning", "error", "critical")


class _CallFilter(logging.Filter):
    """Notes which call a record belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = call.current()
        if current is not None:
            record.request_id = current.request_id
            record.trace_id = current.trace.trace_id
            record.method = current.method
        return True


class _BurstFilter(logging.Filter):
    """Keeps one thing that goes wrong again and again from drowning all others.

    Of warnings and errors that are alike (our words, and the first two put into them) `burst` pass
    in a window; the next that passes says how many did not.
    """

    def __init__(self, burst: int) -> None:
        super().__init__()
        self._burst = burst
        self._lock = threading.Lock()
        self._kinds: OrderedDict[tuple[object, ...], list[float]] = OrderedDict()
        self.n_suppressed = 0
        self.n_lines: dict[str, int] = dict.fromkeys(_LEVELS, 0)

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            passes, n_before = self._count(record)
        if n_before:
            record.msg = f"{record.getMessage()} (and {n_before} more like this before it)"
            record.args = None
        return passes

    def _count(self, record: logging.LogRecord) -> tuple[bool, int]:
        """Tell whether a record passes, and how many like it have not before it."""
        n_before = 0
        if record.levelno >= logging.WARNING and self._burst:
            arguments = record.args if isinstance(record.args, tuple) else ()
            words = [argument for argument in arguments if isinstance(argument, str)]
            kind = (record.name, record.levelno, str(record.msg), *words[:2])
            now_s = time.monotonic()
            seen = self._kinds.setdefault(kind, [now_s, 0, 0])
            self._kinds.move_to_end(kind)
            while len(self._kinds) > _MAX_KINDS:
                self._kinds.popitem(last=False)
            if now_s - seen[0] >= _WINDOW_S:
                n_before = int(seen[2])
                seen[:] = [now_s, 0, 0]
            seen[1] += 1
            if seen[1] > self._burst:
                seen[2] += 1
                self.n_suppressed += 1
                return False, 0
        level = record.levelname.lower()
        if level in self.n_lines:
            self.n_lines[level] += 1
        return True, n_before


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("request_id", "trace_id", "method"):
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    """A line for people; the call's request id at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        request_id = getattr(record, "request_id", None)
        text = super().formatMessage(record)
        if not text.isprintable():
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        return text if request_id is None else f"{text} [{request_id}]"


def set_up(log_format: LogFormat, level: str, burst: int = LOG_BURST) -> None:
    """Send the process's logs to standard error.

    Parameters
    ----------
    log_format
        ``text`` for people, ``json`` for machines.
    level
        Lowest level that is written, such as ``info``.
    burst
        Most like warnings in ten seconds; 0: all.
    """
    # It logs metadata that is no UTF-8, such as a token, and otherwise what we have handled.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_BurstFilter(burst))
    handler.addFilter(_CallFilter())
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def collect() -> Iterator[Metric]:
    """Return what Prometheus is told of what `set_up` has set up."""
    filters = [
        found
        for handler in logging.getLogger().handlers
        for found in handler.filters
        if isinstance(found, _BurstFilter)
    ]
    lines = CounterMetricFamily("hashlens_log_lines", "Lines logged.", labels=["level"])
    for level in _LEVELS:
        lines.add_metric([level], sum(found.n_lines[level] for found in filters))
    yield lines
    yield CounterMetricFamily(
        "hashlens_log_suppressed",
        "Warnings and errors left out because too many were alike.",
        value=sum(found.n_suppressed for found in filters),
    )
