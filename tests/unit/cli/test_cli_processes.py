from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hashlens.cli import child as child_module
from hashlens.cli.child import ServiceProcess
from hashlens.cli.processes import interruptible, reachable
from hashlens.errors import UnavailableError

ANNOUNCE = """
import json, os, signal, sys, time
def serve():
    print(json.dumps({"listening": "127.0.0.1:7", "pid": os.getpid()}), flush=True)
"""

Start = Callable[..., ServiceProcess]

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def start(tmp_path: Path, lines: list[str]) -> Start:
    """Start a small program as a service."""

    def start(program: str, *arguments: str) -> ServiceProcess:
        (tmp_path / "small_service.py").write_text(ANNOUNCE + program)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return ServiceProcess(
            "small",
            "small_service",
            arguments,
            environment,
            lambda name, line: lines.append(f"{name}: {line}"),
        )

    return start


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # The latter: it ended while this was read.
        return False
    return state != "Z"


def test_start_and_graceful_stop(start: Start, lines: list[str]) -> None:
    process = start("""
def stop(*_):
    print("flushed", file=sys.stderr)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("not the announcement")
print(f"hello {sys.argv[1:]} \\udce9", file=sys.stderr)
serve()
time.sleep(600)
""", "--x", "1")  # fmt: skip
    until(process.is_serving)
    assert process.address == "127.0.0.1:7"
    assert os.getsid(process.pid) == process.pid, "the terminal's signals reach it"
    process.check()
    process.terminate()
    process.finish(threading.Event())
    assert not process.running
    assert "small: not the announcement" in lines
    assert any("hello ['--x', '1']" in line for line in lines)
    assert lines[-1] == "small: flushed"
    with pytest.raises(UnavailableError, match=r"ended by itself: exit status 0.*flushed"):
        process.check()


def test_one_that_does_not_start_says_why(start: Start, lines: list[str]) -> None:
    process = start("sys.exit('the port is taken')")
    until(lambda: "small: the port is taken" in lines)
    with pytest.raises(UnavailableError, match=r"did not start: exit status 1.*port is taken"):
        until(process.is_serving)
    process.finish(threading.Event())


def test_one_that_is_killed_says_so(start: Start) -> None:
    process = start("serve(); time.sleep(600)")
    until(process.is_serving)
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.running)
    with pytest.raises(UnavailableError, match="killed by SIGKILL"):
        process.check()
    process.finish(threading.Event())


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); serve(); time.sleep(600)"


def test_a_stubborn_one_is_killed_in_a_hurry(start: Start) -> None:
    process = start(STUBBORN)
    until(process.is_serving)
    process.terminate()
    hurry = threading.Event()
    hurry.set()
    process.finish(hurry)
    assert not process.running


def test_a_stubborn_one_is_killed_in_the_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "STOP_DEADLINE_S", 0.3)
    process = start(STUBBORN)
    until(process.is_serving)
    process.terminate()
    process.finish(threading.Event())
    assert not process.running


@linux
def test_what_a_crashed_one_left_running_is_stopped(start: Start, tmp_path: Path) -> None:
    process = start("""
import subprocess
store = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(store.pid, file=sys.stderr, flush=True)
serve()
time.sleep(600)
""")
    until(process.is_serving)
    store = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.running)
    assert alive(store)
    process.finish(threading.Event())
    assert not alive(store)


def test_a_module_of_the_working_directory_is_not_run(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(elsewhere)
    process = start("serve(); time.sleep(600)")
    until(process.is_serving)
    process.terminate()
    process.finish(threading.Event())


@linux
def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "small_service.py").write_text(ANNOUNCE + "serve(); time.sleep(600)")
    program = """
import os, time
from hashlens.cli.child import ServiceProcess
process = ServiceProcess("small", "small_service", [], dict(os.environ), lambda name, line: None)
while not process.is_serving():
    time.sleep(0.01)
print(process.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until(lambda: not alive(pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_unwind_like_ctrl_c(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("listen", "target"),
    [
        ("127.0.0.1:5", "127.0.0.1:5"),
        ("0.0.0.0:5", "127.0.0.1:5"),
        ("[::]:5", "[::1]:5"),
        ("host:5", "host:5"),
    ],
)
def test_reachable(listen: str, target: str) -> None:
    assert reachable(listen) == target
