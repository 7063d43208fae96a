"""Real Redis and Valkey servers for tests, ended by their process id."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import redis

from search_service.storage.embedded import SETTINGS, find_server

READY_S = 60.0


def server_binaries() -> list[Path]:
    """Every kind of server that this machine has: the bundled one and those on PATH."""
    installed = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    return list(dict.fromkeys([find_server(), *(Path(path) for path in installed if path)]))


class RedisServer:
    """A server with the embedded server's settings, that a test may stop, pause and kill.

    Parameters
    ----------
    binary
        What to run.
    settings
        Beside `SETTINGS`, or instead.
    """

    def __init__(self, binary: Path, **settings: str) -> None:
        self.binary = binary
        self.settings = {**SETTINGS, **{k.replace("_", "-"): v for k, v in settings.items()}}
        # Not under pytest's directory: the path of a Unix socket must be short.
        self.directory = Path(tempfile.mkdtemp(prefix="hl-redis-"))
        self.socket = self.directory / "s"
        self.process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def client(self) -> redis.Redis:
        """A client for a test's own questions."""
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2, socket_timeout=60)

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        self.launch()
        deadline = time.monotonic() + READY_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.RedisError:
                    assert self.process.poll() is None, (self.directory / "log").read_text()
                    assert time.monotonic() < deadline, (self.directory / "log").read_text()
                    time.sleep(0.01)

    def launch(self) -> None:
        """Start it without waiting."""
        settings = {
            **self.settings,
            "dir": str(self.directory),
            "unixsocket": str(self.socket),
            "logfile": str(self.directory / "log"),
        }
        command = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen([self.binary, *command], start_new_session=True)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an operator would."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Let it hang."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        # A child of the server's that rewrites a file may live a moment longer.
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        self.process.wait(READY_S)
