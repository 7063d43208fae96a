"""A loop that does not turn is noticed from outside, and a process that does not end is ended."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hashlens.rpc import watchdog as watchdog_module
from hashlens.rpc.watchdog import LoopWatchdog


def test_a_stall_is_logged_with_where_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its clock stands still but for the stall: a machine that pauses is none.
    now_s = 0.0
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(watchdog_module, "_BEAT_S", 0.05)
    watchdog = LoopWatchdog(0.6)

    def stall() -> None:
        nonlocal now_s
        now_s += 1.0
        ends_s = time.monotonic() + 30
        while not watchdog.n_stalls:
            assert time.monotonic() < ends_s, "nobody has noticed"
            time.sleep(0.01)
        time.sleep(0.2)  # It is looked at some more times.

    async def run() -> None:
        with watchdog.watching():
            await asyncio.sleep(0.2)
            assert watchdog.n_stalls == 0
            stall()  # The fault that is looked for.
            await asyncio.sleep(0.2)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert watchdog.n_stalls == 1
    assert "stall()  # The fault that is looked for." in caplog.text


def test_a_process_whose_threads_hang_ends_all_the_same() -> None:
    program = (
        "import threading, time\n"
        "from hashlens.rpc.watchdog import end_within\n"
        "end_within(0.5)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert ended.returncode == 1
