"""SIGTERM and SIGINT: the first asks a server to stop, the second ends the process at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """Yield an event of the running loop that the first signal sets. Call in the main thread.

    From then on the signals are the system's own again, so the next one ends the process, whatever
    it is in; its exit status says which signal it was.
    """
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def hear(number: int, frame: FrameType | None) -> None:
        for each in _STOPPING:
            signal.signal(each, signal.SIG_DFL)
        loop.call_soon_threadsafe(asked.set)

    before = {number: signal.signal(number, hear) for number in _STOPPING}
    try:
        yield asked
    finally:
        if not asked.is_set():
            for number, handler in before.items():
                signal.signal(number, handler)
