"""A store that serves its files and copies those of others, as a process that a test may kill."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from search_service.storage import StoreConfig
from tests.support.replicas import replica

START_S = 60.0
STOP_S = 60.0


class ReplicaProcess:
    """The process.

    Parameters
    ----------
    data_dir, redis_url
        As in `StoreConfig`.
    failpoints
        As in `failpoints.VARIABLE`.
    bytes_per_s
        At most so fast it serves its files; 0: no limit.
    """

    def __init__(
        self, data_dir: Path, redis_url: str, *, failpoints: str = "", bytes_per_s: float = 0.0
    ) -> None:
        order = {"data_dir": str(data_dir), "redis_url": redis_url, "bytes_per_s": bytes_per_s}
        self._command = [sys.executable, "-m", "tests.support.replica_process", json.dumps(order)]
        self._failpoints = failpoints
        self.process: subprocess.Popen[str]

    def start(self) -> Self:
        """Start it and wait until the store is open."""
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HASHLENS_FAILPOINTS": self._failpoints},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        assert ready, "the replica does not start"
        self.process.stdout.readline()
        return self

    def wait_killed(self) -> None:
        """Wait until a failpoint has ended it."""
        assert self.process.wait(STOP_S) == -signal.SIGKILL

    def kill(self) -> None:
        """End it as a crash would; nothing if it has ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def main(order: dict[str, Any]) -> None:
    """Run until standard input ends."""
    config = StoreConfig(
        data_dir=Path(order["data_dir"]),
        redis_url=order["redis_url"],
        segment_bytes=8192,
        discovery_interval_s=0.1,
        hello_interval_s=0.1,
    )
    with replica(config, bytes_per_s=order["bytes_per_s"]):
        print("open", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
