"""The only place that enters parallel kernels: one thread, a bounded queue before it.

Numba's threading layers differ: ``workqueue`` aborts the process when two threads enter it at once,
``omp`` starts a team of threads for each. One thread of ours entering them is right for all, and a
search uses every core anyway.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numba
from numba.np.ufunc.parallel import threading_layer

from hashlens.cpus import usable_cpus
from hashlens.errors import CancelledError, DeadlineError, OverloadedError, UnavailableError
from search_service.cancel import Cancel

T = TypeVar("T")

logger = logging.getLogger(__name__)

_START_S = 60.0
"""Longest for Numba's threads to start."""

_LATE = "The deadline passed before the work was done. Allow more time or ask less."
_CLOSED = "The server is shutting down. Try another replica."


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What work returned, and how long it waited to start."""

    value: T
    queue_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    work: Callable[[Cancel], Any]
    cancel: Cancel
    queued_ns: int = field(default_factory=time.perf_counter_ns)
    future: Future[Outcome[Any]] = field(default_factory=Future)

    @property
    def is_wanted(self) -> bool:
        return not (self.cancel.is_set or self.cancel.is_late or self.future.cancelled())

    def refuse(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Executor:
    """Runs work on one thread, first come, first served.

    Work whose caller has left or whose deadline has passed is dropped before it starts; work that
    runs is told through its `Cancel`.

    Parameters
    ----------
    n_threads
        Threads of Numba's kernels; 0 for as many CPUs as the process may use, by affinity and
        cgroup quota. Never more than Numba was started with (``NUMBA_NUM_THREADS``).
    max_queue
        Most jobs waiting; one more is refused.

    Raises
    ------
    ValueError
        Numba finds no threading layer.
    """

    def __init__(self, *, n_threads: int = 0, max_queue: int = 256) -> None:
        self._max_queue = max_queue
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._running: _Job | None = None
        self._is_closed = False
        self._mean_s = 0.01  # of a job, a moving average; only advises when to come back
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve,
            args=(n_threads or usable_cpus(), started),
            name="kernels",
            daemon=True,
        )
        self._thread.start()
        started.result(_START_S)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def run(
        self, work: Callable[[Cancel], T], *, deadline_s: float | None = None
    ) -> Outcome[T]:
        """Run ``work(cancel)`` and await its result.

        Cancelling the awaiting task drops the work, or raises its flag if it runs already.

        Parameters
        ----------
        work
            Called on the executor's thread.
        deadline_s
            Time allowed from now, waiting included, in seconds; None for no limit.

        Returns
        -------
        Outcome
            The result and the nanoseconds before it started.

        Raises
        ------
        OverloadedError
            The queue is full.
        DeadlineError
            The time is over; the work may still be noticing.
        UnavailableError
            The executor is closed.
        Exception
            Whatever `work` raises.
        """
        job = self._submit(work, deadline_s)
        try:
            async with asyncio.timeout(deadline_s) as limit:
                return await asyncio.wrap_future(job.future)
        except TimeoutError:
            if limit.expired():
                raise DeadlineError(_LATE) from None
            raise
        finally:
            job.cancel.set()

    def run_blocking(
        self, work: Callable[[Cancel], T], *, deadline_s: float | None = None
    ) -> Outcome[T]:
        """Do as `run`, from a thread instead of a task."""
        job = self._submit(work, deadline_s)
        try:
            return job.future.result(deadline_s)
        except TimeoutError:
            if job.future.done():  # the work's own, or done just now
                return job.future.result()
            raise DeadlineError(_LATE) from None
        finally:
            job.cancel.set()

    def close(self, timeout_s: float = 10.0) -> None:
        """Refuse what waits, stop what runs, end the thread. Closing twice is fine.

        Parameters
        ----------
        timeout_s
            Longest wait for running work to notice, in seconds. What does not notice goes on as a
            daemon thread.
        """
        with self._changed:
            self._is_closed = True
            waiting = list(self._queue)
            self._queue.clear()
            if self._running is not None:
                self._running.cancel.set()
            self._changed.notify_all()
        for job in waiting:
            job.refuse(UnavailableError(_CLOSED))
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("kernels: work still running after %.1f s", timeout_s)

    def _submit(self, work: Callable[[Cancel], T], deadline_s: float | None) -> _Job:
        job = _Job(work, Cancel(deadline_s))
        with self._changed:
            if self._is_closed:
                raise UnavailableError(_CLOSED)
            if len(self._queue) >= self._max_queue:
                self._drop_unwanted()
            if len(self._queue) >= self._max_queue:
                raise OverloadedError(
                    f"{self._max_queue} searches are waiting, the most allowed. Come back later.",
                    retry_after_s=round(max(0.05, self._mean_s * len(self._queue)), 3),
                )
            self._queue.append(job)
            self._changed.notify()
        return job

    def _drop_unwanted(self) -> None:
        for job in list(self._queue):
            if not job.is_wanted:
                self._queue.remove(job)
                job.refuse(self._why_unwanted(job))

    def _serve(self, n_threads: int, started: Future[None]) -> None:
        try:
            # The number of threads belongs to the thread that enters the kernels.
            n_threads = min(n_threads, numba.get_num_threads())
            numba.set_num_threads(n_threads)
            layer = threading_layer()  # type: ignore[no-untyped-call]
            logger.info("kernels: threading layer %s, %d threads", layer, n_threads)
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while (job := self._next()) is not None:
            if not job.is_wanted:
                job.refuse(self._why_unwanted(job))
            elif job.future.set_running_or_notify_cancel():
                self._perform(job)
            with self._changed:
                self._running = None

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._queue and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            self._running = self._queue.popleft()
            return self._running

    def _perform(self, job: _Job) -> None:
        began_ns = time.perf_counter_ns()
        try:
            value = job.work(job.cancel)
        except CancelledError as error:
            job.future.set_exception(UnavailableError(_CLOSED) if self._is_closed else error)
        except BaseException as error:  # the caller's to handle, and the thread has to live
            job.future.set_exception(error)
        else:
            job.future.set_result(Outcome(value, began_ns - job.queued_ns))
        took_s = (time.perf_counter_ns() - began_ns) / 1e9
        self._mean_s += (took_s - self._mean_s) / 8

    def _why_unwanted(self, job: _Job) -> Exception:
        if job.cancel.is_late:
            return DeadlineError(_LATE)
        if self._is_closed:
            return UnavailableError(_CLOSED)
        return CancelledError("The caller left before the work began.")
