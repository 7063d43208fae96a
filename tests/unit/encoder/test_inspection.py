"""`hashlens inspect` of a checkpoint, and its parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from encoder_service.data.config import DataConfig
from encoder_service.encoder import Encoder
from encoder_service.inspection.collection import Reservoir
from encoder_service.inspection.command import inspect
from encoder_service.inspection.pictures import open_pictures, some_of
from encoder_service.inspection.plots import write_plots
from encoder_service.model.checkpoint import Checkpoint
from hashlens import codes
from hashlens.codehealth import health_of, summary
from hashlens.errors import HashlensError, InvalidInputError
from tests.support.pictures import make_tree, picture


def run(*arguments: object) -> Result:
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments])


def facts_of(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    plain: dict[str, Any] = json.loads(result.stdout)
    return plain


def write_flat(folder: Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        picture(("red", "blue", "green")[i % 3], i).save(folder / f"{i:02}.png")


# -- checkpoints -----------------------------------------------------------------------------------


def test_facts_health_and_bits_of_a_checkpoint(
    checkpoint: Checkpoint, checkpoint_file: Path, tmp_path: Path
) -> None:
    write_flat(tmp_path / "own", 12)
    facts = facts_of(checkpoint_file, "--data", tmp_path / "own")
    assert facts["model_id"] == checkpoint.model_id
    assert facts["dim"] == checkpoint.dim
    assert facts["metrics"] == dict(checkpoint.metrics)
    assert facts["file_bytes"] == checkpoint_file.stat().st_size
    assert facts["judged_by"] == f"the images in {tmp_path / 'own'}"
    assert facts["verdict"]["level"] in ("healthy", "crowded", "collapsed")

    # The served path gives the same codes.
    encoder = Encoder(checkpoint, "cpu")
    pictures = [Image.open(path) for path in sorted((tmp_path / "own").iterdir())]
    encoded = encoder.encode(np.stack([encoder.preprocessing(image) for image in pictures]))
    expected = health_of(encoded.codes, 20, encoded.activations, random=np.random.default_rng(0))
    assert {name: facts["health"][name] for name in summary(expected)} == summary(expected)
    assert facts["health"]["fire_rates"] == expected.fire_rates.tolist()

    weights = checkpoint.network.classifier.weight.detach().numpy()
    assert [bit["bit"] for bit in facts["bits"]] == list(range(20))
    for bit in facts["bits"]:
        strongest = int(np.abs(weights[:, bit["bit"]] - weights[:, bit["bit"]].mean()).argmax())
        assert checkpoint.classes[strongest] in bit["fires_for"] + bit["silent_for"]


def test_tables_say_what_was_judged_and_what_to_do(checkpoint_file: Path, tmp_path: Path) -> None:
    write_flat(tmp_path / "own", 5)
    result = run(checkpoint_file, "--data", tmp_path / "own", "--plot", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    assert "mobilenet_v3_small" in result.stdout
    assert "Judged by 5 codes of the images in" in result.stdout
    assert "These codes are " in result.stdout
    assert "Ähre" in result.stdout
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"{n}.png" for n in ("fire_rates", "correlations", "pools", "buckets")} | {
        "margins.png"
    }
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 10


def test_without_images_only_the_file_is_read(checkpoint_file: Path) -> None:
    facts = facts_of(checkpoint_file, "--images", 0)
    assert (facts["health"], facts["verdict"]) == (None, None)
    assert len(facts["bits"]) == 20
    assert "These codes are" not in run(checkpoint_file, "--images", 0).stdout


def test_the_bundled_checkpoint_is_judged_by_the_bundled_images() -> None:
    facts = facts_of("--images", 200)
    assert facts["n_bits"] == 48
    assert facts["health"]["n_rows"] == 200
    assert "come with Hashlens" in facts["judged_by"]
    # Of an image's 48 bits most are sure, or it would be no trained model.
    assert facts["health"]["margin_unsure_share"] < 0.3
    again = facts_of("--images", 200)
    assert again == facts
    assert facts_of("--images", 200, "--seed", 2)["health"] != facts["health"]


def test_labelled_trees_are_judged_by_the_test_split(tmp_path: Path, checkpoint_file: Path) -> None:
    make_tree(tmp_path / "tree")
    facts = facts_of(checkpoint_file, "--data", tmp_path / "tree")
    assert facts["judged_by"] == f"the test split of {tmp_path / 'tree'}"
    assert facts["health"]["n_rows"] == 4
    facts = facts_of(checkpoint_file, "--data", tmp_path / "tree", "--split", "train")
    assert facts["health"]["n_rows"] == 12
    facts = facts_of(
        checkpoint_file, "--data", tmp_path / "tree", "--split", "train", "--images", 5
    )
    assert facts["health"]["n_rows"] == 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "there is no"),
        (lambda root: root.mkdir(), "no images in it"),
        (lambda root: (root.mkdir(), (root / "a.png").write_bytes(b"\x89PNG\r\n")), "a.png"),
    ],
    ids=["no folder", "empty folder", "broken image"],
)
def test_bad_data_is_said_to_be_bad(
    tmp_path: Path, checkpoint_file: Path, make: Any, says: str
) -> None:
    make(tmp_path / "own")
    error = run(checkpoint_file, "--dataset", "folder", "--data", tmp_path / "own").exception
    assert isinstance(error, InvalidInputError)
    assert says in error.message
    assert error.field == "data"


def test_targets_that_are_nothing_are_refused(tmp_path: Path) -> None:
    error = run(tmp_path / "missing.safetensors").exception
    assert isinstance(error, InvalidInputError)
    assert "there is no file" in error.message
    other = tmp_path / "notes.txt"
    other.write_text("no checkpoint")
    assert isinstance(run(other).exception, InvalidInputError)
    assert run("--search", "127.0.0.1:1").exit_code == 2
    # A name that is no file is a collection; nothing listens on port 1.
    error = run("photos", "--search", "127.0.0.1:1").exception
    assert isinstance(error, HashlensError)
    assert "search service at 127.0.0.1:1" in error.message


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys, encoder_service.inspection.command;"
        "sys.exit(bool({'torch', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- parts -----------------------------------------------------------------------------------------


def test_some_of_keeps_order_and_repeats_nothing() -> None:
    source, _ = open_pictures(DataConfig(), None)
    assert len(source) == 5000
    few = some_of(source, 30, np.random.default_rng(0))
    names = [few.name(i) for i in range(len(few))]
    assert names == sorted(set(names))
    assert some_of(source, 5000, np.random.default_rng(0)) is source


def test_a_reservoir_keeps_a_uniform_sample() -> None:
    n, n_kept, draws = 60, 20, 400
    counts = np.zeros(n, dtype=int)
    for seed in range(draws):
        reservoir = Reservoir(n_kept, 1, np.random.default_rng(seed))
        for part in np.split(np.arange(n, dtype=np.uint8)[:, np.newaxis], [1, 7, 7, 30]):
            reservoir.add(part)
        sample = reservoir.sample()[:, 0]
        assert sample.tolist() == sorted(set(sample.tolist()))
        assert len(sample) == n_kept
        counts[sample] += 1
    # Each row is kept in a third of the draws: 133 +- 9.4; six sigma.
    assert np.abs(counts - draws * n_kept / n).max() < 57


def test_a_reservoir_with_room_keeps_everything() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    reservoir = Reservoir(50, 3, np.random.default_rng(0))
    for part in np.array_split(rows, 7):
        reservoir.add(part)
    assert np.array_equal(reservoir.sample(), rows)


@pytest.mark.parametrize("n_bits", [1, 130])
def test_plots_of_odd_codes_without_activations(tmp_path: Path, n_bits: int) -> None:
    packed = codes.pack(np.zeros((1, n_bits), dtype=bool))
    health = health_of(packed, n_bits, random=np.random.default_rng(0))
    paths = write_plots(health, tmp_path / "new" / "folder")
    assert [path.stem for path in paths] == ["fire_rates", "correlations", "pools", "buckets"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
