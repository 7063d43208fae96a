"""A loop that does not turn is noticed from outside, and a process that does not end is ended."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time

import pytest

from hashlens.rpc.watchdog import LoopWatchdog


def test_a_stall_is_logged_with_where_it_is(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = LoopWatchdog(0.6)

    async def run() -> None:
        with watchdog.watching():
            await asyncio.sleep(0.5)
            assert watchdog.n_stalls == 0
            time.sleep(1.6)  # noqa: ASYNC251 - the fault that is looked for
            await asyncio.sleep(0.5)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert watchdog.n_stalls == 1
    assert "time.sleep(1.6)" in caplog.text


def test_a_process_whose_threads_hang_ends_all_the_same() -> None:
    program = (
        "import threading, time\n"
        "from hashlens.rpc.watchdog import end_within\n"
        "end_within(0.5)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert ended.returncode == 1
