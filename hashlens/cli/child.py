"""One service as a process: started, heard, stopped, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from hashlens.errors import UnavailableError

STOP_DEADLINE_S = 30.0
"""Time for a service to drain and flush after SIGTERM, in seconds; then it is killed."""

POLL_S = 0.05

# Run first in the child: if we are killed in a way that lets us stop nobody, the kernel sends the
# child SIGTERM (PR_SET_PDEATHSIG is 1), which is a graceful stop. exec keeps that setting. This is
# a program of its own because code between fork and exec is not safe in a process with threads.
_LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
parent, *command = sys.argv[1:]
if os.getppid() != int(parent):
    sys.exit("the starting process is gone")
os.execv(command[0], command)
"""

LogSink = Callable[[str, str], None]
"""Takes a service's name and one line of its log, without its end; called from any thread."""


class ServiceProcess:
    """One service in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Start it from the main thread: the kernel takes the end of the starting thread for the end of
    the starting process.

    Parameters
    ----------
    name
        For messages and log lines.
    module
        Run as ``python -m module``.
    arguments
        Its command line.
    environment
        All of its environment.
    on_line
        Gets every line that it logs.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        on_line: LogSink,
    ) -> None:
        self.name = name
        self.address: str | None = None
        self.metrics: str | None = None
        self._on_line = on_line
        self._last_line = ""
        self._announced = threading.Event()
        # -P: a file of the working directory must not pass for a module.
        command = [sys.executable, "-P", "-m", module, *arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=target, args=(stream,), daemon=True, name=f"{name} log")
            for target, stream in (
                (self._read_output, self._process.stdout),
                (self._read_log, self._process.stderr),
            )
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Process id; also the id of its session and process group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def is_serving(self) -> bool:
        """Tell whether it has said where it listens.

        Raises
        ------
        UnavailableError
            It ended before.
        """
        if self.address is not None:
            return True
        if self._announced.is_set():
            self._wait(STOP_DEADLINE_S)
            raise UnavailableError(f"the {self.name} service did not start: {self._end()}")
        return False

    def check(self) -> None:
        """Raise UnavailableError if it has ended."""
        if not self.running:
            raise UnavailableError(f"the {self.name} service ended by itself: {self._end()}")

    def terminate(self) -> None:
        """Ask it to stop gracefully."""
        if self.running:
            self._process.terminate()

    def finish(self, hurry: threading.Event) -> None:
        """Wait until it has stopped, and clear away what it left running.

        Parameters
        ----------
        hurry
            When set, it is killed: what it has acknowledged is safe.
        """
        deadline = time.monotonic() + STOP_DEADLINE_S
        while self.running and not hurry.is_set() and time.monotonic() < deadline:
            self._wait(POLL_S)
        if self.running:
            self._process.kill()
        self._process.wait()
        # The embedded store, say, of a service that crashed: SIGTERM lets it write what it has.
        # A group that has members keeps its id, so this hits nobody else.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
                self._wait_for_group(5.0)
        for reader in self._readers:
            reader.join(timeout=5.0)

    def _wait(self, timeout_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def _wait_for_group(self, timeout_s: float) -> None:
        """Return after the time, ProcessLookupError as soon as the group is empty."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            os.killpg(self.pid, 0)
            time.sleep(POLL_S)

    def _end(self) -> str:
        code = self._process.returncode
        if code is None:
            how = "it closed its output"
        elif code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        else:
            how = f"exit status {code}"
        self._readers[1].join(timeout=1.0)
        # The servers log why they cannot start behind these words; else all of the line counts.
        last_words = self._last_line.rpartition("cannot start: ")[2]
        return f"{how}; its last words: {last_words}" if last_words else how

    def _read_output(self, stream: IO[str]) -> None:
        """Find the line that says where it listens; pass everything else on."""
        with stream:
            for line in stream:
                with suppress(ValueError, KeyError, TypeError):
                    said = json.loads(line)
                    self.metrics = said.get("metrics")
                    self.address = str(said["listening"])
                    self._announced.set()
                    continue
                self._log(line)
        self._announced.set()

    def _read_log(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._log(line)

    def _log(self, line: str) -> None:
        text = line.rstrip()
        self._last_line = text or self._last_line
        # Who reads our own standard error may have left; the service must not stop for that.
        with suppress(OSError, ValueError):
            self._on_line(self.name, text)
