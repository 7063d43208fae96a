"""What the process itself takes: memory, threads, descriptors; and what runs in it."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
from prometheus_client import ProcessCollector

from hashlens import __version__
from hashlens.rpc.metrics import Metric, gauge, info

_TASKS = Path("/proc/self/task")


class Process:
    """Reads the process at each scrape."""

    def __init__(self) -> None:
        # None: in no registry, least of all the global one.
        self._collector = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """Return what there is to say: ``process_...`` as every Prometheus client names it."""
        yield from self._collector.collect()
        yield gauge("hashlens_process_threads", "Threads, those of libraries included.", _threads())
        yield info(
            "hashlens_build_info",
            "What runs.",
            {
                "version": __version__,
                "python": platform.python_version(),
                "grpc": grpc.__version__,
            },
        )


def _threads() -> int:
    try:
        return sum(1 for _ in _TASKS.iterdir())
    except OSError:  # No Linux.
        return threading.active_count()
