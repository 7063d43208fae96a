"""The load generator of `hashlens bench overload`; it runs in a process of its own.

Calls are due at a rate, whatever has come back, and nothing is sent again: what is refused counts.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from hashlens.rpc import limits

_Call: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


class Fate(IntEnum):
    """What became of a call."""

    ANSWERED = 0
    REFUSED = 1
    """RESOURCE_EXHAUSTED."""
    EXPIRED = 2
    """DEADLINE_EXCEEDED."""
    FAILED = 3
    SHED = 4
    """UNAVAILABLE: turned away by gRPC itself, because a thousand others wait to be looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What to send, and how."""

    target: str
    method: str
    """Full name, such as ``/package.Service/Method``."""
    requests: Sequence[bytes]
    """Sent in turn."""
    deadline_s: float
    in_flight: int = 0
    """Closed loop, where above 0: so many callers for `seconds` of the first phase."""
    phases: Sequence[tuple[float, float]]
    """Calls a second, and for how many seconds, one after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class Fates:
    """What became of all calls, in the order in which they were due; all shape ``[n]``."""

    due_s: NDArray[np.float64]
    """From the beginning."""
    sent_s: NDArray[np.float64]
    ended_s: NDArray[np.float64]
    fate: NDArray[np.int64]
    """A `Fate`."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Code and message -> how many calls failed with it; those that were refused or expired are
    not among them."""

    @property
    def latency_ms(self) -> NDArray[np.float64]:
        """From when a call was due, not from when it was sent."""
        latency: NDArray[np.float64] = (self.ended_s - self.due_s) * 1e3
        return latency


def run(offer: Offer) -> Fates:
    """Offer a load, and tell what became of it."""
    return asyncio.run(_run(offer))


async def _run(offer: Offer) -> Fates:
    options = [*limits.channel_options(), ("grpc.enable_retries", 0)]
    calls: list[tuple[float, float, float, int]] = []
    failures: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(offer.target, options) as channel:
        call: _Call = channel.unary_unary(offer.method)
        await call(offer.requests[0], timeout=60)
        began_s = time.perf_counter()

        async def send(number: int, due_s: float) -> None:
            sent_s = time.perf_counter() - began_s
            fate = Fate.ANSWERED
            try:
                await call(offer.requests[number % len(offer.requests)], timeout=offer.deadline_s)
            except grpc.aio.AioRpcError as error:
                fate = _FATES.get(error.code(), Fate.FAILED)
                if fate in (Fate.FAILED, Fate.SHED):
                    failures[f"{error.code().name}: {error.details()}"] += 1
            calls.append((due_s, sent_s, time.perf_counter() - began_s, fate))

        if offer.in_flight:
            ends_s = offer.phases[0][1]

            async def caller(number: int) -> None:
                while (now_s := time.perf_counter() - began_s) < ends_s:
                    await send(number, now_s)
                    number += offer.in_flight

            await asyncio.gather(*map(caller, range(offer.in_flight)))
        else:
            running: set[asyncio.Task[None]] = set()
            first_s, number = 0.0, 0
            for calls_per_s, seconds in offer.phases:
                n = int(calls_per_s * seconds)
                for i in range(n):
                    due_s = first_s + i / calls_per_s
                    ahead_s = due_s - (time.perf_counter() - began_s)
                    await asyncio.sleep(max(ahead_s, 0.0))
                    task = asyncio.create_task(send(number, due_s))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    number += 1
                first_s += n / calls_per_s
            if running:
                await asyncio.wait(running)
    columns = np.array(sorted(calls)).T
    return Fates(columns[0], columns[1], columns[2], columns[3].astype(np.int64), failures)


_FATES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Fate.REFUSED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Fate.EXPIRED,
    grpc.StatusCode.UNAVAILABLE: Fate.SHED,
}
