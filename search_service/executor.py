"""The only place that enters parallel kernels: one thread, a bounded queue before it.

Numba's threading layers differ: ``workqueue`` aborts the process when two threads enter it at once,
``omp`` starts a team of threads for each. One thread of ours entering them is right for all, and a
search uses every core anyway. Tiny work is the exception: when nobody else is inside, the caller's
own thread may enter, with one thread of Numba's; see `Executor.run_together`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numba
from numba.np.ufunc.parallel import threading_layer

from hashlens.cpus import usable_cpus
from hashlens.errors import CancelledError, DeadlineError, OverloadedError, UnavailableError
from search_service.cancel import Cancel

T = TypeVar("T")
A = TypeVar("A")

logger = logging.getLogger(__name__)

_START_S = 60.0
"""Longest for Numba's threads to start."""

_MAX_BATCH = 64
"""Most jobs that are taken together."""

_HOLD_NS = 300_000
"""Results of a batch travel to the event loop together, unless that keeps one longer than this."""

_LATE = "The deadline passed before the work was done. Allow more time or ask less."
_CLOSED = "The server is shutting down. Try another replica."


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


class _Job:
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
        return not (self.cancel.is_set or self.cancel.is_late)

    def goes_with(self, other: _Job) -> bool:
        return self.key is not None and self.key is other.key and self.work == other.work

    def settle(self, result: Any) -> None:
        """Give the result to the future; for a task's, call it in its event loop."""
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class _Settlements:
    """Results on their way to who waits for them: to an event loop, many at once."""

    def __init__(self) -> None:
        self._held: list[tuple[_Job, Any]] = []
        self._since_ns = 0

    def add(self, job: _Job, result: Any) -> None:
        if job.loop is None:
            job.settle(result)
            return
        now_ns = time.perf_counter_ns()
        if not self._held:
            self._since_ns = now_ns
        self._held.append((job, result))
        if now_ns - self._since_ns > _HOLD_NS:
            self.send()

    def send(self) -> None:
        held, self._held = self._held, []
        for loop in {job.loop for job, _ in held}:
            assert loop is not None
            mine = [(job, result) for job, result in held if job.loop is loop]
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                loop.call_soon_threadsafe(_settle_all, mine)


def _settle_all(settled: Sequence[tuple[_Job, Any]]) -> None:
    for job, result in settled:
        job.settle(result)


