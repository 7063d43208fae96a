"""How many bytes of requests a server holds: those being read, and those in the works."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

_WAIT_S: Final = 1.0
"""Longest that a call waits for a place to read its request."""

_PATIENCE_S: Final = 2.0
"""How long a request may take to arrive while others wait for its place."""


class Place:
    """Room for one request: as large as one may be until it is read, then as large as it is."""

    __slots__ = ("_bytes", "_intake", "began_s", "is_scarce")

    def __init__(self, intake: Intake, n_bytes: int, *, is_scarce: bool) -> None:
        self._intake = intake
        self._bytes = n_bytes
        self.began_s = time.monotonic()
        self.is_scarce = is_scarce
        """Whether it is one of the last, which have to be free again soon."""

    def filled(self, n_bytes: int) -> None:
        """Note that the request is there."""
        self._intake.settle(self, self._bytes, n_bytes)
        self._bytes = n_bytes

    def leave(self) -> None:
        """Give the room back; twice is fine."""
        self._intake.settle(self, self._bytes, 0)
        self._bytes = 0

    def cut_s(self) -> float:
        """Return how much longer the request may take to arrive, in seconds."""
        intake = self._intake
        allowed_s = intake.request_s
        if intake.n_waiting:
            allowed_s = _PATIENCE_S if intake.patience_s is None else intake.patience_s
        return self.began_s + allowed_s - time.monotonic()


class Intake:
    """Hands out places. For one event loop.

    Parameters
    ----------
    max_bytes
        Most bytes of requests at a time.
    max_message_bytes
        Largest request; no more than `max_bytes`.
    request_s
        Longest for a request to arrive, in seconds.
    patience_s
        Longest while others wait for its place, in seconds; None for a usual time.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_message_bytes: int,
        request_s: float,
        patience_s: float | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_message_bytes = max_message_bytes
        self.request_s = request_s
        self.patience_s = patience_s
        self.held_bytes = 0
        """What is held, or may soon be."""
        self._reading: set[Place] = set()
        self._waiting: deque[asyncio.Future[Place]] = deque()

    @property
    def n_reading(self) -> int:
        """How many requests are on their way."""
        return len(self._reading)

    @property
    def n_waiting(self) -> int:
        """How many calls wait for a place."""
        return len(self._waiting)

    def place(self) -> Place | None:
        """Return a place; None if there is none, or others wait already."""
        return None if self._waiting else self._taken()

    async def waited_place(self) -> Place | None:
        """Return a place as soon as it is one's turn; None if that takes too long."""
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(_WAIT_S):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                turn.result().leave()  # It came just when nobody waited any more.
            if isinstance(error, TimeoutError):
                return None
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def settle(self, place: Place, before_bytes: int, after_bytes: int) -> None:
        """Note that a place holds something else than before."""
        self._reading.discard(place)
        self.held_bytes += after_bytes - before_bytes
        self._wake()

    def _taken(self) -> Place | None:
        if self.held_bytes + self.max_message_bytes > self.max_bytes:
            return None
        self.held_bytes += self.max_message_bytes
        is_scarce = 2 * self.held_bytes > self.max_bytes
        place = Place(self, self.max_message_bytes, is_scarce=is_scarce)
        self._reading.add(place)
        return place

    def _wake(self) -> None:
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
            elif (place := self._taken()) is not None:
                self._waiting.popleft().set_result(place)
            else:
                return
