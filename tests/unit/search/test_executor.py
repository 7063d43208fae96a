from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import pytest

from hashlens.errors import CancelledError, DeadlineError, OverloadedError, UnavailableError
from search_service.cancel import Cancel
from search_service.executor import Executor
from search_service.jobs import Deliver, Waiting
from tests.support.services import wait_until

WAIT_S = 30.0
"""Longest any of these may take; none does."""


@pytest.fixture
def executor() -> Iterator[Executor]:
    with Executor(max_queue=3) as made:
        yield made


class Gate:
    """Work that keeps the executor busy until it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.free = threading.Event()

    def __call__(self, cancel: Cancel) -> str:
        self.began.set()
        assert self.free.wait(WAIT_S)
        return "gate"


def until_stopped(began: threading.Event) -> Callable[[Cancel], None]:
    """Work that ends only by its flag or deadline."""

    def work(cancel: Cancel) -> None:
        began.set()
        ends_s = time.monotonic() + WAIT_S
        while time.monotonic() < ends_s:
            cancel.check()
            time.sleep(0.001)

    return work


async def begun(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


def test_the_result_and_the_wait_come_back(executor: Executor) -> None:
    async def scenario() -> None:
        outcome = await executor.run(lambda cancel: threading.current_thread().name)
        assert outcome.value == "kernels"
        assert outcome.queue_ns > 0

    asyncio.run(scenario())
    assert executor.run_blocking(lambda cancel: 1).value == 1


def test_waiting_is_measured(executor: Executor) -> None:
    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        second = asyncio.create_task(executor.run(lambda cancel: None))
        await asyncio.sleep(0)  # It waits from now on.
        await asyncio.sleep(0.05)
        gate.free.set()
        assert (await first).value == "gate"
        assert (await second).queue_ns >= 40_000_000

    asyncio.run(scenario())


def test_one_at_a_time_in_order(executor: Executor) -> None:
    order: list[int] = []
    inside = threading.Lock()

    def work(i: int) -> None:
        assert inside.acquire(blocking=False)
        order.append(i)
        inside.release()

    async def scenario() -> None:
        gate = Gate()
        tasks = [asyncio.create_task(executor.run(gate))]
        await begun(gate.began)
        for i in range(3):
            tasks.append(asyncio.create_task(executor.run(lambda cancel, i=i: work(i))))
            await asyncio.sleep(0)
        gate.free.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert order == [0, 1, 2]


@pytest.mark.parametrize("error", [ValueError("bad"), TimeoutError("mine"), SystemExit(3)])
def test_what_work_raises_reaches_the_caller_and_the_thread_lives(
    executor: Executor, error: BaseException
) -> None:
    def work(cancel: Cancel) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        executor.run_blocking(work, deadline_s=WAIT_S)
    assert caught.value is error
    if isinstance(error, Exception):

        async def scenario() -> None:
            with pytest.raises(type(error)):
                await executor.run(work, deadline_s=WAIT_S)

        asyncio.run(scenario())
    assert executor.run_blocking(lambda cancel: "alive").value == "alive"


def test_a_full_queue_refuses(executor: Executor) -> None:
    async def scenario() -> None:
        gate = Gate()
        tasks = [asyncio.create_task(executor.run(gate))]
        await begun(gate.began)
        tasks += [asyncio.create_task(executor.run(lambda cancel: "waited")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            await executor.run(lambda cancel: None)
        assert caught.value.retry_after_s > 0
        gate.free.set()
        assert [done.value for done in await asyncio.gather(*tasks)] == ["gate"] + 3 * ["waited"]

    asyncio.run(scenario())


def test_those_who_left_make_room_and_never_start(executor: Executor) -> None:
    started: list[int] = []

    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        leaving = [
            asyncio.create_task(executor.run(lambda cancel, i=i: started.append(i)))
            for i in range(3)
        ]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        assert all(task.cancelled() for task in leaving)
        staying = asyncio.create_task(executor.run(lambda cancel: "room"))
        await asyncio.sleep(0)
        gate.free.set()
        assert (await staying).value == "room"
        await first

    asyncio.run(scenario())
    assert started == []


def test_work_whose_deadline_passes_in_the_queue_never_starts(executor: Executor) -> None:
    started: list[int] = []

    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        # The caller is told at once, not when the queue moves.
        with pytest.raises(DeadlineError):
            await executor.run(lambda cancel: started.append(1), deadline_s=0.01)
        with pytest.raises(DeadlineError):
            await asyncio.to_thread(
                executor.run_blocking, lambda cancel: started.append(2), deadline_s=0.01
            )
        gate.free.set()
        await first
        await executor.run(lambda cancel: None)

    asyncio.run(scenario())
    assert started == []


def test_late_work_does_not_start_though_its_caller_has_not_noticed(executor: Executor) -> None:
    started: list[int] = []

    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        late = asyncio.create_task(executor.run(lambda cancel: started.append(1), deadline_s=0.01))
        await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251 - a busy event loop, on purpose
        gate.free.set()
        executor.run_blocking(lambda cancel: None)
        with pytest.raises(DeadlineError):
            await late
        await first

    asyncio.run(scenario())
    assert started == []


def test_running_work_is_told_that_its_caller_left(executor: Executor) -> None:
    ended: list[str] = []

    async def scenario() -> None:
        began = threading.Event()

        def work(cancel: Cancel) -> None:
            try:
                until_stopped(began)(cancel)
            except CancelledError:
                ended.append("told")
                raise

        task = asyncio.create_task(executor.run(work))
        await begun(began)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await executor.run(lambda cancel: None)  # the thread is free again

    asyncio.run(scenario())
    assert ended == ["told"]


def test_running_work_is_told_that_its_time_is_over(executor: Executor) -> None:
    async def scenario() -> None:
        with pytest.raises(DeadlineError):
            await executor.run(until_stopped(threading.Event()), deadline_s=0.05)
        await executor.run(lambda cancel: None)

    asyncio.run(scenario())
    with pytest.raises(DeadlineError):
        executor.run_blocking(until_stopped(threading.Event()), deadline_s=0.05)


def test_closing_tells_everyone() -> None:
    executor = Executor()
    began = threading.Event()
    with ThreadPoolExecutor(2) as callers:
        running = callers.submit(executor.run_blocking, until_stopped(began))
        assert began.wait(WAIT_S)
        started: list[int] = []
        waiting = callers.submit(executor.run_blocking, lambda cancel: started.append(1))
        while not executor._queue:
            time.sleep(0.001)
        executor.close(WAIT_S)
        for future in (running, waiting):
            with pytest.raises(UnavailableError):
                future.result(WAIT_S)
    assert started == []
    assert "kernels" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(UnavailableError):
        executor.run_blocking(lambda cancel: None)
    executor.close()


def test_work_that_does_not_notice_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    executor = Executor()
    gate = Gate()
    with ThreadPoolExecutor(1) as callers:
        future = callers.submit(executor.run_blocking, gate)
        assert gate.began.wait(WAIT_S)
        executor.close(timeout_s=0.01)
        assert "still running" in caplog.text
        gate.free.set()
        assert future.result(WAIT_S).value == "gate"


class Together:
    """Work for several at once; notes who came with whom, and in which thread."""

    def __init__(self) -> None:
        self.batches: list[tuple[object, list[object]]] = []
        self.threads: list[str] = []

    def __call__(self, key: object, waiting: Sequence[Waiting[Any]], deliver: Deliver) -> None:
        self.batches.append((key, [one.item for one in waiting]))
        self.threads.append(threading.current_thread().name)
        for number, one in enumerate(waiting):
            if isinstance(one.item, Exception):
                deliver(number, one.item)
            elif one.item == "unheard of":
                raise KeyError(one.item)
            else:
                deliver(number, (one.item, key))


@pytest.fixture
def roomy() -> Iterator[Executor]:
    with Executor(max_queue=200) as made:
        yield made


def test_those_that_wait_for_the_same_are_done_together(roomy: Executor) -> None:
    work, other = Together(), Together()
    here, there = object(), object()

    async def scenario() -> None:
        gate = Gate()
        tasks = [asyncio.create_task(roomy.run(gate))]
        await begun(gate.began)
        asked = [(work, here, 1), (work, there, 2), (work, here, 3), (other, here, 4)]
        asked += [(work, here, 5)]
        tasks += [
            asyncio.create_task(roomy.run_together(each, key, item)) for each, key, item in asked
        ]
        await asyncio.sleep(0)
        gate.free.set()
        _, *results = await asyncio.gather(*tasks)
        assert results == [(item, key) for _, key, item in asked]

    asyncio.run(scenario())
    assert work.batches == [(here, [1, 3, 5]), (there, [2])]
    assert other.batches == [(here, [4])]


def test_a_batch_has_a_limit(roomy: Executor) -> None:
    work, key = Together(), object()

    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(roomy.run(gate))
        await begun(gate.began)
        tasks = [asyncio.create_task(roomy.run_together(work, key, i)) for i in range(150)]
        await asyncio.sleep(0)
        gate.free.set()
        assert await asyncio.gather(*tasks) == [(i, key) for i in range(150)]
        await first

    asyncio.run(scenario())
    assert [len(items) for _, items in work.batches] == [64, 64, 22]


def test_of_a_batch_each_fails_alone(roomy: Executor) -> None:
    work, key = Together(), object()

    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(roomy.run(gate))
        await begun(gate.began)

        def ask(item: object, deadline_s: float | None = None) -> asyncio.Task[Any]:
            return asyncio.create_task(roomy.run_together(work, key, item, deadline_s=deadline_s))

        good, bad, late, leaving = ask("good"), ask(ValueError("bad")), ask("late", 0.01), ask("x")
        also_good = ask("also good")
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(DeadlineError):
            await late
        gate.free.set()
        assert await good == ("good", key)
        assert await also_good == ("also good", key)
        with pytest.raises(ValueError, match="bad"):
            await bad
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await first

    asyncio.run(scenario())
    ((_, items),) = work.batches
    assert [str(item) for item in items] == ["good", "bad", "also good"]


def test_work_that_fails_tells_those_it_has_not_answered(roomy: Executor) -> None:
    work, key = Together(), object()

    async def scenario() -> None:
        gate = Gate()
        first = asyncio.create_task(roomy.run(gate))
        await begun(gate.began)
        tasks = [
            asyncio.create_task(roomy.run_together(work, key, item))
            for item in ("answered", "unheard of", "after it")
        ]
        await asyncio.sleep(0)
        gate.free.set()
        answered, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert answered == ("answered", key)
        assert [type(other) for other in others] == [KeyError, KeyError]
        await first
        assert await roomy.run_together(work, key, "alive") == ("alive", key)

    asyncio.run(scenario())


def test_tiny_work_is_done_at_once_unless_somebody_is_inside(roomy: Executor) -> None:
    work, key = Together(), object()

    async def scenario() -> None:
        assert await roomy.run_together(work, key, 1, is_tiny=True) == (1, key)
        gate = Gate()
        first = asyncio.create_task(roomy.run(gate))
        await begun(gate.began)
        waits = asyncio.create_task(roomy.run_together(work, key, 2, is_tiny=True))
        await asyncio.sleep(0.01)
        assert not waits.done()
        gate.free.set()
        assert await waits == (2, key)
        await first
        with pytest.raises(ValueError, match="bad"):
            await roomy.run_together(work, key, ValueError("bad"), is_tiny=True)
        assert await roomy.run_together(work, key, 3) == (3, key)
        roomy.close()
        with pytest.raises(UnavailableError):
            await roomy.run_together(work, key, 4, is_tiny=True)

    asyncio.run(scenario())
    here = threading.current_thread().name
    assert work.threads == [here, "kernels", here, "kernels"]


def test_the_number_of_threads_is_set_where_the_kernels_run() -> None:
    with Executor(n_threads=1) as executor:
        assert executor.run_blocking(lambda cancel: numba.get_num_threads()).value == 1
    with Executor(n_threads=10_000) as executor:
        most = numba.config.NUMBA_NUM_THREADS
        assert executor.run_blocking(lambda cancel: numba.get_num_threads()).value == most


def test_an_answer_does_not_wait_for_a_slow_neighbour(executor: Executor) -> None:
    first_is_there = threading.Event()

    def work(key: object, waiting: Sequence[Waiting[str]], deliver: Deliver) -> None:
        assert len(waiting) == 2
        deliver(0, "fast")
        assert first_is_there.wait(WAIT_S)  # Held back, it would not come before this one ends.
        deliver(1, "slow")

    async def scenario() -> None:
        gate = Gate()
        blocker = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        key = object()
        fast, slow = (
            asyncio.create_task(
                executor.run_together(work, key, name, deadline_s=WAIT_S, is_tiny=False)
            )
            for name in ("fast", "slow")
        )
        await asyncio.sleep(0)
        gate.free.set()
        assert await fast == "fast"
        first_is_there.set()
        assert await slow == "slow"
        await blocker

    asyncio.run(scenario())


def test_one_job_that_took_long_does_not_refuse_the_next(roomy: Executor) -> None:
    async def scenario() -> None:
        await roomy.run(lambda cancel: time.sleep(0.5))  # As compiling a kernel does.
        gate = Gate()
        first = asyncio.create_task(roomy.run(gate))
        await begun(gate.began)
        # If it counted as it was, they would have to expect to wait for 12 s.
        others = [
            asyncio.create_task(roomy.run(lambda cancel: None, deadline_s=12)) for _ in range(190)
        ]
        await asyncio.sleep(0.01)
        gate.free.set()
        await asyncio.gather(first, *others)

    asyncio.run(scenario())


def test_who_would_wait_too_long_is_refused_at_once(executor: Executor) -> None:
    async def scenario() -> None:
        # As long as nothing was measured, nothing is refused for its deadline.
        for _ in range(3):
            await executor.run(lambda cancel: time.sleep(0.2))
        gate = Gate()
        first = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        second = asyncio.create_task(executor.run(lambda cancel: None))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="longer than the deadline allows") as caught:
            await executor.run(lambda cancel: None, deadline_s=0.05)
        assert caught.value.retry_after_s > 0.05
        patient = asyncio.create_task(executor.run(lambda cancel: "done", deadline_s=WAIT_S))
        await asyncio.sleep(0.01)
        assert executor.n_waiting == 2
        gate.free.set()
        assert (await patient).value == "done"
        await asyncio.gather(first, second)
        assert executor.n_refused == 1

    asyncio.run(scenario())


def test_what_is_late_already_is_not_queued(executor: Executor) -> None:
    async def scenario() -> None:
        with pytest.raises(DeadlineError):
            await executor.run(lambda cancel: None, deadline_s=-1.0)
        assert (executor.n_waiting, executor.n_dropped) == (0, 1)

    asyncio.run(scenario())


def test_work_that_nobody_wants_is_overtime_and_work_that_takes_long_is_not(
    executor: Executor,
) -> None:
    async def scenario() -> None:
        gate = Gate()
        task = asyncio.create_task(executor.run(gate))
        await begun(gate.began)
        await asyncio.sleep(0.2)
        assert executor.overtime_s == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.2)
        assert 0.1 < executor.overtime_s < WAIT_S
        gate.free.set()
        await executor.run(lambda cancel: None)
        # The thread forgets what it has done a moment after it has answered.
        wait_until(lambda: executor.overtime_s == 0, within_s=WAIT_S, what="no overtime")

    asyncio.run(scenario())
