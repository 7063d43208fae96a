"""Both services as processes, for as long as a block of code runs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hashlens.cli.child import POLL_S, LogSink, ServiceProcess
from hashlens.errors import DeadlineError

START_DEADLINE_S = 180.0
"""Time for a service to load its model or its data and to warm up, in seconds."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does: by KeyboardInterrupt.

    SIGINT, too: a shell has it ignored by what it starts in the background.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


@contextmanager
def _caught() -> Iterator[threading.Event]:
    """Note signals that would end the process instead of obeying them."""
    caught = threading.Event()
    with _handled(lambda number, frame: caught.set()):
        yield caught


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


_REDIS_URL = "HASHLENS_SEARCH_REDIS_URL"
"""How the URL reaches the search service: it may hold a password, which `ps` would show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicesConfig:
    """What to start, and where."""

    data: Path
    """Directory of the search service; made if it is not there."""
    encoder_listen: str = "127.0.0.1:0"
    search_listen: str = "127.0.0.1:0"
    encoder_metrics: str = ""
    """Where Prometheus reads the encoder's numbers; empty: nowhere."""
    search_metrics: str = ""
    checkpoint: Path | None = None
    """None: the encoder's own default."""
    redis_url: str | None = None
    """None: an embedded store in `data`."""
    device: str = "auto"
    insecure: bool = False
    """Listen where others can reach it without TLS."""
    isolated: bool = False
    """Let no ``HASHLENS_*`` of the environment reach the services, and have the encoder's libraries
    put what they call temporary beside `data`."""


class Services:
    """Both services. Use `running`."""

    def __init__(self, encoder: ServiceProcess, search: ServiceProcess) -> None:
        self._encoder = encoder
        self._search = search

    @property
    def encoder(self) -> str:
        """Where the encoder service listens."""
        assert self._encoder.address is not None
        return reachable(self._encoder.address)

    @property
    def search(self) -> str:
        """Where the search service listens."""
        assert self._search.address is not None
        return reachable(self._search.address)

    @property
    def encoder_metrics(self) -> str | None:
        """Where the encoder's numbers are; None: nowhere."""
        return self._encoder.metrics

    @property
    def search_metrics(self) -> str | None:
        """Where the search service's numbers are; None: nowhere."""
        return self._search.metrics

    def watch(self) -> None:
        """Wait until a service ends.

        Raises
        ------
        UnavailableError
            Always, when that happens; it says which and why.
        """
        while True:
            self._encoder.check()
            self._search.check()
            time.sleep(4 * POLL_S)


@contextmanager
def running(
    config: ServicesConfig,
    *,
    on_line: LogSink,
    on_serving: Callable[[str], None] = lambda name: None,
    on_stopped: Callable[[str], None] = lambda name: None,
) -> Iterator[Services]:
    """Start both services, and stop them when the block ends, however it ends.

    The search service is asked to stop first, as it may still need the encoder. A signal while
    they stop hurries them.

    Parameters
    ----------
    config
        What to start.
    on_line
        Gets each line that a service logs.
    on_serving, on_stopped
        Called with a service's name when it serves, and when it has stopped.

    Raises
    ------
    UnavailableError, DeadlineError
        A service did not start; the other one is stopped.
    """
    started: list[ServiceProcess] = []
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (config.isolated and name.startswith("HASHLENS_"))
    }
    # torch leaves a directory there. The search service may need a short path for its socket.
    temporary = {"TMPDIR": str(config.data.parent)} if config.isolated else {}

    def start(
        name: str, module: str, arguments: list[str], environment: Mapping[str, str]
    ) -> ServiceProcess:
        # A Ctrl-C between start and append would leave a process that nobody stops.
        with _caught() as caught:
            started.append(ServiceProcess(name, module, arguments, environment, on_line))
        if caught.is_set():
            raise KeyboardInterrupt
        return started[-1]

    try:
        with ExitStack() as until_served:
            listen = config.encoder_listen
            if listen.endswith(":0") and sys.platform == "linux":
                # Knowing the encoder's port beforehand lets both start at once.
                host = listen.rpartition(":")[0]
                listen = f"{host}:{until_served.enter_context(_reserved_port(host))}"
            arguments = _encoder_arguments(config, listen)
            encoder = start("encoder", "encoder_service", arguments, environment | temporary)
            pending = [encoder]
            if listen.endswith(":0"):
                _wait_until_serving(pending, on_serving)
                assert encoder.address is not None
                listen = encoder.address
                pending = []
            arguments = _search_arguments(config, listen)
            store = {} if config.redis_url is None else {_REDIS_URL: config.redis_url}
            search = start("search", "search_service", arguments, environment | store)
            _wait_until_serving([*pending, search], on_serving)
        yield Services(encoder, search)
    finally:
        with _caught() as hurry:
            for process in reversed(started):
                process.terminate()
                process.finish(hurry)
                on_stopped(process.name)


def _encoder_arguments(config: ServicesConfig, listen: str) -> list[str]:
    arguments = ["--listen", listen, "--device", config.device]
    if config.insecure:
        arguments += ["--insecure"]
    if config.checkpoint is not None:
        arguments += ["--checkpoint", str(config.checkpoint)]
    if config.encoder_metrics:
        arguments += ["--metrics-listen", config.encoder_metrics]
    return arguments


def _search_arguments(config: ServicesConfig, encoder_listen: str) -> list[str]:
    arguments = ["--listen", config.search_listen, "--data-dir", str(config.data)]
    arguments += ["--encoder", reachable(encoder_listen)]
    if config.insecure:
        arguments += ["--insecure"]
    if config.search_metrics:
        arguments += ["--metrics-listen", config.search_metrics]
    return arguments


def _wait_until_serving(
    processes: Sequence[ServiceProcess], on_serving: Callable[[str], None]
) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    pending = list(processes)
    while pending:
        for process in list(pending):
            if process.is_serving():
                pending.remove(process)
                on_serving(process.name)
        if pending and time.monotonic() > deadline:
            names = " and ".join(process.name for process in pending)
            raise DeadlineError(f"{names} did not serve within {START_DEADLINE_S:g} s")
        time.sleep(POLL_S)


@contextmanager
def _reserved_port(host: str) -> Iterator[int]:
    """Hold a free port that a server with SO_REUSEADDR, and nobody else, can listen on.

    Linux allows that while the holder itself does not listen.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host.strip("[]"), 0))
        yield holder.getsockname()[1]


def reachable(listen: str) -> str:
    """Return where a client on this machine finds a server that listens on `listen`."""
    host, _, port = listen.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"
