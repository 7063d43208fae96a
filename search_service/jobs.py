"""Jobs of the executor, and how their results reach who waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from search_service.cancel import Cancel

T = TypeVar("T")
A = TypeVar("A")

_HOLD_S = 0.0003
"""Results of a batch travel to the event loop together, unless that keeps one longer than this."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What work returned, and how long it waited to start."""

    value: T
    queue_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[A]):
    """One of the jobs that are done together."""

    item: A
    cancel: Cancel
    queued_ns: int
    """On the clock of `time.perf_counter_ns`."""


Deliver = Callable[[int, Any], None]
"""Takes the position of a job and its result, which is an `Exception` where it failed."""

Together = Callable[[Any, Sequence[Waiting[A]], Deliver], None]
"""Does the jobs of one key together, and delivers the result of each."""


class Job:
    """Work, who waits for it, and what becomes of it."""

    __slots__ = ("cancel", "future", "item", "key", "loop", "queued_ns", "work")

    def __init__(
        self,
        work: Callable[..., Any],
        deadline_s: float | None,
        *,
        key: object = None,
        item: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.work = work
        self.key = key
        self.item = item
        self.cancel = Cancel(deadline_s)
        self.queued_ns = time.perf_counter_ns()
        self.loop = loop
        """Where a task awaits the future; None: a thread waits for it."""
        self.future: Any = Future() if loop is None else loop.create_future()

    @property
    def is_wanted(self) -> bool:
        """Whether its caller still waits and its time is not over."""
        return not (self.cancel.is_set or self.cancel.is_late)

    def goes_with(self, other: Job) -> bool:
        """Tell whether the two may be done together."""
        return self.key is not None and self.key is other.key and self.work == other.work

    def settle(self, result: Any) -> None:
        """Give the result to the future; for a task's, call it in its event loop."""
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Settlements:
    """Results on their way to who waits for them: to an event loop, many at once."""

    def __init__(self) -> None:
        self._held: list[tuple[Job, Any]] = []
        self._is_timed = False
        self._lock = threading.Lock()

    def add(self, job: Job, result: Any, *, is_last: bool = True) -> None:
        """Take a result; it leaves with `send`, or soon by itself if more are to come before."""
        if job.loop is None:
            job.settle(result)
            return
        with self._lock:
            self._held.append((job, result))
            starts_timer = not is_last and not self._is_timed
            self._is_timed |= starts_timer
        if starts_timer:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                job.loop.call_soon_threadsafe(job.loop.call_later, _HOLD_S, self._time_is_up)

    def _time_is_up(self) -> None:
        self._is_timed = False
        self.send()

    def send(self) -> None:
        """Let all that is held go."""
        with self._lock:
            held, self._held = self._held, []
        for loop in {job.loop for job, _ in held}:
            assert loop is not None
            mine = [(job, result) for job, result in held if job.loop is loop]
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                loop.call_soon_threadsafe(_settle_all, mine)


def _settle_all(settled: Sequence[tuple[Job, Any]]) -> None:
    for job, result in settled:
        job.settle(result)
