"""A service as a process of its own: started, timed, its memory read, and ended."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hashlens.cli.child import ServiceProcess
from hashlens.cli.processes import START_DEADLINE_S
from hashlens.errors import DeadlineError

_POLL_S = 0.002
_LOG_S = 20.0
_STAGE = re.compile(r"ready stage (\w+): ([\d.]+) s")


@dataclass(frozen=True, slots=True)
class Served:
    """A service that serves."""

    address: str
    pid: int
    ready_s: float
    """From its start until health said SERVING."""
    stages_s: dict[str, float]
    """What of that it spent on what, as it logs; the rest is the interpreter and its imports. Empty
    where it was told what to log."""


@contextmanager
def served(module: str, arguments: Sequence[str]) -> Iterator[Served]:
    """Run ``python -m module`` on a free port while the block runs; then ask it to stop.

    No ``HASHLENS_*`` of the environment reaches it. Call from the main thread.

    Raises
    ------
    UnavailableError, DeadlineError
        It did not start.
    """
    log: deque[str] = deque(maxlen=1000)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HASHLENS_")}
    began_s = time.monotonic()
    process = ServiceProcess(
        module.partition("_")[0],
        module,
        ["--listen", "127.0.0.1:0", *arguments],
        environment,
        lambda name, line: log.append(line),
    )
    try:
        while not process.is_serving():
            if time.monotonic() - began_s > START_DEADLINE_S:
                raise DeadlineError(f"{module} did not serve within {START_DEADLINE_S:g} s")
            time.sleep(_POLL_S)
        ready_s = time.monotonic() - began_s
        assert process.address is not None
        logs_stages = "--log-level" not in arguments
        yield Served(process.address, process.pid, ready_s, _stages_s(log) if logs_stages else {})
    finally:
        process.terminate()
        process.finish(threading.Event())


def _stages_s(log: deque[str]) -> dict[str, float]:
    """Read what a service has logged; its words come by another way than its address."""
    give_up_s = time.monotonic() + _LOG_S
    while not any(" serving " in line for line in list(log)) and time.monotonic() < give_up_s:
        time.sleep(_POLL_S)
    found = [_STAGE.search(line) for line in list(log)]
    return {match[1]: float(match[2]) for match in found if match}


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process, in MB."""

    anonymous: float
    """Its own."""
    files: float
    """Pages of mapped files, which the kernel takes back when it needs them."""


def memory_of(pid: int) -> Memory:
    """Return a process's resident memory; zeros where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return Memory(0.0, 0.0)
    kb = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return Memory(
        int(kb.get("RssAnon", 0)) / 1e3,
        (int(kb.get("RssFile", 0)) + int(kb.get("RssShmem", 0))) / 1e3,
    )


def read_mb(pid: int) -> float:
    """Return how much a process has had read from disk so far, in MB; 0 where nobody says."""
    try:
        text = Path(f"/proc/{pid}/io").read_text("utf-8")
    except OSError:
        return 0.0
    return int(re.findall(r"^read_bytes: (\d+)$", text, re.MULTILINE)[0]) / 1e6


def redis_pid(data_dir: Path) -> int:
    """Return the process id of the server that a search service runs on its data."""
    return int(json.loads((data_dir / "redis" / "server.json").read_bytes())["pid"])
