"""`hashlens bench encode` as a user runs it, too briefly to measure anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from encoder_service.bench import bare, measure
from encoder_service.bench.bare import Answers, Setup
from encoder_service.bench.command import encode
from encoder_service.bench.measure import kinds
from encoder_service.bench.pictures import make_pictures
from encoder_service.bench.service import WrongAnswerError, check, serving
from encoder_service.model.checkpoint import default_checkpoint_path
from hashlens.cli.main import main


def run(*arguments: str) -> Result:
    brief = ["--seconds", "0.3", "--repeats", "1", "--n-pictures", "12", "--threads", "1"]
    return CliRunner().invoke(encode, [*brief, *arguments])


@pytest.mark.slow
def test_service_and_bare_loop(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = run("--models", "bundled", "--callers", "8", "--json", str(path))
    assert done.exit_code == 0, done.output
    plain = json.loads(path.read_text())
    assert plain["ratio"] == pytest.approx(
        plain["service_images_per_s"] / plain["bare_images_per_s"]
    )
    assert [case["pictures"] for case in plain["results"]] == ["garment", "photo"]
    for case in plain["results"]:
        assert case["latency_ratio"] == pytest.approx(case["lone_caller_ms"] / case["bare_one_ms"])
        assert min(case[f"{who}_cpu_ms"] for who in ("bare", "server", "client")) > 0
        assert case["callers"] == 8


@pytest.mark.slow
def test_an_answer_that_is_not_the_bare_loops_fails_the_run() -> None:
    config = measure.EncodeConfig(threads=1)
    path = default_checkpoint_path()
    images = make_pictures(kinds(config)[0], 8, 1)
    wanted = bare.answers(Setup(path, 1, 1, 8), images)
    with serving(path, config, max_batch=8, max_wait_ms=2.0) as server:
        assert check(server, images, wanted) == 0
        wrong = wanted.codes.copy()
        wrong[3, 0] ^= 1
        with pytest.raises(WrongAnswerError, match="a code is not"):
            check(server, images, Answers(wrong, wanted.features, wanted.activations))
        moved = wanted.features.copy()
        moved[2] += 0.1
        with pytest.raises(WrongAnswerError, match="a feature is not"):
            check(server, images, Answers(wanted.codes, moved, wanted.activations))


def test_untrained_models_tell_pictures_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    bare.write_untrained("mobilenet_v3_small", path, 1)
    found = bare.answers(Setup(path, 1, 1, 4), make_pictures("photo", 4, 2))
    assert len({code.tobytes() for code in found.codes}) == 4


def test_it_is_found_beside_the_search_sides() -> None:
    done = CliRunner().invoke(main, ["bench", "--help"])
    assert done.exit_code == 0
    assert "\n  encode " in done.output
    done = CliRunner().invoke(main, ["bench", "encode", "--help"])
    assert done.exit_code == 0, done.output
    assert "--max-wait-ms" in done.output
