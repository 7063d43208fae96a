"""The load generator of `hashlens bench serve`; it runs in a process of its own.

Requests go out as bytes made before, and replies are not parsed: what the client spends is a call
of gRPC's and no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from hashlens.rpc import limits

_DEADLINE_S = 20.0
_DRAIN_S = 10.0
"""Longest for calls to come back once the time is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send, and how."""

    target: str
    method: str
    """Full name, such as ``/package.Service/Method``."""
    requests: Sequence[bytes]
    """Sent in turn, again from the first after the last."""
    seconds: float
    warmup_s: float = 0.5
    """Before, which does not count."""
    in_flight: int = 0
    """Closed loop: so many callers, each sends its next call when it has the last one's reply."""
    calls_per_s: float = 0.0
    """Open loop, where above 0: calls are due at this rate, whatever has come back."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of it."""

    calls_per_s: float
    latencies_ms: tuple[float, ...]
    """Of the calls that succeeded. In an open loop from when a call was due, not from when it could
    be sent: a server that stalls is not spared the calls that it kept from being sent."""
    n_failed: int

    def percentile_ms(self, percent: float) -> float:
        """Return a latency that `percent` of the calls did not exceed."""
        return (
            float(np.percentile(self.latencies_ms, percent)) if self.latencies_ms else float("nan")
        )


def run(load: Load) -> Loaded:
    """Apply a load and measure."""
    return asyncio.run(_run(load))


async def _run(load: Load) -> Loaded:
    options = limits.channel_options()
    async with grpc.aio.insecure_channel(load.target, options) as channel:
        call = channel.unary_unary(load.method)
        await call(load.requests[0], timeout=_DEADLINE_S)
        drive = _open if load.calls_per_s else _closed
        return await drive(load, call)
