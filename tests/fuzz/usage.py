"""What a process uses, from /proc."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Usage:
    """One look at a process."""

    rss_mb: float
    n_descriptors: int
    n_threads: int


def usage(pid: int | str = "self") -> Usage:
    """Look at a process."""
    status = _status(pid)
    n_descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Usage(status["VmRSS"] / 1024, n_descriptors, status["Threads"])


def peak_rss_mb(pid: int | str = "self") -> float:
    """Return the most that a process has held since the last `reset_peak`."""
    return _status(pid)["VmHWM"] / 1024


def reset_peak(pid: int | str = "self") -> None:
    """Forget the peak so far."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int | str) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {
        name: int(value.split()[0])
        for name, value in pairs
        if name in ("VmRSS", "VmHWM", "Threads")
    }


class Peak:
    """The most that a process holds while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before_mb = usage(pid).rss_mb
        self.rss_mb = self.before_mb

    def __enter__(self) -> Self:
        reset_peak(self._pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.rss_mb = peak_rss_mb(self._pid)

    @property
    def grown_mb(self) -> float:
        """How much that is beyond what it held before."""
        return self.rss_mb - self.before_mb


def settled_descriptors(pid: int, at_most: int, *, within_s: float) -> int:
    """Wait until a process has closed what it need not hold; return what it holds then."""
    ends_s = time.monotonic() + within_s
    while (n := usage(pid).n_descriptors) > at_most and time.monotonic() < ends_s:
        time.sleep(0.1)
    return n


class Repeated(threading.Thread):
    """Does something again and again beside a block; what it raises is raised at the end."""

    def __init__(self, action: object, *, pause_s: float = 0.05) -> None:
        super().__init__(daemon=True)
        assert callable(action)
        self._action = action
        self._pause_s = pause_s
        self._over = threading.Event()
        self._error: BaseException | None = None
        self.longest_s = 0.0
        self.n = 0

    def run(self) -> None:
        try:
            while not self._over.is_set():
                began_s = time.monotonic()
                self._action()
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                self.n += 1
                self._over.wait(self._pause_s)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self.join(60)
        if kind is None:
            if self._error is not None:
                raise self._error
            assert not self.is_alive(), "a healthy caller waits for an answer"
            assert self.n, "a healthy caller was not answered once"
