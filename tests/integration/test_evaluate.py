"""`hashlens evaluate` through the real services says what it says without them."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from encoder_service.evaluation.command import evaluate
from encoder_service.model.checkpoint import (
    default_checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from hashlens import Client
from hashlens.cli.demo_data import load_demo_images
from hashlens.errors import InvalidInputError, PreconditionError, UnavailableError
from tests.integration.conftest import SearchProcess, to_bytes
from tests.support.services import ServiceProcess


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tree of 300 bundled pictures: 240 to test with, 60 in the place of training."""
    root = tmp_path_factory.mktemp("evaluate")
    pixels, labels, classes = load_demo_images()
    rows = np.concatenate([np.flatnonzero(labels == label)[:30] for label in range(len(classes))])
    for i, row in enumerate(rows):
        name = classes[labels[row]].replace("/", " or ")
        folder = root / ("train" if i % 5 == 0 else "test") / name
        folder.mkdir(parents=True, exist_ok=True)
        image_format = ("PNG", "JPEG")[i % 2]
        (folder / f"{row:05d}.{image_format.lower()}").write_bytes(
            to_bytes(pixels[row], image_format)
        )
    return root


def run(data: Path, *arguments: object) -> Result:
    # One class is called otherwise than in training: a folder's name holds no slash.
    options = ["--data", data, "--force", "--json", "-", *arguments]
    return CliRunner().invoke(evaluate, [str(option) for option in options])


def numbers(data: Path, *arguments: object) -> dict[str, Any]:
    result = run(data, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    plain: dict[str, Any] = json.loads(result.stdout)
    return plain


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """Compare JSON: numbers to nine digits, all else exactly."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}[{i}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-9), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    "protocol", [("split", "--queries", "120"), ("lin2015", "--queries", "120")]
)
def test_served_equals_local(
    protocol: tuple[str, ...],
    data: Path,
    encoder: ServiceProcess,
    search: SearchProcess,
    client: Client,
) -> None:
    options = ("--protocol", *protocol)
    served = numbers(data, *options, "--encoder", encoder.target, "--search", search.target)
    local = numbers(data, *options, "--local", "--device", "cpu")
    assert (served.pop("backend"), local.pop("backend")) == ("served", "local")
    assert served.pop("served_agreement") == {"coarse": 1, "coarse_soft": 1, "two_stage": 1}
    assert local.pop("served_agreement") == {}
    assert_alike(served, local)
    assert local["two_stage"]["precision_at_10"] > 0.3
    assert client.collections() == []


def test_it_starts_the_services_itself(data: Path) -> None:
    found = numbers(data, "--protocol", "lin2015", "--queries", "20")
    assert (found["backend"], found["n_queries"], found["n_database"]) == ("served", 20, 60)
    assert found["served_agreement"] == {"coarse": 1, "coarse_soft": 1, "two_stage": 1}


def test_another_model_behind_the_encoder_is_refused(
    data: Path, encoder: ServiceProcess, search: SearchProcess, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(default_checkpoint_path())
    with torch.no_grad():
        checkpoint.network.classifier.bias += 1
    path = tmp_path / "other.safetensors"
    save_checkpoint(replace(checkpoint), path)  # a new id
    result = run(data, "--encoder", encoder.target, "--search", search.target, "--checkpoint", path)
    assert isinstance(result.exception, PreconditionError)
    assert "the encoder serves model" in result.exception.message


def test_a_service_that_is_away_is_named(data: Path, search: SearchProcess) -> None:
    result = run(data, "--encoder", "127.0.0.1:9", "--search", search.target)
    assert isinstance(result.exception, UnavailableError)
    assert "the encoder service at 127.0.0.1:9" in result.exception.message


def test_an_unreadable_image_is_named_and_nothing_stays(
    data: Path, encoder: ServiceProcess, search: SearchProcess, client: Client
) -> None:
    broken = data / "test" / "Bag" / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no picture")
    try:
        result = run(data, "--encoder", encoder.target, "--search", search.target)
    finally:
        broken.unlink()
    assert isinstance(result.exception, InvalidInputError)
    assert "Bag/broken.png" in result.exception.message
    assert client.collections() == []


def test_interrupted_it_drops_its_collection(
    data: Path, encoder: ServiceProcess, search: SearchProcess, client: Client
) -> None:
    # Slowly, so that it is at it when the signal comes.
    code = (
        "import time; from hashlens import Client; search_batch = Client.search_batch; "
        "Client.search_batch = lambda *a, **k: time.sleep(0.5) or search_batch(*a, **k); "
        "from encoder_service.evaluation.command import evaluate; "
        "from hashlens.cli.main import main; main.add_command(evaluate); main()"
    )
    options = ["--data", str(data), "--force", "--encoder", encoder.target]
    with subprocess.Popen(
        [sys.executable, "-c", code, "evaluate", *options, "--search", search.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        lines = list(itertools.takewhile(lambda line: "Searching" not in line, process.stderr))
        assert any("Storing" in line for line in lines)
        assert [info.spec.name[:9] for info in client.collections()] == ["evaluate-"]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert client.collections() == []
