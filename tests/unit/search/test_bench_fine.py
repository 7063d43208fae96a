from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hashlens.errors import InvalidInputError, PreconditionError
from search_service import fine as stage
from search_service.bench import fine, machine, pagecache, table
from search_service.bench.report import WrongAnswerError

TINY = ["--rows", "600", "--dim", "70", "--pool", "200", "--k", "3,50", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BANDWIDTH_BYTES", 1 << 22)
    monkeypatch.setattr(machine, "_BUDGET_S", 0.01)
    monkeypatch.setattr(table, "_SEGMENT_BYTES", 1 << 14)
    monkeypatch.setattr(table, "_SPREAD_BYTES", 1 << 16)


def run(*args: str) -> Any:
    return CliRunner().invoke(fine.fine, [*TINY, *args], catch_exceptions=False)


def test_it_measures_all_forms_warm_and_cold(tmp_path: Path) -> None:
    try:
        done = run("--json", "-", "--peer", "numpy", "--dir", str(tmp_path))
    except PreconditionError as error:
        if "stay in memory" not in str(error):
            raise
        pytest.skip(str(error))
    assert list(tmp_path.iterdir()) == []  # the table is gone
    report = json.loads(done.stdout)
    assert report["bench"] == "fine"
    lines = {(line["case"], line["k"]): line for line in report["results"]}
    for form in ("f32", "f16"):
        for k in (3, 50):
            warm = lines[f"{form} warm", k]
            assert (warm["rows"], warm["recall"]) == (200, 1.0)
            assert warm["ratio"]["numpy"] == warm["peer_ms"]["numpy"] / warm["ours_ms"]
            assert warm["kernel GB/s"] > 0
            sketched = lines[f"{form} warm, sketch", k]
            assert k <= sketched["second looks"] <= 200
            assert 0.5 < sketched["int8 alone"] <= 1
            assert lines[f"{form} cold, sketch", k]["ours_ms"] > 0
        assert {"no prefetch", "nor advice"} <= set(lines[f"{form} cold", 50]["peer_ms"])


def test_a_wrong_answer_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = stage.distances_to

    def wrong(*args: Any) -> np.ndarray:
        distances = right(*args)
        distances[-1:] = np.nextafter(distances[-1:], np.float32(np.inf))
        return distances

    monkeypatch.setattr(stage, "distances_to", wrong)
    with pytest.raises(WrongAnswerError, match="differ from the definition"):
        run("--no-cold", "--dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--rows", "399"], "rows is at least twice the pool"),
        (["--k", "201"], "k is 1 to the size of the pool"),
        (["--k", "x"], "k is numbers with commas between"),
        (["--forms", "f64"], "forms are of f32, f16"),
    ],
)
def test_options_are_checked(args: list[str], complaint: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("│", " ").split())


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="milvus is no peer"):
        run("--peer", "milvus")


def test_memory_is_read_wherever_it_is_asked_for() -> None:
    memory = machine.Memory()
    for place in (0, 1, 10**12):
        memory.read(memory.nbytes // 2, place)  # asserts that it was all
    memory.read(memory.nbytes, 7)


def test_resident_pages_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    np.zeros(1 << 16, dtype=np.uint8).tofile(path)
    numbers = np.memmap(path, dtype=np.uint8, mode="r")
    numbers.sum()
    assert pagecache.resident_share(numbers) == 1
