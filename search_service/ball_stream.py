"""StreamBall's messages: a ball scanned, read and sent a little at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hashlens import convert
from hashlens.errors import DeadlineError
from hashlens.rpc.limits import check_size
from hashlens.types import Hit, Receipt, StageTimings
from hashlens.v1 import search_service_pb2 as spb
from search_service import ball
from search_service.cancel import Cancel
from search_service.executor import Executor
from search_service.snapshot import Snapshot

MESSAGE_HITS = 1000
"""Most hits of one message."""

MESSAGE_BYTES = 1 << 20
"""A message is closed when it has grown to about this; payloads may be large."""


@dataclass(frozen=True, slots=True, eq=False)
class Ball:
    """What to stream."""

    snapshot: Snapshot
    code: bytes
    """The centre, packed."""
    radius_bits: int
    with_payload: bool
    with_code: bool


@dataclass(slots=True)
class _Tally:
    """What the receipt will say."""

    histogram: NDArray[np.int64]
    queue_ns: int = 0
    coarse_ns: int = 0
    fetch_ns: int = 0
    began_ns: int = field(default_factory=time.monotonic_ns)


class BallStreamer:
    """Streams balls, any number at a time; their scans take turns with searches, block by block.

    Parameters
    ----------
    executor
        Where the kernels run.
    max_message_bytes
        The server's limit.
    """

    def __init__(self, executor: Executor, max_message_bytes: int) -> None:
        self._executor = executor
        self._max_message_bytes = max_message_bytes
        self._scanner = ball.BallScanner()  # only ever entered on the executor's one thread

    async def stream(
        self, wanted: Ball, *, ends_s: float, exact: bool = True
    ) -> AsyncIterator[spb.StreamBallResponse]:
        """Yield the ball's messages, the receipt in the last.

        The next block is scanned when the last one has been taken, so a slow reader holds a
        block's row numbers and one message, and no kernel.

        Parameters
        ----------
        wanted
            The ball.
        ends_s
            When it must be done, on the clock of `time.monotonic`.
        exact
            Whether the snapshot is known to be all there is.

        Raises
        ------
        DeadlineError
            The time is over.
        OverloadedError, UnavailableError
            As `Executor.run`; a part may have been sent.
        InvalidInputError
            A hit is too large for a message.
        """
        snapshot = wanted.snapshot
        tally = _Tally(np.zeros(wanted.radius_bits + 1, dtype=np.int64))
        for first_row in range(0, snapshot.rows, ball.BLOCK_ROWS):
            part = await self._scanned(wanted, first_row, tally, ends_s)
            for lo in range(0, part.rows.shape[0], MESSAGE_HITS):
                began_ns = time.monotonic_ns()
                place = slice(lo, lo + MESSAGE_HITS)
                # Reading ids and payloads may have to wait for a disk.
                messages = await asyncio.to_thread(self._read, wanted, part, place)
                tally.fetch_ns += time.monotonic_ns() - began_ns
                for message in messages:
                    _check_time(ends_s)
                    yield message
        _check_time(ends_s)
        yield spb.StreamBallResponse(receipt=_receipt(wanted, tally, exact=exact))

    async def _scanned(
        self, wanted: Ball, first_row: int, tally: _Tally, ends_s: float
    ) -> ball.Part:
        def work(cancel: Cancel) -> tuple[ball.Part, int]:
            began_ns = time.perf_counter_ns()
            part = self._scanner.scan(
                wanted.snapshot, wanted.code, wanted.radius_bits, first_row, cancel
            )
            return part, time.perf_counter_ns() - began_ns

        outcome = await self._executor.run(work, deadline_s=ends_s - time.monotonic())
        part, took_ns = outcome.value
        tally.queue_ns += outcome.queue_ns
        tally.coarse_ns += took_ns
        tally.histogram += part.histogram
        return part

    def _read(self, wanted: Ball, part: ball.Part, place: slice) -> list[spb.StreamBallResponse]:
        hits = ball.hits_of(
            wanted.snapshot,
            part,
            place,
            with_payload=wanted.with_payload,
            with_code=wanted.with_code,
        )
        # Far below the limit, because a message is closed only when it has grown beyond it.
        limit_bytes = min(MESSAGE_BYTES, self._max_message_bytes // 2)
        messages = list(_messages(hits, wanted.snapshot.n_bits, limit_bytes))
        for message in messages:
            check_size(message.ByteSize(), self._max_message_bytes, "leave payloads and codes out")
        return messages


def _messages(hits: list[Hit], n_bits: int, limit_bytes: int) -> Iterator[spb.StreamBallResponse]:
    """Put hits into as few messages as stay small."""
    message, filled_bytes = spb.StreamBallResponse(), 0
    for hit in hits:
        converted = convert.hit_to_proto(hit, n_bits)
        message.hits.append(converted)
        filled_bytes += converted.ByteSize()
        if filled_bytes >= limit_bytes:
            yield message
            message, filled_bytes = spb.StreamBallResponse(), 0
    if message.hits:
        yield message


def _check_time(ends_s: float) -> None:
    if time.monotonic() >= ends_s:
        raise DeadlineError("the ball was not read in time: allow more time, or a smaller radius")


def _receipt(wanted: Ball, tally: _Tally, *, exact: bool) -> spb.Receipt:
    snapshot = wanted.snapshot
    return convert.receipt_to_proto(
        Receipt(
            rows_scanned=snapshot.n_alive,
            threshold_bits=wanted.radius_bits,
            pool_size=int(tally.histogram.sum()),
            pool_histogram=tuple(tally.histogram.tolist()),
            pool_truncated=False,
            rows_without_feature=0,
            exact=exact,
            version=snapshot.version,
            timings=StageTimings(
                queue_ns=tally.queue_ns,
                coarse_ns=tally.coarse_ns,
                fetch_ns=tally.fetch_ns,
                total_ns=time.monotonic_ns() - tally.began_ns,
            ),
        )
    )
