from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import (
    CancelledError,
    DeadlineError,
    InvalidInputError,
    OverloadedError,
)
from search_service import ball
from search_service.ball_stream import MESSAGE_HITS, Ball, BallStreamer
from search_service.cancel import Cancel
from search_service.executor import Executor
from search_service.snapshot import Snapshot

N_BITS = 24
MAX_BYTES = 1 << 22


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(n_threads=2, max_queue=2) as executor:
        yield executor


class Payloads:
    """Ids and payloads of rows; counts what is read."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.n_read = 0

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        return [f"row-{row}" for row in rows.tolist()]

    def row_of(self, item_id: str) -> int | None:
        return int(item_id.removeprefix("row-"))

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        self.n_read += rows.shape[0]
        return [self.payload] * rows.shape[0]


def whole_table(n: int, payload: bytes = b"") -> tuple[Ball, Payloads]:
    words = codes.as_words(
        codes.pack(np.random.default_rng(0).random((n, N_BITS)) < 0.5),
    )
    ids = Payloads(payload)
    plain = Snapshot.from_arrays(np.zeros((0, 3), np.uint8), n_bits=N_BITS)
    snapshot = Snapshot(
        n_bits=N_BITS,
        dim=0,
        feature_dtype=plain.feature_dtype,
        version=1,
        rows=n,
        n_alive=n,
        words=tuple(words),
        ids=ids,
    )
    return Ball(snapshot, bytes(3), N_BITS, with_payload=True, with_code=False), ids


def soon() -> float:
    return time.monotonic() + 30


def test_messages_stay_small_whatever_the_payloads(executor: Executor) -> None:
    wanted, _ = whole_table(2500, payload=bytes(20_000))

    async def sizes() -> list[tuple[int, int]]:
        stream = BallStreamer(executor, MAX_BYTES).stream(wanted, ends_s=soon())
        return [(len(message.hits), message.ByteSize()) async for message in stream]

    found = asyncio.run(sizes())
    assert sum(n for n, _ in found) == 2500
    assert max(n for n, _ in found) <= MESSAGE_HITS
    assert max(size for _, size in found) < 1.1 * 2**20
    assert len(found) < 2500 * 20_000 / 2**20 + 10


def test_a_hit_that_no_message_holds_is_refused_with_advice(executor: Executor) -> None:
    wanted, _ = whole_table(3, payload=bytes(50_000))

    async def read() -> None:
        async for _ in BallStreamer(executor, 40_000).stream(wanted, ends_s=soon()):
            pass

    with pytest.raises(InvalidInputError, match="leave payloads and codes out"):
        asyncio.run(read())


def test_a_reader_that_stops_holds_no_kernel_and_causes_no_more_reading(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ball, "BLOCK_ROWS", 6400)
    wanted, ids = whole_table(64_000, payload=b"x")

    async def stop_early() -> None:
        stream = BallStreamer(executor, MAX_BYTES).stream(wanted, ends_s=soon())
        async with aclosing(stream):
            await anext(stream)
            assert ids.n_read == MESSAGE_HITS
            # The stream is open and half read, and yet others are served at once.
            done = await executor.run(lambda cancel: "served", deadline_s=20)
            assert done.value == "served"
        assert ids.n_read == MESSAGE_HITS

    asyncio.run(stop_early())


def test_a_caller_that_leaves_during_a_scan_frees_the_executor(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = whole_table(100)
    entered, stopped = threading.Event(), threading.Event()

    def endless(
        self: ball.BallScanner,
        snapshot: Snapshot,
        code: bytes,
        radius_bits: int,
        first_row: int,
        cancel: Cancel,
    ) -> ball.Part:
        entered.set()
        try:
            while True:
                cancel.check()
                time.sleep(0.001)
        except CancelledError:
            stopped.set()
            raise

    monkeypatch.setattr(ball.BallScanner, "scan", endless)

    async def leave() -> None:
        stream = BallStreamer(executor, MAX_BYTES).stream(wanted, ends_s=soon())
        reading = asyncio.ensure_future(anext(stream))
        assert await asyncio.to_thread(entered.wait, 10)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(stopped.wait, 10)
        assert (await executor.run(lambda cancel: 1, deadline_s=20)).value == 1

    asyncio.run(leave())


def test_time_is_over_before_and_between_messages(executor: Executor) -> None:
    wanted, _ = whole_table(3000)

    async def read_slowly(allowed_s: float) -> int:
        n = 0
        ends_s = time.monotonic() + allowed_s
        async for message in BallStreamer(executor, MAX_BYTES).stream(wanted, ends_s=ends_s):
            n += len(message.hits)
            await asyncio.sleep(max(0.0, ends_s - time.monotonic()))
        return n

    for allowed_s in (-1.0, 1.0):
        with pytest.raises(DeadlineError):
            asyncio.run(read_slowly(allowed_s))


def test_a_full_queue_refuses_the_ball(executor: Executor) -> None:
    wanted, _ = whole_table(100)
    running, release = threading.Event(), threading.Event()

    def hold(cancel: Cancel) -> None:
        running.set()
        release.wait(10)

    async def crowd() -> None:
        jobs = [asyncio.ensure_future(executor.run(hold))]
        try:
            assert await asyncio.to_thread(running.wait, 10)
            jobs += [asyncio.ensure_future(executor.run(hold)) for _ in range(2)]
            await asyncio.sleep(0)  # They are queued now: the queue is full.
            with pytest.raises(OverloadedError):
                await anext(BallStreamer(executor, MAX_BYTES).stream(wanted, ends_s=soon()))
        finally:
            release.set()
            await asyncio.gather(*jobs)

    asyncio.run(crowd())
