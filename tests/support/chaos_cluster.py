"""Search processes on one Redis that come and go, for `tests.faults.chaos`."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from hashlens import Client
from hashlens.client.wire import ClientConfig
from hashlens.errors import HashlensError, UnavailableError
from hashlens.types import CollectionSpec, FeatureDtype
from tests.support.services import ServiceProcess

NAME = "c"
SPEC = CollectionSpec(NAME, "m", 64, 32, FeatureDtype.F16, 1000)
CALL_S = 10.0


class Cluster:
    """Replicas by number, each with a data directory."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self._folder = folder
        self._redis_url = redis_url
        self._processes: dict[int, ServiceProcess] = {}
        self._followed: set[int] = set()
        self.damaged: int | None = None
        """Whose files came to harm in this round."""
        self.first_counts: dict[int, tuple[int, int]] = {}
        """Descriptors and threads of each process, by process id, when first asked."""

    def data_dir(self, number: int) -> Path:
        return self._folder / f"r{number}" / "data"

    def pid(self, number: int) -> int:
        return self._processes[number].process.pid

    def start(self, number: int) -> None:
        folder = self.data_dir(number).parent
        folder.mkdir(exist_ok=True)
        self._processes[number] = ServiceProcess(
            "search_service",
            *("--data-dir", str(folder / "data"), "--redis-url", self._redis_url),
            *("--encoder", "127.0.0.1:1", "--checkpoint-interval-s", "0.5"),
            *("--replica-silence-s", "1.5", "--log-budget-mb", "1", "--n-threads", "1"),
            *("--scrub-interval-s", "2", "--compaction-min-rows", "100"),
            log=folder / "log",
        ).start()

    def end(self, number: int) -> None:
        """As a crash would."""
        self._processes.pop(number).kill()

    def is_running(self, number: int) -> bool:
        return self._processes[number].process.poll() is None

    def client(self, number: int) -> Client:
        """A new client of one replica; UnavailableError while it is down."""
        process = self._processes.get(number)
        if process is None or not process.target:
            raise UnavailableError("it is down")
        config = ClientConfig(deadline_s=CALL_S)
        return Client(search=process.target, encoder=process.target, config=config)

    def has_followed(self, number: int) -> bool:
        """Whether its files should be there."""
        return number != self.damaged

    def damage(self, number: int, how: str, draw: random.Random) -> None:
        """Delete a replica's directory, or flip a bit in, or cut, one of its files."""
        self.damaged = number
        directory = self.data_dir(number) / "collections" / NAME
        if how == "delete":
            shutil.rmtree(draw.choice((directory, self.data_dir(number))))
            return
        files = sorted(path for path in directory.iterdir() if path.stat().st_size)
        path = draw.choice(files)
        where = draw.randrange(path.stat().st_size)
        if how == "cut":
            os.truncate(path, where)
            return
        content = bytearray(path.read_bytes())
        content[where] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    def counts(self) -> dict[int, tuple[int, int]]:
        """Descriptors and threads of each replica."""
        return {
            number: (
                len(list(Path(f"/proc/{self.pid(number)}/fd").iterdir())),
                len(list(Path(f"/proc/{self.pid(number)}/task").iterdir())),
            )
            for number in self._processes
        }

    def states(self) -> dict[int, str]:
        """What each says of itself."""
        said = {}
        for number in self._processes:
            try:
                with self.client(number) as client:
                    said[number] = str(client.collection(NAME, deadline_s=5))
            except HashlensError as error:
                said[number] = repr(error)
        return said

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
