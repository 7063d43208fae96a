"""`hashlens demo`, small: what it writes, and that it leaves nothing else behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.services import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DEMO = [sys.executable, "-c", "from hashlens.cli.main import main; main()", "demo"]


def start(folder: Path, n_queries: int = 20, **environment: str) -> subprocess.Popen[str]:
    """Start a small demo whose temporary files are below `folder`."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*DEMO, "--images", "120", "--queries", str(n_queries), "--out", str(folder / "out")],
        env={**os.environ, "TMPDIR": str(temporary), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name a path below `folder`, and still run."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = cmdline.read_bytes().decode("utf-8", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in command:
            found.append(command.replace("\0", " "))
    return found


def nothing_left(folder: Path) -> bool:
    return not processes_of(folder / "tmp") and not list((folder / "tmp").iterdir())


def test_twice(tmp_path: Path) -> None:
    summaries = []
    for _ in range(2):
        # A store that somebody has configured is not the demo's business.
        with start(tmp_path, HASHLENS_SEARCH_REDIS_URL="redis://127.0.0.1:1") as process:
            stdout, stderr = process.communicate(timeout=150)
        assert process.returncode == 0, stderr
        assert nothing_left(tmp_path)
        report = (tmp_path / "out" / "report.html").read_text("utf-8")
        summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
        assert str(tmp_path / "out" / "report.html") in stdout
        assert str(tmp_path / "out" / "summary.json") in stdout
        assert report.count("<article") == 20
        assert report.count("<li") == 200
        assert (summary["images"], summary["queries"]) == (120, 20)
        assert set(summary["median_ms"]) == {
            "decode", "queue", "inference", "coarse", "fine", "whole_call",
        }  # fmt: skip
        for stage in ("decode", "inference", "coarse", "fine"):
            assert 0 < summary["median_ms"][stage] < summary["median_ms"]["whole_call"]
        assert len(summary["by_label"]) == 10
        assert f"{summary['precision_at_10']:.3f}" in stdout
        summaries.append(summary)
    # 12 images of each label are stored: chance is 0.1 at 10.
    assert summaries[0]["precision_at_10"] > 0.5
    for key in ("precision_at_10", "precision_at_100", "by_label"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.parametrize(
    ("moment", "number"), [("Starting", signal.SIGTERM), ("Searching", signal.SIGINT)]
)
def test_interrupted_it_cleans_up(tmp_path: Path, moment: str, number: signal.Signals) -> None:
    # More than it can search for before the signal is there.
    with start(tmp_path, n_queries=4000) as process:
        assert process.stderr is not None
        lines = list(itertools.takewhile(lambda line: not line.startswith(moment), process.stderr))
        if moment == "Starting":
            wait_until(
                lambda: processes_of(tmp_path / "tmp"), within_s=60, what="a service was started"
            )
        process.send_signal(number)
        _, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, "".join(lines) + stderr
    assert "Traceback" not in stderr
    assert nothing_left(tmp_path)
