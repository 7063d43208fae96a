"""What a stream has sent and has no answer to: the bound of its look-ahead, and what to repeat."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hashlens.errors import DeadlineError, HashlensError, InternalError, UnavailableError

_TRIES = 4
"""Calls in a row that may end without a single answer, as for other calls."""

_PAUSE_S = (0.1, 1.0)
"""After the first of them, and the longest."""


@dataclass(slots=True)
class Unanswered:
    """Requests of one stream, in their order, on one call after another.

    Answers come in the order of the requests. When a call ends before all are answered, another one
    goes on with the first that is not.
    """

    max_items: int
    max_bytes: int
    """Most bytes of them; one more request may go beyond it."""
    n_taken: int = 0
    """Requests that were made, over all calls; the next one's tag."""
    n_sent: int = 0
    """How many of those that are held are sent on the call of now."""
    is_complete: bool = False
    """Whether nothing more will be added."""
    _held: deque[tuple[Any, int]] = field(default_factory=deque)
    _held_bytes: int = 0
    _head_since_s: float = 0.0
    _n_failed: int = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def has_room(self) -> bool:
        """Whether one more may be taken from the caller."""
        return len(self._held) < self.max_items and self._held_bytes < self.max_bytes

    @property
    def has_unsent(self) -> bool:
        """Whether the call of now is to get another one of them.

        After a call that failed, the next gets one until it has answered: why it fails is hidden
        where it ends while more is on its way.
        """
        return self.n_sent < (min(len(self._held), 1) if self._n_failed else len(self._held))

    @property
    def is_sent(self) -> bool:
        """Whether the call of now has all there will be."""
        return self.is_complete and self.n_sent == len(self._held)

    @property
    def is_over(self) -> bool:
        """Whether all there will be is answered."""
        return self.is_complete and not self._held

    def add(self, request: Any) -> None:
        """Add one."""
        if not self._held:
            self._head_since_s = time.monotonic()
        size_bytes = request.ByteSize()
        self._held.append((request, size_bytes))
        self._held_bytes += size_bytes
        self.n_taken += 1

    def restart(self) -> None:
        """Begin another call."""
        self.n_sent = 0

    def next_unsent(self) -> Any:
        """Return the next request to send."""
        request, _ = self._held[self.n_sent]
        self.n_sent += 1
        return request

    def answered(self, tag: int) -> None:
        """Let the first go: its answer is here."""
        expected = self.n_taken - len(self._held)
        if not self._held or tag != expected:
            raise InternalError(f"the answer to item {tag} came where that to {expected} was due")
        _, size_bytes = self._held.popleft()
        self._held_bytes -= size_bytes
        self.n_sent -= 1
        self._n_failed = 0
        self._head_since_s = time.monotonic()

    def overdue_s(self, waiting_since_s: float) -> float:
        """Return for how long an answer has been waited for, in seconds."""
        if not self._held:
            return 0.0
        return time.monotonic() - max(self._head_since_s, waiting_since_s)

    def pause_s(self, error: HashlensError) -> float:
        """Return when to go on with another call, in seconds, or raise what ended the last one."""
        first_s, longest_s = _PAUSE_S
        if isinstance(error, UnavailableError) and not self._held:
            return first_s  # A stream that had nothing to do was ended: nothing has failed.
        self._n_failed += 1
        if not isinstance(error, UnavailableError) or self._n_failed >= _TRIES:
            raise error from None
        return min(first_s * 2.0 ** (self._n_failed - 1), longest_s)


def no_answer(waited_s: float) -> DeadlineError:
    """Return the error of a stream whose next answer does not come."""
    return DeadlineError(
        f"no answer has come for {waited_s:g} s: allow more time, or go on with the first "
        "item that has none"
    )
