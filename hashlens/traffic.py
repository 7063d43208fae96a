"""The load generator of `hashlens bench serve` and `encode`; it runs in a process of its own.

Requests go out as bytes made before, and replies are not parsed: what the client spends is a call
of gRPC's and no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import grpc
import numpy as np

from hashlens.rpc import limits

_DEADLINE_S = 20.0
_YIELD_CALLS = 8
"""Who is late with its calls sends so many before it looks for replies."""

_Call: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send, and how."""

    method: str
    """Full name, such as ``/package.Service/Method``."""
    target: str = ""
    requests: Sequence[bytes]
    """Sent in turn, again from the first after the last."""
    seconds: float
    warmup_s: float = 0.5
    """Before, which does not count."""
    in_flight: int = 0
    """Closed loop: so many callers, each sends its next call when it has the last one's reply."""
    calls_per_s: float = 0.0
    """Open loop, where above 0: calls are due at this rate, whatever has come back."""

    def to(self, target: str) -> Load:
        """Return the same for another server."""
        return replace(self, target=target)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of it."""

    calls_per_s: float
    latencies_ms: tuple[float, ...]
    """Of the calls that succeeded. In an open loop from when a call was due, not from when it could
    be sent: a server that stalls is not spared the calls that it kept from being sent."""
    n_failed: int
    n_sent: int
    """All calls, those of the warm-up and the failed ones too."""
    cpu_s: float = 0.0
    """CPU time that sending and receiving them took this process, in seconds."""

    def percentile_ms(self, percent: float) -> float:
        """Return a latency that `percent` of the calls did not exceed."""
        return (
            float(np.percentile(self.latencies_ms, percent)) if self.latencies_ms else float("nan")
        )


def run(load: Load) -> Loaded:
    """Apply a load and measure."""
    before_s = time.process_time()
    loaded = asyncio.run(_run(load))
    return replace(loaded, cpu_s=time.process_time() - before_s)


async def _run(load: Load) -> Loaded:
    async with grpc.aio.insecure_channel(load.target, limits.channel_options()) as channel:
        call: _Call = channel.unary_unary(load.method)
        await call(load.requests[0], timeout=_DEADLINE_S)
        return await (_open_loop if load.calls_per_s else _closed_loop)(load, call)


class _Tally:
    """Latencies of the calls that were due after the warm-up."""

    def __init__(self, load: Load) -> None:
        self.begins_s = time.perf_counter() + load.warmup_s
        self.ends_s = self.begins_s + load.seconds
        self.latencies_ms: list[float] = []
        self.n_failed = 0
        self.n_sent = 0
        self.last_s = self.begins_s

    @property
    def is_empty(self) -> bool:
        """Whether no call has counted yet."""
        return not self.latencies_ms and not self.n_failed

    async def send(self, call: _Call, request: bytes, due_s: float) -> None:
        self.n_sent += 1
        try:
            await call(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError:
            self.n_failed += due_s >= self.begins_s
            return
        now_s = time.perf_counter()
        if due_s >= self.begins_s:
            self.latencies_ms.append((now_s - due_s) * 1e3)
            self.last_s = now_s

    def loaded(self) -> Loaded:
        spent_s = max(self.last_s, self.ends_s) - self.begins_s
        return Loaded(
            len(self.latencies_ms) / spent_s,
            tuple(self.latencies_ms),
            self.n_failed,
            self.n_sent,
        )


async def _closed_loop(load: Load, call: _Call) -> Loaded:
    tally = _Tally(load)

    async def caller(number: int) -> None:
        # One counts in any case: the machine may have stood still in the meantime.
        while (now_s := time.perf_counter()) < tally.ends_s or tally.is_empty:
            await tally.send(call, load.requests[number % len(load.requests)], now_s)
            number += load.in_flight

    await asyncio.gather(*map(caller, range(load.in_flight)))
    return tally.loaded()


async def _open_loop(load: Load, call: _Call) -> Loaded:
    tally = _Tally(load)
    first_s, number = time.perf_counter(), 0
    running: set[asyncio.Task[None]] = set()
    while (due_s := first_s + number / load.calls_per_s) < tally.ends_s:
        ahead_s = due_s - time.perf_counter()
        if ahead_s > 0:
            await asyncio.sleep(ahead_s)
        elif number % _YIELD_CALLS == 0:
            await asyncio.sleep(0)
        request = load.requests[number % len(load.requests)]
        task = asyncio.create_task(tally.send(call, request, due_s))
        running.add(task)
        task.add_done_callback(running.discard)
        number += 1
    if running:
        await asyncio.wait(running)
    return tally.loaded()
