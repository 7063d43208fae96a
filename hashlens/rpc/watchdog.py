"""Notices when an event loop does not turn, and when a process does not end."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

logger = logging.getLogger(__name__)

_BEAT_S: Final = 0.25


class LoopWatchdog:
    """Watches the running loop from a thread; what blocks it is logged, with where it is.

    Parameters
    ----------
    stall_s
        How long without a turn is worth a line.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._beat_s = time.monotonic()
        self._stop = threading.Event()
        self.n_stalls = 0
        """How often the loop has not turned for `stall_s`."""
        self.lag_s = 0.0
        """How much later than due the last beat was."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the running loop, whose thread this is, while the block runs."""
        watched = threading.get_ident()
        beating = asyncio.create_task(self._beat())
        thread = threading.Thread(target=self._watch, args=(watched,), name="watchdog", daemon=True)
        self._beat_s = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            beating.cancel()
            thread.join()

    async def _beat(self) -> None:
        while True:
            due_s = time.monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self._beat_s = time.monotonic()
            self.lag_s = max(self._beat_s - due_s, 0.0)

    def _watch(self, watched: int) -> None:
        is_stalled = False
        while not self._stop.wait(_BEAT_S):
            silent_s = time.monotonic() - self._beat_s
            if silent_s < self._stall_s:
                is_stalled = False
            elif not is_stalled:
                is_stalled = True
                self.n_stalls += 1
                frame = sys._current_frames().get(watched)
                where = "".join(traceback.format_stack(frame)) if frame else "nobody knows where\n"
                logger.error("the event loop has not turned for %.1f s:\n%s", silent_s, where)


def end_within(seconds: float) -> None:
    """End the process after a time, with status 1, unless it has ended by itself.

    For the last part of a process's life: there is no way back. Threads that something holds up
    would else keep the interpreter from ending.
    """

    def wait() -> None:
        time.sleep(seconds)
        logger.error("not stopped within %.1f s: the process ends as it is", seconds)
        os._exit(1)

    threading.Thread(target=wait, name="end", daemon=True).start()
