"""`hashlens bench overload` and `cancel`, small: real work, and numbers that hang together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from search_service.bench import cancel, overload
from search_service.bench.offered import Fate, Fates
from search_service.bench.overload import OverloadConfig, _after, _Peak


@pytest.mark.slow
def test_a_small_overload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a quarter of a second is left of the closed loop, in which nothing may be answered.
    monkeypatch.setattr(overload, "_WARMUP_S", 0.1)
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    ran = CliRunner().invoke(
        overload.overload,
        [
            *("--rows", "500", "--dim", "8", "--min-pool", "100", "--in-flight", "2"),
            *("--seconds", "2.5", "--rest-s", "2", "--json", str(out), "--plot", str(plot)),
        ],
    )
    assert ran.exit_code == 0, ran.output
    closed, opened, rest = json.loads(out.read_text())["results"]
    assert closed["calls_per_s"] > 0
    assert opened["goodput_per_s"] > 0
    assert opened["failed"] == 0, opened["failures"]
    assert rest["recovery_s"] >= 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_small_cancel(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    ran = CliRunner().invoke(
        cancel.cancel,
        [
            *("--rows", "300000", "--pool", "600", "--dim", "32", "--hits", "2000"),
            *("--repeats", "2", "--dir", str(tmp_path), "--json", str(out)),
        ],
    )
    if "no cold rows to measure there" in ran.output + str(ran.exception):
        pytest.skip("the temporary folder lies in memory")
    assert ran.exit_code == 0, ran.output
    results = json.loads(out.read_text())["results"]
    assert len(results) == 18
    assert all(found["worst_cpu_ms"] >= 0 for found in results)
    assert all(found["ours_ms"] <= found["worst_ms"] for found in results)


def test_goodput_and_recovery_are_what_they_say() -> None:
    """Ten calls a second for four seconds, half of them refused, then five, slow at first."""
    config = OverloadConfig(seconds=4.0, rest_s=4.0)
    busy = np.arange(40) / 10
    rest = 4.0 + np.arange(20) / 5
    due_s = np.concatenate([busy, rest])
    fate = np.array([Fate.ANSWERED, Fate.REFUSED] * 20 + [Fate.ANSWERED] * 20)
    took_s = np.where(fate == Fate.REFUSED, 0.01, 0.02)
    took_s[40:43] = 1.0
    fates = Fates(due_s, due_s, due_s + took_s, fate.astype(np.int64))
    peak = _Peak(8, 10.0, 1.0, 1.0, 2.0)
    opened, then = _after(config, peak, 10.0, fates, 0.08)
    assert opened.extra["goodput_of_peak"] == pytest.approx(0.5)
    assert opened.extra["refused_p99_ms"] == pytest.approx(10)
    assert opened.extra["cpu_ms"] == pytest.approx(4.0)
    assert opened.extra["goodput_of_peak_by_cpu"] == pytest.approx(0.5)
    assert then.extra["recovery_s"] == pytest.approx(0.4)
    assert then.extra["not_answered"] == 0


@pytest.mark.parametrize(
    "wrong",
    [["--in-flight", "0"], ["--what", "drop"], ["--times", "1"], ["--target", "127.0.0.1:1"]],
)
def test_options_are_checked_first(wrong: list[str]) -> None:
    assert CliRunner().invoke(overload.overload, wrong).exit_code == 2
