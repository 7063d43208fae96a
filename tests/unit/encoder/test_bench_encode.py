"""The parts of `hashlens bench encode` that need no service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from encoder_service.bench import measure, sweep
from encoder_service.bench.command import EncodeConfig, encode
from encoder_service.bench.measure import Case, Report
from encoder_service.bench.pictures import make_pictures
from encoder_service.bench.sweep import MAX_BATCHES, MAX_WAITS_MS, Point, Swept
from encoder_service.decode import DecodeLimits, decode
from hashlens.cli.bench import publish
from hashlens.errors import InvalidInputError

CASE = Case(
    model="bundled",
    pictures="garment",
    callers=64,
    bare_images_per_s=400.0,
    service_images_per_s=380.0,
    ratio=0.95,
    bare_one_ms=4.0,
    lone_caller_ms=5.0,
    latency_ratio=1.25,
    p50_ms=150.0,
    p99_ms=200.0,
    bare_cpu_ms=2.5,
    server_cpu_ms=3.0,
    client_cpu_ms=0.3,
    near_bits=0,
)


@pytest.mark.parametrize(("kind", "size"), [("garment", (28, 28)), ("photo", (640, 480))])
def test_pictures_are_different_and_the_same_again(kind: str, size: tuple[int, int]) -> None:
    made = make_pictures(kind, 5, 3)  # type: ignore[arg-type]
    assert len(set(made)) == 5
    assert made == make_pictures(kind, 5, 3)  # type: ignore[arg-type]
    assert made != make_pictures(kind, 5, 4)  # type: ignore[arg-type]
    for image in made:
        assert image.startswith(b"\xff\xd8\xff")
        assert decode(image, DecodeLimits()).size == size


def test_the_first_case_stands_on_top_and_all_below(tmp_path: Path) -> None:
    report = Report("some machine", {"callers": 64}, [CASE, CASE])
    path, plot = tmp_path / "found.json", tmp_path / "found.png"
    publish(report, EncodeConfig(json=path, plot=plot), measure.drawn)
    plain = json.loads(path.read_text())
    assert plain["bare_images_per_s"] == 400.0
    assert plain["service_images_per_s"] == 380.0
    assert plain["ratio"] == 0.95
    assert len(plain["results"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    points = [
        Point(
            max_batch=batch,
            max_wait_ms=wait_ms,
            callers=callers,
            images_per_s=100.0 * batch,
            p50_ms=5.0,
            p99_ms=9.0,
        )
        for callers in (1, 8, 64)
        for batch in MAX_BATCHES
        for wait_ms in MAX_WAITS_MS
    ]
    swept = Swept("some machine", {}, points)
    assert sweep.drawn(swept).startswith(b"\x89PNG")
    assert len(swept.to_json()["results"]) == len(points)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("callers", 0),
        ("n_pictures", 0),
        ("repeats", 0),
        ("max_batch", 0),
        ("seconds", 0.0),
        ("models", ","),
        ("pictures", "garment,cat"),
        ("pictures", ""),
    ],
)
def test_wrong_settings(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        EncodeConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_wrong_options_are_said_in_one_line() -> None:
    done = CliRunner().invoke(encode, ["--pictures", "cat"])
    assert done.exit_code == 2
    assert "pictures are of garment, photo" in done.output
    done = CliRunner().invoke(encode, ["--json", "/nowhere/at/all.json"])
    assert done.exit_code == 2
    assert "there is no folder" in done.output
