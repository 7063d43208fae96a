"""Admission: so many calls of a method at a time, so many bytes of requests; what is too much is
refused at once, before its request is read.

A place is taken when a call arrives and given back when its task ends, however it ends: answered,
failed, aborted, cancelled by its caller, or never begun because its request did not come.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

import grpc

from hashlens.errors import DeadlineError
from hashlens.rpc import status
from hashlens.rpc.intake import Intake

Context = grpc.aio.ServicerContext[Any, Any]

_RETRY_S: Final = (0.05, 10.0)
"""Soonest and latest that a refused caller is told to come back."""

_SWEEP_S: Final = 1.0
"""Between two looks at calls that nothing else would end."""

_OVERTIME_S: Final = 2.0
"""Beyond its deadline, for a handler that ends by itself to do so."""

_FREE_READS: Final = 4
"""Requests of methods without a limit that are read at a time. They come from anybody, each may be
as long as a message can be, and an honest one is read at once."""

_FREE_PATIENCE_S: Final = 0.25
"""How long such a request may take while others wait for its turn."""


@dataclass(slots=True, eq=False)
class Lane:
    """One method: its limit and what has become of its calls."""

    method: str
    """Full path."""
    max_in_flight: int
    has_end: bool = True
    """Whether a call whose client sets no deadline gets the default one."""
    in_flight: int = 0
    """Calls that have been admitted and are not over."""
    n_admitted: int = 0
    n_refused: int = 0
    """Calls that met a full house."""
    n_expired: int = 0
    """Calls whose deadline had passed when their request was there."""
    n_cut: int = 0
    """Calls that were ended because their caller did not send, or did not read."""
    mean_s: float = 0.05
    """How long a call takes, a moving average."""

    chance: random.Random = field(default_factory=random.Random, repr=False)

    def retry_after_s(self) -> float:
        """Return when to come back: about when the calls of now are done, not all at once."""
        soonest_s, latest_s = _RETRY_S
        mean_s = self.mean_s * self.chance.uniform(0.5, 1.5)
        return round(min(max(mean_s, soonest_s), latest_s), 3)


@dataclass(slots=True, eq=False)
class AdmittedCall:
    """A call that has been admitted."""

    lane: Lane
    task: asyncio.Task[Any]
    began_s: float
    ends_s: float
    """When it is ended whatever it does; on the clock of `time.monotonic`."""
    around: contextvars.Context
    """The context variables of its task."""
    context: Context | None = None
    has_begun: bool = False
    """Whether its request is there."""


@dataclass(eq=False)
class Admission:
    """Who is let in.

    Parameters
    ----------
    limits
        Calls of each method at a time, by full path. Other methods are always let in: health. A
        few of their requests are read at a time, beside those that `intake` counts.
    intake
        How many bytes of requests.
    request_s
        Longest for a request to arrive, in seconds.
    default_deadline_s
        Time of a call whose client sets none.
    """

    limits: Mapping[str, int]
    intake: Intake
    request_s: float
    default_deadline_s: float
    lanes: dict[str, Lane] = field(init=False)
    """By full path."""
    free: Lane = field(init=False)
    """Stands for all other methods."""
    free_intake: Intake = field(init=False)
    _calls: set[AdmittedCall] = field(init=False, default_factory=set)
    _cutting: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _is_sweeping: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.lanes = {method: Lane(method, limit) for method, limit in self.limits.items()}
        self.free = Lane("/other", sys.maxsize, has_end=False)
        message_bytes = self.intake.max_message_bytes
        self.free_intake = Intake(
            max_bytes=_FREE_READS * message_bytes,
            max_message_bytes=message_bytes,
            request_s=self.request_s,
            patience_s=_FREE_PATIENCE_S,
        )

    def admit(self, lane: Lane) -> AdmittedCall:
        """Take a place for the running task, until it ends."""
        task = asyncio.current_task()
        assert task is not None
        began_s = time.monotonic()
        ends_s = began_s + self.request_s + _OVERTIME_S
        call = AdmittedCall(lane, task, began_s, ends_s, contextvars.copy_context())
        lane.in_flight += 1
        lane.n_admitted += 1
        self._calls.add(call)
        task.add_done_callback(lambda _: self._over(call))
        if not self._is_sweeping:
            self._is_sweeping = True
            # It is not this call's: what it does for others must not be told of this one.
            asyncio.get_running_loop().call_later(
                _SWEEP_S, self._sweep, context=contextvars.Context()
            )
        return call

    def begin(self, call: AdmittedCall, context: Context) -> None:
        """Note that a call's request is there.

        Raises
        ------
        DeadlineError
            Too late for anybody.
        """
        call.context = context
        call.has_begun = True
        # None, whatever the stubs say, when the client set no deadline.
        left_s = cast(float | None, context.time_remaining())
        if left_s is not None and left_s <= 0:
            call.lane.n_expired += 1
            raise DeadlineError("the deadline passed before the call was begun")
        if left_s is None:
            left_s = self.default_deadline_s if call.lane.has_end else float("inf")
        call.ends_s = time.monotonic() + left_s + _OVERTIME_S

    def begin_stream(self, call: AdmittedCall, context: Context) -> None:
        """Note that a call is one of many requests, which says itself when it has waited enough."""
        call.context = context
        call.ends_s = float("inf")

    def _over(self, call: AdmittedCall) -> None:
        self._calls.discard(call)
        lane = call.lane
        lane.in_flight -= 1
        lane.mean_s += (time.monotonic() - call.began_s - lane.mean_s) / 16

    def _sweep(self) -> None:
        """End the calls that have outlived their time: whose caller takes no reply, say."""
        now_s = time.monotonic()
        for call in [call for call in self._calls if call.ends_s <= now_s]:
            call.ends_s = float("inf")
            call.lane.n_cut += 1
            if call.context is None:
                call.task.cancel()
            else:
                cutting = asyncio.create_task(
                    _cut(call.context, call.task, has_begun=call.has_begun), context=call.around
                )
                self._cutting.add(cutting)
                cutting.add_done_callback(self._cutting.discard)
        self._is_sweeping = bool(self._calls)
        if self._is_sweeping:
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)


async def _cut(context: Context, task: asyncio.Task[Any], *, has_begun: bool) -> None:
    """End a call from outside: its caller is told, should it ever read again."""
    error = DeadlineError(
        "the call was over time, and its caller did not read: allow it more"
        if has_begun
        else "the request did not come in time: send it faster, or less of it"
    )
    told = asyncio.ensure_future(status.abort(context, error))
    await asyncio.wait([told], timeout=_OVERTIME_S)
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        told.cancel()
        await told
