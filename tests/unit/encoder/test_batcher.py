"""The batcher: what shares a batch, what is refused, what is dropped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder_service.batcher import Batcher
from hashlens.errors import DeadlineError, OverloadedError


class Model:
    """Doubles numbers; remembers its batches; waits where it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.entered = threading.Event()
        self.go.set()

    def __call__(self, batch: list[NDArray[np.float32]]) -> list[float]:
        numbers = [float(one[0]) for one in batch]
        self.threads.add(threading.get_ident())
        self.batches.append(numbers)
        self.entered.set()
        assert self.go.wait(20)
        if min(numbers) < 0:
            raise ValueError("negative")
        return [2 * x for x in numbers]

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


def item(x: float) -> NDArray[np.float32]:
    return np.array([x], dtype=np.float32)


def within(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def batching(
    scenario: Callable[[Batcher[float], Model], Coroutine[Any, Any, None]], **sizes: Any
) -> Model:
    model = Model()

    async def run() -> None:
        chosen = {"max_batch": 4, "max_wait_ms": 5, "max_queue": 8, **sizes}
        async with Batcher(model, **chosen) as batcher:
            try:
                await scenario(batcher, model)
            finally:
                model.go.set()

    asyncio.run(asyncio.wait_for(run(), 30))
    return model


def test_everyone_gets_their_own_result_from_one_thread() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        async def one(x: float) -> None:
            batched = await batcher.submit(item(x), within(10))
            assert batched.value == 2 * x
            assert batched.inference_ns > 0
            assert batched.queue_ns >= 0
            assert 1 <= batched.batch_items <= 4

        await asyncio.gather(*(one(float(x)) for x in range(8)))

    model = batching(scenario)
    assert sorted(x for batch in model.batches for x in batch) == [float(x) for x in range(8)]
    assert all(len(batch) <= 4 for batch in model.batches)
    assert len(model.threads) == 1


def test_what_arrives_during_a_batch_shares_the_next() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        model.go.clear()
        first = asyncio.create_task(batcher.submit(item(0), within(10)))
        await model.until_entered()
        rest = [asyncio.create_task(batcher.submit(item(x), within(10))) for x in (1, 2, 3)]
        await asyncio.sleep(0)
        model.go.set()
        await asyncio.gather(first, *rest)

    assert batching(scenario, max_wait_ms=0).batches == [[0], [1, 2, 3]]


def test_a_full_batch_does_not_wait_for_company() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        await asyncio.gather(*(batcher.submit(item(x), within(10)) for x in range(4)))

    # Twenty seconds of waiting would run into the scenario's time-out.
    assert len(batching(scenario, max_wait_ms=60_000).batches) == 1


def test_who_is_alone_does_not_wait() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        for x in range(3):
            assert (await batcher.submit(item(x), within(10))).value == 2 * x

    # As above: a wait would be a time-out.
    assert batching(scenario, max_wait_ms=60_000).batches == [[0], [1], [2]]


def test_announced_company_is_waited_for() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        with batcher.coming():
            first = asyncio.create_task(batcher.submit(item(0), within(10)))
            await asyncio.sleep(0.05)
            assert not model.batches
            assert batcher.n_waiting == 1
        second = asyncio.create_task(batcher.submit(item(1), within(10)))
        await asyncio.gather(first, second)

    assert batching(scenario, max_wait_ms=60_000).batches == [[0, 1]]


def test_company_that_turns_back_is_not_waited_for() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        async def turns_back() -> None:
            with batcher.coming():
                await asyncio.sleep(0.01)
                raise ValueError("no image")

        coming = asyncio.create_task(turns_back())
        await asyncio.sleep(0)
        await batcher.submit(item(0), within(10))
        with pytest.raises(ValueError, match="no image"):
            await coming

    assert batching(scenario, max_wait_ms=60_000).batches == [[0]]


def test_company_that_is_late_is_not_waited_for() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        with batcher.coming():
            assert (await batcher.submit(item(0), within(10))).value == 0

    assert batching(scenario, max_wait_ms=5).batches == [[0]]


def test_what_was_done_is_counted() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        model.go.clear()
        running = asyncio.create_task(batcher.submit(item(0), within(10)))
        await model.until_entered()
        left = asyncio.create_task(batcher.submit(item(1), within(10)))
        late = asyncio.create_task(batcher.submit(item(2), within(0.001)))
        rest = [asyncio.create_task(batcher.submit(item(x), within(10))) for x in (3, 4)]
        await asyncio.sleep(0)
        assert batcher.n_waiting == 4
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError):
            # The late one makes room for the first of these.
            await asyncio.gather(*(batcher.submit(item(x), within(10)) for x in (5, 6)))
        left.cancel()
        model.go.set()
        await asyncio.gather(running, late, *rest, return_exceptions=True)
        await batcher.submit(item(7), within(10))
        counts = batcher.counts
        assert (counts.n_refused, counts.n_left, counts.n_late) == (1, 1, 1)
        assert counts.batch_sizes == {1: 2, 3: 1}
        assert counts.queue_ns > 10_000_000
        assert counts.inference_ns > 10_000_000

    batching(scenario, max_queue=4)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        model.go.clear()
        running = asyncio.create_task(batcher.submit(item(0), within(10)))
        await model.until_entered()
        waiting = [asyncio.create_task(batcher.submit(item(x), within(10))) for x in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            await batcher.submit(item(9), within(10))
        assert caught.value.retry_after_s > 0
        model.go.set()
        await asyncio.gather(running, *waiting)

    assert [9.0] not in batching(scenario).batches


def test_cancelled_and_late_items_never_reach_the_model() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        model.go.clear()
        running = asyncio.create_task(batcher.submit(item(0), within(10)))
        await model.until_entered()
        left = asyncio.create_task(batcher.submit(item(1), within(10)))
        late = asyncio.create_task(batcher.submit(item(2), within(0.001)))
        stays = asyncio.create_task(batcher.submit(item(3), within(10)))
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.sleep(0)
        model.go.set()
        with pytest.raises(DeadlineError):
            await late
        await asyncio.gather(running, stays)

    assert batching(scenario).batches == [[0], [3]]


def test_a_cancelled_item_makes_room_in_a_full_queue() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        model.go.clear()
        running = asyncio.create_task(batcher.submit(item(0), within(10)))
        await model.until_entered()
        waiting = [asyncio.create_task(batcher.submit(item(x), within(10))) for x in range(8)]
        await asyncio.sleep(0)
        waiting.pop().cancel()
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(batcher.submit(item(7), within(10))))
        await asyncio.sleep(0)
        model.go.set()
        await asyncio.gather(running, *waiting)

    batching(scenario)


def test_a_failing_batch_fails_its_items_only() -> None:
    async def scenario(batcher: Batcher[float], model: Model) -> None:
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit(item(-1), within(10))
        assert (await batcher.submit(item(1), within(10))).value == 2

    batching(scenario)


def test_closing_cancels_what_waits() -> None:
    model = Model()

    async def run() -> None:
        async with Batcher(model, max_batch=1, max_wait_ms=0, max_queue=8) as batcher:
            model.go.clear()
            running = asyncio.create_task(batcher.submit(item(0), within(10)))
            await model.until_entered()
            waiting = asyncio.create_task(batcher.submit(item(1), within(10)))
            await asyncio.sleep(0)
            model.go.set()
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(asyncio.wait_for(run(), 30))
