"""Looking at one service again and again; it may go and come back."""

from __future__ import annotations

from collections import deque
from typing import Any

from hashlens.cli.top.scrape import Change, Scrape, look
from hashlens.errors import UnavailableError

_STARTED = "process_start_time_seconds"

_STAGES = (
    *("decode", "wait_version", "encode_call", "queue", "inference"),
    *("coarse", "fine", "fetch", "reply"),
)

_COLLECTION = {
    "items": "hashlens_collection_items",
    "dead_rows": "hashlens_collection_dead_rows",
    "version": "hashlens_collection_version",
    "log_version": "hashlens_collection_log_version",
    "lag": "hashlens_collection_log_lag",
    "log_entries": "hashlens_collection_log_entries",
    "writable": "hashlens_collection_writable",
}


class Watch:
    """Keeps the looks of the last seconds at one service.

    Parameters
    ----------
    name
        ``encoder`` or ``search``.
    address
        Of its metrics, ``host:port``.
    window_s
        Over how long rates and quantiles are taken, in seconds.
    """

    def __init__(self, name: str, address: str, window_s: float) -> None:
        self.name = name
        self.address = address
        self._window_s = window_s
        self._looks: deque[Scrape] = deque()
        self._trouble = "not looked yet"

    def look(self, deadline_s: float) -> None:
        """Look once more; a service that is away is no error."""
        try:
            now = look(self.address, deadline_s)
        except UnavailableError as error:
            self._looks.clear()
            self._trouble = error.message
            return
        self._trouble = ""
        if self._looks and self._looks[-1].value(_STARTED) != now.value(_STARTED):
            self._looks.clear()  # Another process: its counters began anew.
        self._looks.append(now)
        while len(self._looks) > 2 and now.at_s - self._looks[1].at_s >= self._window_s:
            self._looks.popleft()

    def describe(self) -> dict[str, Any]:
        """Return what there is to say, as JSON has it; times in milliseconds, sizes in bytes."""
        if not self._looks:
            return {"address": self.address, "up": False, "detail": self._trouble}
        now = self._looks[-1]
        change = Change(self._looks[0], now)
        found: dict[str, Any] = {
            "address": self.address,
            "up": True,
            "detail": "",
            "window_s": round(change.seconds, 3),
            "version": now.info("hashlens_build_info").get("version", ""),
            "process": _process(change),
            "methods": _methods(change),
        }
        return found | (_encoder(change) if self.name == "encoder" else _search(change))


def _process(change: Change) -> dict[str, Any]:
    now = change.after
    return {
        "rss_bytes": now.value("process_resident_memory_bytes"),
        "threads": now.value("hashlens_process_threads"),
        "open_fds": now.value("process_open_fds"),
        "cpus": change.per_s("process_cpu_seconds_total"),
        "warnings": sum(
            now.value("hashlens_log_lines_total", level=level) or 0
            for level in ("warning", "error", "critical")
        ),
    }


def _methods(change: Change) -> dict[str, dict[str, Any]]:
    """Return the methods that were ever called."""
    calls = change.after.by("hashlens_rpc_calls_total", "method")
    grown = change.grown_by("hashlens_rpc_calls_total", "method")
    fine = change.grown_by("hashlens_rpc_calls_total", "method", code="OK")
    in_flight = change.after.by("hashlens_rpc_in_flight", "method")
    seconds = change.seconds or 1.0
    return {
        method: {
            "calls": calls.get(method, 0),
            "calls_per_s": grown.get(method, 0) / seconds,
            "errors_per_s": (grown.get(method, 0) - fine.get(method, 0)) / seconds,
            "in_flight": in_flight.get(method, 0),
            **_times(change, "hashlens_rpc_seconds", method=method),
        }
        for method in sorted({*calls, *(m for m, n in in_flight.items() if n)})
    }


def _stages(change: Change, name: str) -> dict[str, dict[str, Any]]:
    """Return the stages in the order in which they run."""
    there = change.after.by(f"{name}_count", "stage")
    return {stage: _times(change, name, stage=stage) for stage in sorted(there, key=_place)}


def _place(stage: str) -> tuple[int, str]:
    return (_STAGES.index(stage) if stage in _STAGES else len(_STAGES), stage)


def _times(change: Change, name: str, **labels: str) -> dict[str, float | None]:
    found = {}
    for key, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
        seconds = change.quantile(share, name, **labels)
        found[key] = None if seconds is None else seconds * 1e3
    return found


def _encoder(change: Change) -> dict[str, Any]:
    now = change.after
    return {
        "model": now.info("hashlens_model_info"),
        "images_per_s": change.per_s("hashlens_encoder_images_total", outcome="ok"),
        "stages": _stages(change, "hashlens_encoder_stage_seconds"),
        "queue": {
            "waiting": now.value("hashlens_encoder_queue_images"),
            "admitted": now.value("hashlens_encoder_admitted_images"),
            "limit": now.value("hashlens_encoder_queue_limit"),
        },
        "batch_mean": change.mean("hashlens_encoder_batch_images"),
    }


def _search(change: Change) -> dict[str, Any]:
    now = change.after
    columns = {key: now.by(name, "collection") for key, name in _COLLECTION.items()}
    return {
        "queries_per_s": change.per_s("hashlens_search_queries_total", outcome="ok"),
        "rows_scanned_per_s": change.per_s("hashlens_search_rows_scanned_total"),
        "stages": _stages(change, "hashlens_search_stage_seconds"),
        "queue": {
            "waiting": now.value("hashlens_search_queue_jobs"),
            "limit": now.value("hashlens_search_queue_limit"),
        },
        "batch_mean": change.mean("hashlens_search_batch_queries"),
        "pool_p50_rows": change.quantile(0.5, "hashlens_search_pool_rows"),
        "collections": {
            name: {key: column.get(name) for key, column in columns.items()}
            for name in sorted(columns["items"])
        },
        "redis": {
            "connected": bool(now.value("hashlens_redis_connected")),
            "writable": bool(now.value("hashlens_redis_writable")),
            "last_call_ms": (now.value("hashlens_redis_last_call_seconds") or 0) * 1e3,
            "calls_per_s": change.per_s("hashlens_redis_call_seconds_count"),
            "failures": now.value("hashlens_redis_failures_total"),
        },
    }
