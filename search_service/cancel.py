"""A flag that long work polls. The work knows the flag, not who raises it or why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from hashlens.errors import CancelledError, DeadlineError

T = TypeVar("T")


class Cancel:
    """Tells work to stop, because its caller left or its time is over.

    Parameters
    ----------
    deadline_s
        Time allowed from now, in seconds; None for no limit.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self._ends_s = None if deadline_s is None else time.monotonic() + deadline_s
        self._is_set = False
        self._set_s = 0.0

    def set(self) -> None:
        """Raise the flag, from any thread; there is no way back."""
        if not self._is_set:
            self._set_s = time.monotonic()
            self._is_set = True

    @property
    def unwanted_s(self) -> float:
        """For how long nobody has wanted the work, in seconds; 0 if somebody does."""
        now_s = time.monotonic()
        since_s = min(
            self._set_s if self._is_set else now_s,
            now_s if self._ends_s is None else self._ends_s,
        )
        return max(now_s - since_s, 0.0)

    @property
    def is_set(self) -> bool:
        """Whether the caller left."""
        return self._is_set

    @property
    def is_late(self) -> bool:
        """Whether the time is over."""
        return self._ends_s is not None and time.monotonic() >= self._ends_s

    @property
    def left_s(self) -> float:
        """How much time is left, in seconds; infinite without a limit."""
        return float("inf") if self._ends_s is None else self._ends_s - time.monotonic()

    def check(self) -> None:
        """Do nothing, or raise what stops the work.

        Raises
        ------
        CancelledError
            The flag is up.
        DeadlineError
            The time is over.
        """
        if self._is_set:
            raise CancelledError("The caller left; the work was stopped.")
        if self.is_late:
            raise DeadlineError("The deadline passed during the work. Allow more time or ask less.")


class AnyOf(Cancel):
    """Is up when nobody wants the work any more.

    Parameters
    ----------
    cancels
        Of those who want it, at least one.
    """

    def __init__(self, cancels: Sequence[Cancel]) -> None:
        super().__init__()
        self._cancels = cancels

    def check(self) -> None:
        """Raise what the first of them raises, once all would."""
        if all(cancel.is_set or cancel.is_late for cancel in self._cancels):
            self._cancels[0].check()


async def in_thread(work: Callable[[Cancel], T]) -> T:
    """Run ``work(cancel)`` in one of the event loop's threads; the flag is up when nobody waits."""
    cancel = Cancel()
    try:
        return await asyncio.to_thread(work, cancel)
    finally:
        cancel.set()
