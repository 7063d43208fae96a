"""`hashlens bench decode`, too briefly to measure anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from encoder_service.bench.decode import DecodeConfig
from hashlens.cli.main import main
from hashlens.errors import InvalidInputError


def test_both_ways_are_measured_and_compared(tmp_path: Path) -> None:
    path, plot = tmp_path / "found.json", tmp_path / "found.png"
    brief = ["--n-pictures", "2", "--repeats", "2", "--resize", "40", "--crop", "32"]
    files = ["--json", str(path), "--plot", str(plot)]
    done = CliRunner().invoke(main, ["bench", "decode", "--sizes", "70x60,400x300", *brief, *files])
    assert done.exit_code == 0, done.output
    assert "400 x 300" in done.output
    small, large = json.loads(path.read_text())["results"]
    assert small["mean_difference"] == 0  # Too small to be reduced.
    assert 0 < large["mean_difference"] < 10
    for case in (small, large):
        assert min(case["whole_ms"], case["draft_ms"], case["ratio"], case["file_bytes"]) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sizes", ""),
        ("sizes", "640"),
        ("sizes", "640x-1"),
        ("sizes", "640x480x3"),
        ("sizes", "8x8"),
        ("n_pictures", 0),
        ("repeats", 0),
        ("crop", 257),
    ],
)
def test_wrong_settings(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        DecodeConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
