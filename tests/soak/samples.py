"""What processes hold, read from the system once in a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    at_s: float
    """Of `time.time`."""
    role: str
    pid: int
    anonymous_mib: float
    """Memory that is the process's own: what a leak would show in. Mapped files come and go with
    the page cache."""
    descriptors: int
    threads: int


def sample(role: str, pid: int) -> Sample | None:
    """Return what a process holds; None if it is gone."""
    process = Path(f"/proc/{pid}")
    try:
        status = dict(
            line.split(":", 1)
            for line in (process / "status").read_text().splitlines()
            if ":" in line
        )
        return Sample(
            at_s=time.time(),
            role=role,
            pid=pid,
            anonymous_mib=int(status["RssAnon"].split()[0]) * 1024 / MIB,
            descriptors=sum(1 for _ in (process / "fd").iterdir()),
            threads=int(status["Threads"]),
        )
    except (OSError, KeyError):
        return None


class Sampler:
    """Samples some processes in a thread of its own, until the block ends.

    Parameters
    ----------
    pids
        Says who is to be sampled, by role, at each time.
    every_s
        Between two looks, in seconds.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]], every_s: float) -> None:
        self.samples: list[Sample] = []
        self._pids = pids
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            for role, pid in self._pids().items():
                taken = sample(role, pid)
                if taken is not None:
                    self.samples.append(taken)
