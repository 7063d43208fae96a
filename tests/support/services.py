"""Real service processes for tests: started on free ports, ended by their process id."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 90.0
STOP_S = 60.0


class ServiceProcess:
    """One service as a child process.

    Parameters
    ----------
    module
        ``encoder_service`` or ``search_service``.
    arguments
        Command-line options beside ``--listen``.
    log
        File that gets its standard error.
    """

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        self._command = [sys.executable, "-m", module, "--listen", "127.0.0.1:0", *arguments]
        self._log = log
        self.target = ""
        self.process: subprocess.Popen[str]

    def start(self) -> Self:
        """Start it and wait until it serves."""
        with self._log.open("a") as stderr:
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.kill()
            raise AssertionError(f"{self._command} did not start:\n{self._log.read_text()}")
        self.target = json.loads(line)["listening"]
        return self

    def stop(self) -> int:
        """End it gracefully and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it as a crash would; nothing if it has ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def wait_until(condition: object, *, within_s: float, what: str) -> None:
    """Poll a callable until it is true; fail after `within_s`."""
    assert callable(condition)
    ends_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)


@contextmanager
def both_services(folder: Path) -> Iterator[tuple[ServiceProcess, ServiceProcess]]:
    """Run an encoder, and a search service that knows it; data and logs are in a folder."""
    with (
        ServiceProcess("encoder_service", log=folder / "encoder.log") as encoder,
        ServiceProcess(
            "search_service",
            "--data-dir",
            str(folder / "data"),
            "--encoder",
            encoder.target,
            log=folder / "search.log",
        ) as search,
    ):
        yield encoder, search
