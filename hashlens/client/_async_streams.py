"""One stream of items of the asynchronous client: sent as they come, answered in their order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
)
from typing import Any, Generic, TypeVar

import grpc

from hashlens.client.unanswered import Unanswered, no_answer
from hashlens.errors import HashlensError, InternalError, UnavailableError
from hashlens.rpc.status import error_of_call

T = TypeVar("T")
R = TypeVar("R")

_ENDED_DURING_WRITE = "Internal error from Core"
"""What gRPC says then; the server's status is lost."""


class _Feed(Generic[T]):
    """Takes items from the caller as there is room, in a task of its own, for calls to send."""

    def __init__(
        self,
        items: AsyncIterable[T] | Iterable[T],
        build: Callable[[T, int], Any],
        unanswered: Unanswered,
    ) -> None:
        self._build = build
        self._open = unanswered
        self._changed = asyncio.Event()
        self._n_calls = 0
        self._is_closed = False
        self.failure: BaseException | None = None
        """What the caller's iterable raised; there are no more items then."""
        self._taking = asyncio.create_task(self._take(_each(items)))

    def requests(self) -> AsyncIterator[Any]:
        """Return what one call sends: what has no answer, then what the caller gives."""
        self._n_calls += 1
        self._open.restart()
        self._note()
        return self._requests(self._n_calls)

    async def _requests(self, mine: int) -> AsyncIterator[Any]:
        # A call that has ended goes on asking for what to send.
        while not (self._is_closed or self._n_calls != mine or self._open.is_sent):
            if self._open.has_unsent:
                yield self._open.next_unsent()
            else:
                await self._change()

    async def _take(self, items: AsyncIterator[T]) -> None:
        try:
            while True:
                while not self._open.has_room:
                    await self._change()
                self._open.add(self._build(await anext(items), self._open.n_taken))
                self._note()
        except StopAsyncIteration:
            pass
        except BaseException as error:
            if self._is_closed:
                raise
            self.failure = error
        self._open.is_complete = True
        self._note()

    async def more(self, ends_s: float | None) -> None:
        """Wait until there is something to send, or nothing will be, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if ends_s is None else ends_s - time.monotonic()):
                while not (len(self._open) or self._open.is_complete):
                    await self._change()

    def answered(self, tag: int) -> None:
        """Note that an answer is here."""
        self._open.answered(tag)
        self._note()

    async def close(self) -> None:
        """Take nothing more."""
        self._is_closed = True
        self._note()
        self._taking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._taking

    async def _change(self) -> None:
        await self._changed.wait()

    def _note(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _each(items: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _error_of(failure: grpc.aio.AioRpcError) -> HashlensError:
    """Return why a call ended; gRPC calls it INTERNAL, of its own, if it ended during a write."""
    if failure.code() is grpc.StatusCode.INTERNAL and failure.details() == _ENDED_DURING_WRITE:
        return UnavailableError("the call ended before all was sent")
    return error_of_call(failure)


class AsyncExchange(Generic[T, R]):
    """One stream; see `hashlens.client._sync_streams.Exchange`."""

    def __init__(
        self,
        call: Callable[[AsyncIterator[Any], float | None], Any],
        build: Callable[[T, int], Any],
        read: Callable[[Any], R],
        unanswered: Unanswered,
        answer_s: float,
    ) -> None:
        self._call = call
        self._build = build
        self._read = read
        self._unanswered = unanswered
        self._answer_s = answer_s

    async def results(
        self, items: AsyncIterable[T] | Iterable[T], deadline_s: float | None
    ) -> AsyncGenerator[R]:
        """Yield a result for each item, in their order.

        Parameters
        ----------
        items
            Taken as there is room, in another task.
        deadline_s
            Time for the whole stream, in seconds; None: as long as answers come.
        """
        ends_s = None if deadline_s is None else time.monotonic() + deadline_s
        feed = _Feed(items, self._build, self._unanswered)
        try:
            while True:
                left_s = None if ends_s is None else max(ends_s - time.monotonic(), 0)
                running = self._call(feed.requests(), left_s)
                try:
                    while (reply := await self._next(running, ends_s)) is not grpc.aio.EOF:
                        feed.answered(reply.tag)
                        yield self._read(reply)
                except grpc.aio.AioRpcError as failure:
                    await asyncio.sleep(self._unanswered.pause_s(_error_of(failure)))
                    # A call with nothing to send would only be ended again.
                    await feed.more(ends_s)
                    if self._unanswered.is_over:
                        break
                else:
                    break
                finally:
                    running.cancel()
            if feed.failure is not None:
                raise feed.failure
            if not self._unanswered.is_sent or len(self._unanswered):
                raise InternalError("the server ended the stream before all was answered")
        finally:
            await feed.close()

    async def _next(self, running: Any, ends_s: float | None) -> Any:
        """Read a reply; where the stream has no deadline, it has to come in time."""
        if ends_s is not None:
            return await running.read()
        reading = asyncio.ensure_future(running.read())
        since_s = time.monotonic()
        try:
            while not reading.done():
                waited_s = self._unanswered.overdue_s(since_s)
                if waited_s >= self._answer_s:
                    raise no_answer(self._answer_s)
                await asyncio.wait([reading], timeout=self._answer_s - waited_s)
            return reading.result()
        finally:
            reading.cancel()
