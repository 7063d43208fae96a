"""One stream of items of the synchronous client: sent as they come, answered in their order."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import grpc

from hashlens.client.unanswered import Unanswered, no_answer
from hashlens.errors import HashlensError, InternalError
from hashlens.rpc.status import error_of_call

T = TypeVar("T")
R = TypeVar("R")


_LOOK_S = 1.0
"""Between two looks at whether a thread still waits for the caller's iterable."""


class _Feed(Generic[T]):
    """Takes items from the caller as there is room, for gRPC's threads to send."""

    def __init__(
        self, items: Iterable[T], build: Callable[[T, int], Any], unanswered: Unanswered
    ) -> None:
        self._items = items
        self._source: Iterator[T] | None = None
        self._build = build
        self._open = unanswered
        self._changed = threading.Condition()
        self._taking = threading.Lock()
        self._n_calls = 0
        self._waiting_since_s = 0.0
        self._is_closed = False
        self.failure: BaseException | None = None
        """What the caller's iterable raised; there are no more items then."""

    def requests(self) -> Iterator[Any]:
        """Return what one call sends: what has no answer, then what the caller gives."""
        with self._changed:
            self._n_calls += 1
            self._open.restart()
            self._changed.notify_all()
            return self._requests(self._n_calls)

    def _requests(self, mine: int) -> Iterator[Any]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over(mine) or self._can_go_on())
                if self._is_over(mine) or self._open.is_sent:
                    return
                request = self._open.next_unsent() if self._open.has_unsent else None
            if request is None:
                self._take(mine)
            else:
                yield request
                del request

    def _is_over(self, mine: int) -> bool:
        return self._is_closed or self._n_calls != mine

    def _can_go_on(self) -> bool:
        state = self._open
        return state.has_unsent or state.is_sent or (state.has_room and not state.is_complete)

    def _take(self, mine: int) -> None:
        """Take one more item from the caller; a call that has ended may still be at it."""
        with self._taking:
            with self._changed:
                if self._is_over(mine) or self._open.has_unsent or self._open.is_complete:
                    return
            try:
                if self._source is None:
                    self._source = iter(self._items)
                request = self._build(next(self._source), self._open.n_taken)
            except BaseException as error:
                if not isinstance(error, StopIteration):
                    self.failure = error
                request = None
            with self._changed:
                if request is None:
                    self._open.is_complete = True
                else:
                    self._open.add(request)
                self._changed.notify_all()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Tell the watch that an answer is waited for."""
        self._waiting_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since_s = float("inf")

    def answered(self, tag: int) -> None:
        """Note that an answer is here."""
        with self._changed:
            self._open.answered(tag)
            self._changed.notify_all()

    def pause(self, error: HashlensError, ends_s: float | None) -> None:
        """Wait before the next call until there is something to send, or nothing will be, or the
        time is over; or raise what ended the last one."""
        with self._changed:
            pause_s = self._open.pause_s(error)
            self._changed.wait_for(lambda: self._is_closed, pause_s)
            # A call with nothing to send would only be ended again. But where no thread of the last
            # one is at the caller's iterable, it takes another call to ask that.
            while not (len(self._open) or self._open.is_complete) and self._taking.locked():
                left_s = _LOOK_S if ends_s is None else ends_s - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(min(left_s, _LOOK_S))

    def watch(self, longest_s: float, late: Callable[[], None]) -> None:
        """Call `late` when an answer is waited for longer than that; return when closed."""
        with self._changed:
            while not self._is_closed:
                waited_s = self._open.overdue_s(self._waiting_since_s)
                if waited_s >= longest_s:
                    late()
                    return
                self._changed.wait_for(lambda: self._is_closed, longest_s - max(waited_s, 0))

    def close(self) -> None:
        """End the threads, but for one that the caller's iterable keeps."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Exchange(Generic[T, R]):
    """One stream.

    Parameters
    ----------
    call
        Begins a call: an iterator of requests and the seconds that are left, or None.
    build
        Makes a request of an item and its tag.
    read
        Makes a result of a reply.
    unanswered
        How far to look ahead; for this stream only.
    answer_s
        Longest to wait for an answer where the stream has no deadline, in seconds.
    """

    def __init__(
        self,
        call: Callable[[Iterator[Any], float | None], Any],
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
        self._running: Any = None
        self._is_late = False

    def results(self, items: Iterable[T], deadline_s: float | None) -> Generator[R]:
        """Yield a result for each item, in their order.

        Parameters
        ----------
        items
            Taken as there is room, in another thread.
        deadline_s
            Time for the whole stream, in seconds; None: as long as answers come.
        """
        ends_s = None if deadline_s is None else time.monotonic() + deadline_s
        feed = _Feed(items, self._build, self._unanswered)
        if ends_s is None:
            threading.Thread(
                target=feed.watch, args=(self._answer_s, self._late), daemon=True
            ).start()
        try:
            while True:
                left_s = None if ends_s is None else max(ends_s - time.monotonic(), 0)
                self._running = self._call(feed.requests(), left_s)
                try:
                    yield from self._replies(feed)
                except grpc.RpcError as failure:
                    if self._is_late:
                        raise no_answer(self._answer_s) from None
                    feed.pause(error_of_call(failure), ends_s)
                    if self._unanswered.is_over:
                        break
                else:
                    break
                finally:
                    self._running.cancel()
            if feed.failure is not None:
                raise feed.failure
            if not self._unanswered.is_sent or len(self._unanswered):
                raise InternalError("the server ended the stream before all was answered")
        finally:
            feed.close()

    def _replies(self, feed: _Feed[T]) -> Generator[R]:
        while True:
            with feed.waiting():
                reply = next(self._running, None)
            if reply is None:
                return
            feed.answered(reply.tag)
            yield self._read(reply)

    def _late(self) -> None:
        self._is_late = True
        self._running.cancel()
