"""The bounded dynamic batcher: single images in, whole batches to the model.

One thread owns the model. While it works, requests gather; when it is free, it takes up to
`max_batch` of them. It waits for company only where some is announced, and at most `max_wait_ms`. A
full queue refuses at once, and what nobody waits for any more is dropped before it costs anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashlens.cpus import NICENESS_OF_WORK, lower_priority
from hashlens.errors import DeadlineError, OverloadedError

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Batched(Generic[R]):
    """One request's share of a batch."""

    value: R
    queue_ns: int
    inference_ns: int
    batch_items: int


@dataclass(slots=True)
class BatcherCounts:
    """What a batcher has done so far; read it from any thread."""

    batch_sizes: Counter[int] = field(default_factory=Counter)
    """Items of a batch -> how many batches had so many."""
    queue_ns: int = 0
    """Waited by all items that reached the model, together."""
    inference_ns: int = 0
    """Spent in the model."""
    n_refused: int = 0
    """Items that found the queue full."""
    n_left: int = 0
    """Items dropped because nobody waited for them any more."""
    n_late: int = 0
    """Items dropped because their deadline had passed."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[R]):
    tensor: NDArray[np.float32]
    future: asyncio.Future[Batched[R]]
    since_ns: int
    deadline_ns: int


class Batcher(Generic[R]):
    """Gathers requests into batches. For one event loop.

    Parameters
    ----------
    model
        Takes n float32 arrays, returns n results; called in one thread only.
    max_batch
        Most items of one batch.
    max_wait_ms
        Longest that the first item of a batch waits for announced company, in milliseconds.
    max_queue
        Most items waiting; one more is refused.
    """

    def __init__(
        self,
        model: Callable[[list[NDArray[np.float32]]], list[R]],
        *,
        max_batch: int,
        max_wait_ms: float,
        max_queue: int,
    ) -> None:
        self._model = model
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._queue: deque[_Waiting[R]] = deque()
        self._n_coming = 0
        self._arrived = asyncio.Event()
        self._ready = asyncio.Event()
        self._counts = BatcherCounts()
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="model",
            initializer=lower_priority,
            initargs=(NICENESS_OF_WORK,),
        )
        self._task: asyncio.Task[None] | None = None
        self._last_inference_s = 0.05

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop after the batch that is running; what waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for waiting in self._queue:
            waiting.future.cancel()
        self._queue.clear()
        # Not waiting would leave the thread inside the model while the interpreter ends.
        await asyncio.to_thread(self._thread.shutdown, wait=True)

    @property
    def n_waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    @property
    def counts(self) -> BatcherCounts:
        """What was done so far; not a copy."""
        return self._counts

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Announce an item: who waits already waits for it, too, while the block runs."""
        self._n_coming += 1
        try:
            yield
        finally:
            self._n_coming -= 1
            if not self._n_coming:
                self._ready.set()

    def backlog_s(self, n_items: int) -> float:
        """Return about how long the model takes for `n_items`, in seconds."""
        return -(-n_items // self._max_batch) * self._last_inference_s

    async def run_alone(self, function: Callable[[], None]) -> None:
        """Run something in the model's thread, between batches."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def submit(self, tensor: NDArray[np.float32], deadline_ns: int) -> Batched[R]:
        """Return the model's result for one item.

        Parameters
        ----------
        tensor
            float32, the shape of one item.
        deadline_ns
            When the caller stops waiting, by `time.monotonic_ns`.

        Raises
        ------
        OverloadedError
            The queue is full.
        DeadlineError
            The deadline passed before the item's batch was begun.
        """
        if len(self._queue) >= self._max_queue:
            self._drop_dead()
        if len(self._queue) >= self._max_queue:
            self._counts.n_refused += 1
            raise OverloadedError(
                f"{len(self._queue)} images wait already: slow down, or add encoders",
                retry_after_s=self.backlog_s(len(self._queue)),
            )
        waiting: _Waiting[R] = _Waiting(
            tensor=tensor,
            future=asyncio.get_running_loop().create_future(),
            since_ns=time.monotonic_ns(),
            deadline_ns=deadline_ns,
        )
        self._queue.append(waiting)
        self._arrived.set()
        if len(self._queue) >= self._max_batch:
            self._ready.set()
        return await waiting.future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if not self._queue:
                await self._arrived.wait()
            self._drop_dead()
            if self._queue and self._n_coming and len(self._queue) < self._max_batch:
                self._ready.clear()
                left_s = self._max_wait_s - (time.monotonic_ns() - self._queue[0].since_ns) / 1e9
                if left_s > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._ready.wait(), left_s)
                    self._drop_dead()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            if batch:
                await self._run(batch, loop)

    async def _run(self, batch: list[_Waiting[R]], loop: asyncio.AbstractEventLoop) -> None:
        started_ns = time.monotonic_ns()
        try:
            tensors = [waiting.tensor for waiting in batch]
            results = await loop.run_in_executor(self._thread, self._model, tensors)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.future.cancel()
            raise
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        inference_ns = time.monotonic_ns() - started_ns
        self._last_inference_s = inference_ns / 1e9
        self._counts.batch_sizes[len(batch)] += 1
        self._counts.inference_ns += inference_ns
        self._counts.queue_ns += sum(started_ns - waiting.since_ns for waiting in batch)
        for waiting, value in zip(batch, results, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(
                    Batched(
                        value=value,
                        queue_ns=started_ns - waiting.since_ns,
                        inference_ns=inference_ns,
                        batch_items=len(batch),
                    )
                )

    def _drop_dead(self) -> None:
        """Remove what nobody waits for, and fail what is too late."""
        now_ns = time.monotonic_ns()
        alive: deque[_Waiting[R]] = deque()
        for waiting in self._queue:
            if waiting.future.done():
                self._counts.n_left += 1
            elif waiting.deadline_ns <= now_ns:
                self._counts.n_late += 1
                waiting.future.set_exception(
                    DeadlineError("the deadline passed while the image waited for the model")
                )
            else:
                alive.append(waiting)
        self._queue = alive