class Executor:
    """Runs work on one thread, first come, first served.

    Work whose caller has left or whose deadline has passed is dropped before it starts; work that
    runs is told through its `Cancel`. Jobs that may be done together, see `run_together`, are: the
    one whose turn it is takes those behind it along.

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
        self._inside = threading.Lock()
        """Held by who is in the kernels."""
        self._running: Sequence[_Job] = ()
        self._settlements = _Settlements()
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
        outcome: Outcome[T] = await self._awaited(
            _Job(work, deadline_s, loop=asyncio.get_running_loop()), deadline_s
        )
        return outcome

    async def run_together(
        self,
        work: Together[A],
        key: object,
        item: A,
        *,
        deadline_s: float | None = None,
        is_tiny: bool = False,
    ) -> Any:
        """Run work that does several jobs at once better than one by one.

        When it is a job's turn, those that wait behind it with the same `work` and `key` are done
        with it. Otherwise as `run`.

        Parameters
        ----------
        work
            Called on the executor's thread as ``work(key, jobs, deliver)``. It delivers each job's
            result when it has it, whatever becomes of the others, and heeds each one's `cancel`.
        key
            What they have in common, compared by identity.
        item
            What is this job's own.
        deadline_s
            Time allowed from now, waiting included, in seconds; None for no limit.
        is_tiny
            Whether the job takes so little that it is done at once, in the caller's thread, if
            nobody waits and nobody is inside: handing it to another thread and back costs more
            than a search of 100,000 rows. Such a job uses one thread of Numba's.

        Returns
        -------
        Any
            What `work` delivers for this job.
        """
        if is_tiny and not self._queue and not self._is_closed and self._inside.acquire(False):
            try:
                return _done_here(work, key, item, deadline_s)
            finally:
                self._inside.release()
        loop = asyncio.get_running_loop()
        job = _Job(work, deadline_s, key=key, item=item, loop=loop)
        return await self._awaited(job, deadline_s)

    async def _awaited(self, job: _Job, deadline_s: float | None) -> Any:
        """Wait for a job; a timer of our own costs a third of `asyncio.timeout`."""
        self._submit(job)
        timer = None
        if deadline_s is not None:
            assert job.loop is not None
            timer = job.loop.call_later(deadline_s, job.settle, DeadlineError(_LATE))
        try:
            return await job.future
        finally:
            job.cancel.set()
            if timer is not None:
                timer.cancel()

    def run_blocking(
        self, work: Callable[[Cancel], T], *, deadline_s: float | None = None
    ) -> Outcome[T]:
        """Do as `run`, from a thread instead of a task."""
        job = _Job(work, deadline_s)
        future: Future[Outcome[T]] = job.future
        self._submit(job)
        try:
            return future.result(deadline_s)
        except TimeoutError:
            if future.done():  # the work's own, or done just now
                return future.result()
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
            for job in self._running:
                job.cancel.set()
            self._changed.notify_all()
        refused = _Settlements()
        for job in waiting:
            refused.add(job, UnavailableError(_CLOSED))
        refused.send()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("kernels: work still running after %.1f s", timeout_s)

    def _submit(self, job: _Job) -> None:
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
            if len(self._queue) == 1:
                self._changed.notify()

    def _drop_unwanted(self) -> None:
        refused = _Settlements()
        for job in list(self._queue):
            if not job.is_wanted:
                self._queue.remove(job)
                refused.add(job, self._why_unwanted(job))
        refused.send()

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
        while jobs := self._next():
            wanted = []
            for job in jobs:
                if job.is_wanted:
                    wanted.append(job)
                else:
                    self._settlements.add(job, self._why_unwanted(job))
            if wanted:
                with self._inside:
                    self._perform(wanted)
            self._settlements.send()

    def _next(self) -> Sequence[_Job]:
        """Return the first job and those that go with it; none when closed."""
        with self._changed:
            self._running = ()
            while not self._queue and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return ()
            first = self._queue.popleft()
            jobs = [first]
            if first.key is not None and self._queue:
                others: deque[_Job] = deque()
                for job in self._queue:
                    goes = len(jobs) < _MAX_BATCH and job.goes_with(first)
                    (jobs if goes else others).append(job)
                self._queue = others
            self._running = jobs
            return jobs

    def _perform(self, jobs: Sequence[_Job]) -> None:
        began_ns = time.perf_counter_ns()
        settlements, first = self._settlements, jobs[0]
        if first.key is None:
            try:
                result: Any = Outcome(first.work(first.cancel), began_ns - first.queued_ns)
            except BaseException as error:  # the caller's to handle, and the thread has to live
                result = self._told(error)
            settlements.add(first, result)
        else:
            pending = dict(enumerate(jobs))

            def deliver(number: int, result: Any) -> None:
                settlements.add(pending.pop(number), self._told(result))

            waiting = [Waiting(job.item, job.cancel, job.queued_ns) for job in jobs]
            failure: BaseException = RuntimeError("the work has forgotten a job")
            try:
                first.work(first.key, waiting, deliver)
            except BaseException as error:
                failure = error
            for number in list(pending):
                deliver(number, failure)
        took_s = (time.perf_counter_ns() - began_ns) / 1e9 / len(jobs)
        self._mean_s += (took_s - self._mean_s) / 8

    def _told(self, result: Any) -> Any:
        """Return what the caller is told: work that was stopped by closing says so."""
        if self._is_closed and isinstance(result, CancelledError):
            return UnavailableError(_CLOSED)
        return result

    def _why_unwanted(self, job: _Job) -> Exception:
        if job.cancel.is_late:
            return DeadlineError(_LATE)
        if self._is_closed:
            return UnavailableError(_CLOSED)
        return CancelledError("The caller left before the work began.")


def _done_here(work: Together[A], key: object, item: A, deadline_s: float | None) -> Any:
    """Do a job in this thread."""
    results: list[Any] = []
    waiting = Waiting(item, Cancel(deadline_s), time.perf_counter_ns())
    work(key, [waiting], lambda _, result: results.append(result))
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result
