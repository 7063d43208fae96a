"""The benchmarks that run the services as processes, on a small scale: they end, and check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from search_service.bench.command import bench

# Most of it is starting processes, many times.
pytestmark = pytest.mark.slow


def run(*arguments: str) -> dict:
    # They start processes and handle signals, so they need the main thread, which this is.
    result = CliRunner().invoke(bench, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_ingest(tmp_path: Path) -> None:
    found = run(
        "ingest", "--rows", "700", "--code-rows", "600", "--dims", "0,8", "--callers", "3",
        "--data", str(tmp_path),
    )  # fmt: skip
    assert [line["rows"] for line in found["results"]] == [600, 700]
    for line in found["results"]:
        assert line["appendfsync"] == "always"
        assert line["items_per_s"] == pytest.approx(1e6 / line["ours_ms"], abs=1)
    assert not list(tmp_path.iterdir())


def test_restart(tmp_path: Path) -> None:
    rows = ["--rows", "900,300", "--expected-rows", "400"]
    found = run("restart", *rows, "--rebuild", "--repeats", "1", "--data", str(tmp_path))
    assert [line["rows"] for line in found["results"]] == [300, 300, 900, 900]
    for line in found["results"][1::2]:
        assert line["ids_per_s"] > 0
        assert line["redis_bytes_per_id"] > 20
        assert line["n_buckets"] == 4
    for line in found["results"][::2]:
        stages = [line[f"{name}_ms"] for name in ("imports", "executor", "kernels")]
        assert all(ms > 0 for ms in stages)
        assert sum(stages) + line["server_ms"] + line["files_ms"] == pytest.approx(line["ours_ms"])
        assert line["anonymous_mb"] > 10


def test_claim(tmp_path: Path) -> None:
    sizes = ["--rows", "2000", "--dim", "64", "--k", "100", "--min-pool", "300"]
    fewer = ["--repeats", "4", "--queries", "2", "--restarts", "1", "--data", str(tmp_path)]
    found = run("claim", *sizes, *fewer)
    assert len(found["results"]) == 3 + 5
    for line in found["results"]:
        capped, automatic = "capped" in line["case"], "automatic" in line["case"]
        assert line["truncated"] == (line["asks"] if capped else 0)
        assert line["exact"] == (0 if capped else line["asks"])
        assert not automatic or line["pool_rows"]["least"] >= 300
        assert not capped or line["pool_rows"]["most"] == 300
        encoded = line["stages_ms"]["encode"]["p50"] > 0
        assert encoded == line["case"].startswith("image")
    settings = found["settings"]
    assert {name: built["items"] for name, built in settings["build"].items()} == {
        "claim": 2000,
        "claim-images": 2000,
    }
    assert [target["at_full_size"] for target in settings["targets"]] == [False] * 4
    # The folder was named, so it is there for the next run.
    again = run("claim", *sizes, *fewer, "--no-images")
    assert again["settings"]["build"] == {"claim": None}
    assert len(again["results"]) == 2 + 3
