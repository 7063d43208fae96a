"""Items in, answers out in the same order, on one call: a window, no reading ahead, an end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc

from hashlens.errors import DeadlineError, UnavailableError
from hashlens.rpc import status
from hashlens.rpc.deadline import deadline_s
from hashlens.rpc.server_config import ServerConfig


class Sized(Protocol):
    """A message."""

    def ByteSize(self) -> int:  # noqa: N802 - protobuf's name
        """Return its length."""


Q = TypeVar("Q", bound=Sized)
R = TypeVar("R")

_NEVER = float("inf")

_TOLD_S = 1.0
"""Given to the status of a call that is cut, to be on its way before the call's task is ended."""

_GO_ON = "open another and go on with the first item that has no answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """What one stream may take."""

    window: int
    """Most items that have been read and whose answers have not been sent."""
    window_bytes: int
    """Most bytes of them; one more item may go beyond it."""
    idle_s: float
    """Longest with nothing to do, or with an answer that the caller does not take, in seconds."""


@dataclass(slots=True, eq=False)
class _Taken(Generic[R]):
    answer: asyncio.Future[R]
    size_bytes: int


class ItemStream(Generic[Q, R]):
    """One call of a stream of items, for one event loop.

    The next item is read when there is room in the window, and an answer leaves the window when
    gRPC has taken it from us, which it does as the caller reads. So a caller that writes without
    reading, or faster than we work, is stopped by gRPC's flow control.

    Parameters
    ----------
    begin
        Begins an item's work and returns its answer to be, which is cancelled when nobody wants it
        any more. Gets the item and when it must be done, on the clock of `time.monotonic`.
    context
        The call's.
    config
        The server's.
    limits
        What the stream may take.
    stopping
        Set when the server stops.
    """

    def __init__(
        self,
        begin: Callable[[Q, float], asyncio.Future[R]],
        context: grpc.aio.ServicerContext[Any, Any],
        config: ServerConfig,
        limits: StreamLimits,
        stopping: asyncio.Event,
    ) -> None:
        self._begin = begin
        self._context = context
        self._limits = limits
        self._stopping = stopping
        self._item_s = config.default_deadline_s
        # None, whatever the stubs say, when the client set no deadline.
        has_end = cast(float | None, context.time_remaining()) is not None
        left_s = deadline_s(context, config) if has_end else _NEVER
        self._ends_s = time.monotonic() + left_s
        self._reader: asyncio.Task[None] | None = None
        self._cutting: asyncio.Task[None] | None = None
        self._window: deque[_Taken[R]] = deque()
        self._held_bytes = 0
        self._arrived = asyncio.Event()
        self._has_room = asyncio.Event()
        # However the call ends: a generator that is suspended in `yield` is not told of it.
        context.add_done_callback(self._over)  # type: ignore[arg-type]  # See the stubs' class.

    async def answers(self, requests: AsyncIterator[Q]) -> AsyncGenerator[R]:
        """Yield the answers in the order of the items.

        Raises
        ------
        DeadlineError
            The stream's deadline passed.
        UnavailableError
            The server stops, and everything that was read is answered; or the stream was idle.
        HashlensError
            What `requests` raises, after the answers to the items before.
        """
        reader = self._reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: reader.cancelled() or reader.exception())
        stopped = asyncio.create_task(self._stopping.wait())
        stopped.add_done_callback(lambda _: reader.cancel())
        me = asyncio.current_task()
        assert me is not None
        loop = asyncio.get_running_loop()
        try:
            while await self._next_is_there(reader):
                answer = self._window[0].answer.result()
                not_read = loop.call_later(self._limits.idle_s, self._not_read, me)
                try:
                    yield answer
                finally:
                    not_read.cancel()
                self._held_bytes -= self._window.popleft().size_bytes
                self._has_room.set()
        finally:
            stopped.cancel()
            self._drop()

    async def _next_is_there(self, reader: asyncio.Task[None]) -> bool:
        """Wait for the next answer; False after the last."""
        while not self._window:
            if reader.cancelled() or (reader.cancelling() and not reader.done()):
                raise UnavailableError(f"the service is stopping: {_GO_ON}")
            if reader.done():
                reader.result()
                return False
            self._arrived.clear()
            arrived = asyncio.ensure_future(self._arrived.wait())
            try:
                if not await self._wait({reader, arrived}, self._limits.idle_s):
                    raise UnavailableError(
                        f"nothing was sent for {self._limits.idle_s:g} s: the stream is closed, "
                        "open another when there is more"
                    )
            finally:
                arrived.cancel()
        answer = self._window[0].answer
        if not answer.done():
            await self._wait({answer}, _NEVER)
        return True

    async def _wait(self, awaited: set[Any], timeout_s: float) -> bool:
        """Wait for one of several; False after a time-out, DeadlineError at the stream's end."""
        left_s = self._ends_s - time.monotonic()
        bound_s = min(left_s, timeout_s)
        done, _ = await asyncio.wait(
            awaited,
            timeout=None if bound_s == _NEVER else max(bound_s, 0),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done and left_s <= timeout_s:
            raise DeadlineError(f"the stream was not done in time: allow more time, or {_GO_ON}")
        return bool(done)

    async def _read(self, requests: AsyncIterator[Q]) -> None:
        limits = self._limits
        async for request in requests:
            ends_s = self._ends_s
            if ends_s == _NEVER:
                ends_s = time.monotonic() + self._item_s
            size_bytes = request.ByteSize()
            self._window.append(_Taken(self._begin(request, ends_s), size_bytes))
            # What is large is not kept until the next has come.
            del request
            self._held_bytes += size_bytes
            self._arrived.set()
            while len(self._window) >= limits.window or self._held_bytes >= limits.window_bytes:
                self._has_room.clear()
                await self._has_room.wait()

    def _not_read(self, task: asyncio.Task[Any]) -> None:
        self._cutting = asyncio.create_task(self._cut(task))

    async def _cut(self, task: asyncio.Task[Any]) -> None:
        """End the call from outside: its own task waits until the caller reads."""
        error = UnavailableError(
            f"no answer was read for {self._limits.idle_s:g} s: read them as they come, or {_GO_ON}"
        )
        with contextlib.suppress(TimeoutError, grpc.aio.AbortError):
            await asyncio.wait_for(status.abort(self._context, error), _TOLD_S)
        task.cancel()

    def _over(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._drop()

    def _drop(self) -> None:
        """Drop the work that nobody waits for any more."""
        if self._reader is not None:
            self._reader.cancel()
        for taken in self._window:
            taken.answer.cancel()
