"""`hashlens up`: started, used, stopped, crashed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from click.testing import CliRunner

from hashlens.cli.main import main
from hashlens.cli.top import command as top_command
from tests.support.services import START_S, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

HASHLENS = [sys.executable, "-c", "from hashlens.cli.main import main; main()"]


def descendants(pid: int) -> set[int]:
    """Return the processes below one, those that have ended and were not waited for left out."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    """Return those that still run."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            running.add(pid)
    return running


class Up:
    """A running `hashlens up`."""

    def __init__(self, folder: Path, *options: str, encoder_listen: str = "127.0.0.1:0") -> None:
        self.options = ["--encoder-listen", encoder_listen, *options]
        self.folder = folder
        self.log = folder / "up.log"
        self.said = folder / "up.out"

    def __enter__(self) -> Self:
        with self.said.open("w") as out, self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*HASHLENS, "up", "--data", str(self.folder / "data"),
                 "--search-listen", "127.0.0.1:0", *self.options],
                stdout=out,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        wait_until(
            lambda: "Ctrl-C" in self.said.read_text() or self.process.poll() is not None,
            within_s=START_S,
            what="hashlens up is up",
        )
        text = self.said.read_text()
        targets = dict(re.findall(r"^  (encoder|search) +(\S+:\d+)", text, re.MULTILINE))
        assert set(targets) == {"encoder", "search"}, text + self.log.read_text()
        self.flags = ["--encoder", targets["encoder"], "--search", targets["search"]]
        self.children = descendants(self.process.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)
        wait_until(lambda: not alive(self.children), within_s=60, what="its processes are gone")

    def run(self, *arguments: str) -> Any:
        """Run a command against it and return the JSON that it prints."""
        result = CliRunner().invoke(main, [*arguments, *self.flags, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def pictures(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for n, data in enumerate(images[:40]):
        (folder / f"{n:03}.{'jpg' if n % 2 else 'png'}").write_bytes(data)
    return folder


def answers(up: Up, query: Path) -> list[dict[str, Any]]:
    hits = up.run("search", str(query), "-k", "20")["hits"]
    assert len(hits) == 20
    return list(hits)


def test_ctrl_c_stops_it_and_nothing_is_lost(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_command, "_LOOK_S", 60.0)  # The machine may be busy.
    query = pictures / "007.jpg"
    with Up(tmp_path) as up:
        assert len(up.children) >= 3, "two services and the store"
        assert up.run("health")["serving"]
        (command,) = re.findall(r"^  hashlens (top .*)$", up.said.read_text(), re.MULTILINE)
        assert CliRunner().invoke(main, [*command.split(), "--once"]).exit_code == 0
        summary = up.run("index", str(pictures))
        assert (summary["indexed"], summary["items"], summary["failed"]) == (40, 40, [])
        before = answers(up, query)
        assert before[0]["id"] == str(query)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0
        assert not alive(up.children)
        log = up.log.read_text()
        assert re.search(r"^encoder \| ", log, re.MULTILINE)
        assert re.search(r"^search  \| ", log, re.MULTILINE)
        assert log.rstrip().endswith("stopped")
        assert "Traceback" not in log
        assert "leaked" not in log, "what libraries say of themselves at the end"

    with Up(tmp_path) as up:
        assert answers(up, query) == before
        summary = up.run("index", str(pictures))
        assert (summary["indexed"], summary["unchanged"], summary["items"]) == (0, 40, 40)


@pytest.mark.slow
def test_listening_in_the_open_has_to_be_asked_for(tmp_path: Path) -> None:
    command = [*HASHLENS, "up", "--data", str(tmp_path / "data"), "--search-listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--encoder-listen", "0.0.0.0:0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "--insecure" in done.stderr
    assert "--tls-cert" in done.stderr
    with Up(tmp_path, "--insecure", encoder_listen="0.0.0.0:0") as up:
        assert up.run("health")["serving"]
        assert re.search(r"whoever reaches 0\.0\.0\.0:\d+ may", up.log.read_text())


def test_a_service_that_dies_brings_the_other_down(tmp_path: Path) -> None:
    with Up(tmp_path) as up:
        encoder = next(
            pid for pid in alive(up.children)
            if b"encoder_service" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # fmt: skip
        os.kill(encoder, signal.SIGKILL)
        assert up.process.wait(60) == 1
        assert not alive(up.children)
        assert "the encoder service ended by itself: killed by SIGKILL" in up.log.read_text()


def test_killing_it_leaves_no_process_behind(tmp_path: Path) -> None:
    with Up(tmp_path) as up:
        up.process.kill()
        up.process.wait(60)
        wait_until(lambda: not alive(up.children), within_s=60, what="the children are gone")


def test_an_address_that_is_taken(tmp_path: Path, encoder: Any) -> None:
    command = [*HASHLENS, "up", "--data", str(tmp_path / "data"), "--search-listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--encoder-listen", encoder.target],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "the encoder service did not start" in done.stderr
    assert encoder.target in done.stderr
    assert "Hashlens is up" not in done.stdout
