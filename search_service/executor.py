"""The only place that enters parallel kernels: one thread, a bounded queue before it.

Numba's threading layers differ: ``workqueue`` aborts the process when two threads enter it at once,
``omp`` starts a team of threads for each. One thread of ours entering them is right for all, and a
search uses every core anyway. Tiny work is the exception: when nobody else is inside, the caller's
own thread may enter, with one thread of Numba's; see `Executor.run_together`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numba
from numba.np.ufunc.parallel import threading_layer

from hashlens.cpus import NICENESS_OF_WORK, lower_priority, usable_cpus
from hashlens.errors import CancelledError, DeadlineError, OverloadedError, UnavailableError
from search_service.cancel import Cancel
from search_service.jobs import Job, Outcome, Settlements, Together, Waiting

T = TypeVar("T")
A = TypeVar("A")

logger = logging.getLogger(__name__)

_START_S = 60.0
"""Longest for Numba's threads to start."""

_MAX_BATCH = 64
"""Most jobs that are taken together."""

_WAIT_SHARE = 0.7
"""Of its time a job may expect to wait; the rest is for the work, and for expecting too little."""

_OUTLIER_TIMES = 8
_OUTLIER_S = 0.05
"""Work that takes longer than so many times the mean and that counts as this: compiling, say."""

_LATE = "The deadline passed before the work was done. Allow more time or ask less."
_CLOSED = "The server is shutting down. Try another replica."


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
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._inside = threading.Lock()
        """Held by who is in the kernels."""
        self._running: Sequence[Job] = ()
        self._settlements = Settlements()
        self._is_closed = False
        self.n_refused = 0
        """Jobs that were not taken, because of those before them."""
        self.n_dropped = 0
        """Jobs that were taken and not begun: their callers left, or their time was over."""
        self._mean_s = 0.0
        """How long a job takes, a moving average: 0 until one has been done."""
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve,
            args=(n_threads or usable_cpus(), started),
            name="kernels",
            daemon=True,
        )
        self._thread.start()
        started.result(_START_S)

    @property
    def n_waiting(self) -> int:
        """Jobs that wait for the thread."""
        return len(self._queue)

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
            Job(work, deadline_s, loop=asyncio.get_running_loop()), deadline_s
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
        job = Job(work, deadline_s, key=key, item=item, loop=loop)
        return await self._awaited(job, deadline_s)

    async def _awaited(self, job: Job, deadline_s: float | None) -> Any:
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
        job = Job(work, deadline_s)
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
        refused = Settlements()
        for job in waiting:
            refused.add(job, UnavailableError(_CLOSED))
        refused.send()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("kernels: work still running after %.1f s", timeout_s)

    @property
    def overtime_s(self) -> float:
        """For how long work has gone on that nobody wants any more, in seconds; 0 if none does."""
        running = self._running
        return min((job.cancel.unwanted_s for job in running), default=0.0)

    def _submit(self, job: Job) -> None:
        with self._changed:
            if self._is_closed:
                raise UnavailableError(_CLOSED)
            if len(self._queue) >= self._max_queue:
                self._drop_unwanted()
            n_waiting = len(self._queue)
            wait_s = self._mean_s * (n_waiting + len(self._running))
            if n_waiting >= self._max_queue:
                self.n_refused += 1
                raise OverloadedError(
                    f"{self._max_queue} searches are waiting, the most allowed. Come back later.",
                    retry_after_s=round(max(0.05, wait_s), 3),
                )
            left_s = job.cancel.left_s
            if left_s <= 0:
                self.n_dropped += 1
                raise DeadlineError(_LATE)
            if n_waiting and wait_s > _WAIT_SHARE * left_s:
                self.n_refused += 1
                raise OverloadedError(
                    f"{n_waiting} searches are waiting, for about {wait_s:.2g} s: longer than the "
                    "deadline allows. Come back later, or allow more time.",
                    retry_after_s=round(max(0.05, wait_s), 3),
                )
            self._queue.append(job)
            if len(self._queue) == 1:
                self._changed.notify()

    def _drop_unwanted(self) -> None:
        refused = Settlements()
        for job in list(self._queue):
            if not job.is_wanted:
                self._queue.remove(job)
                self.n_dropped += 1
                refused.add(job, self._why_unwanted(job))
        refused.send()

    def _serve(self, n_threads: int, started: Future[None]) -> None:
        lower_priority(NICENESS_OF_WORK)
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
                    self.n_dropped += 1
                    self._settlements.add(job, self._why_unwanted(job))
            if wanted:
                with self._inside:
                    self._perform(wanted)
            self._settlements.send()
            self._running = ()

    def _next(self) -> Sequence[Job]:
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
                others: deque[Job] = deque()
                for job in self._queue:
                    goes = len(jobs) < _MAX_BATCH and job.goes_with(first)
                    (jobs if goes else others).append(job)
                self._queue = others
            self._running = jobs
            return jobs

    def _perform(self, jobs: Sequence[Job]) -> None:
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
                job = pending.pop(number)
                settlements.add(job, self._told(result), is_last=not pending)

            waiting = [Waiting(job.item, job.cancel, job.queued_ns) for job in jobs]
            failure: BaseException = RuntimeError("the work has forgotten a job")
            try:
                first.work(first.key, waiting, deliver)
            except BaseException as error:
                failure = error
            for number in list(pending):
                deliver(number, failure)
        took_s = (time.perf_counter_ns() - began_ns) / 1e9 / len(jobs)
        # A kernel that had to be compiled first says nothing of the searches to come.
        usual_s = min(took_s, _OUTLIER_TIMES * self._mean_s + _OUTLIER_S)
        self._mean_s += (usual_s - self._mean_s) / 8

    def _told(self, result: Any) -> Any:
        """Return what the caller is told: work that was stopped by closing says so."""
        if self._is_closed and isinstance(result, CancelledError):
            return UnavailableError(_CLOSED)
        return result

    def _why_unwanted(self, job: Job) -> Exception:
        if job.cancel.is_late:
            return DeadlineError(_LATE)
        if self._is_closed:
            return UnavailableError(_CLOSED)
        return CancelledError("The caller left before the work began.")


def _done_here(work: Together[A], key: object, item: A, deadline_s: float | None) -> Any:
    """Do a job in this thread, with one of Numba's: more would not be awake in time."""
    results: list[Any] = []
    waiting = Waiting(item, Cancel(deadline_s), time.perf_counter_ns())
    n_threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        work(key, [waiting], lambda _, result: results.append(result))
    finally:
        numba.set_num_threads(n_threads)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result
