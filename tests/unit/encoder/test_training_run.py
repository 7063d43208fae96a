"""`hashlens train` from end to end: what it writes, and what it says of bad data."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoder_service.model.checkpoint import Checkpoint, load_checkpoint
from encoder_service.preprocess import IMAGENET_MEAN
from encoder_service.training.history import EpochReport, draw_curves, write_log
from encoder_service.training.recipe import make_recipe
from encoder_service.training.run import make_network, make_preprocessing
from encoder_service.training.state import state_path
from hashlens.errors import InvalidInputError
from tests.support.pictures import make_tree, make_undivided_tree
from tests.support.training import run_train
from tests.unit.encoder.conftest import write_small_fashion_mnist


@pytest.fixture
def garments(tmp_path: Path) -> Path:
    write_small_fashion_mnist(tmp_path, 60, 20)
    return tmp_path


# --- what it writes ---


def test_checkpoint_log_and_curves(garments: Path) -> None:
    log, plot = garments / "log.csv", garments / "curves.png"
    result = run_train(garments, "--log", str(log), "--plot", str(plot), "--recipe", "csq")
    assert result.exit_code == 0, result.output
    assert "epoch   2  loss" in result.output

    checkpoint = load_checkpoint(garments / "model.safetensors")
    assert (checkpoint.backbone, checkpoint.n_bits, len(checkpoint.classes)) == ("resnet9", 12, 10)
    assert (
        checkpoint.recipe
        == make_recipe(
            "csq",
            n_bits=12,
            epochs=2,
            batch_size=8,
            holdout=0.2,
            resize=8,
            crop=8,
            learning_rate=0.05,
        ).to_json()
    )
    assert "Zalando" in checkpoint.data_licence
    assert 0 <= checkpoint.metrics["test_accuracy"] <= 1
    for name in ("lin2015_coarse_map_full", "split_two_stage_precision_at_10"):
        assert 0 < checkpoint.metrics[name] <= 1
    assert checkpoint.model_id in result.output

    with log.open(newline="") as file:
        lines = list(csv.DictReader(file))
    # Of 60 images 12 are held out: 6 steps an epoch.
    assert [(line["epoch"], line["step"]) for line in lines] == [("1", "6"), ("2", "12")]
    assert all(float(line["loss"]) > 0 and float(line["images_per_s"]) > 0 for line in lines)
    assert all(0 < float(line["holdout_map"]) <= 1 for line in lines)
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert image.width > 1000 > image.height > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20

    left = {path.name for path in garments.iterdir() if "ubyte" not in path.name}
    assert left == {"model.safetensors", "log.csv", "curves.png"}


def test_without_hold_out_and_measuring(garments: Path) -> None:
    log = garments / "log.json"
    result = run_train(garments, "--log", str(log), "--holdout", "0", "--no-evaluate")
    assert result.exit_code == 0, result.output
    entries = json.loads(log.read_text())
    assert [entry["epoch"] for entry in entries] == [1, 2]
    # JSON has no NaN.
    assert [entry["holdout_map"] for entry in entries] == [None, None]
    assert not load_checkpoint(garments / "model.safetensors").metrics


def test_random_crops_and_pictures_on_demand(tmp_path: Path) -> None:
    """Serving's pixels are not training's, and nothing fits in memory."""
    make_tree(tmp_path)
    options = ["--resize", "12", "--batch-size", "4", "--holdout", "0", "--max-cache-mib", "0"]
    assert run_train(tmp_path, *options).exit_code == 0
    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.classes == ("blue", "red")
    assert (checkpoint.preprocessing.resize, checkpoint.preprocessing.crop) == (12, 8)
    assert "test_accuracy" in checkpoint.metrics
    in_memory = load_checkpoint(tmp_path / "model.safetensors").model_id
    assert run_train(tmp_path, *options[:-2]).exit_code == 0
    assert load_checkpoint(tmp_path / "model.safetensors").model_id == in_memory


def test_without_a_test_split(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for path in sorted((tmp_path / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "test").rmdir()
    result = run_train(tmp_path, "--batch-size", "4", "--holdout", "0")
    assert result.exit_code == 0, result.output
    assert "there is no test split to measure on" in result.output
    assert not load_checkpoint(tmp_path / "model.safetensors").metrics


def test_unseen_classes_are_not_seen(garments: Path) -> None:
    result = run_train(garments, "--unseen-classes", "Bag, Dress", "--no-evaluate")
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(garments / "model.safetensors")
    assert len(checkpoint.classes) == 8
    assert not {"Bag", "Dress"} & set(checkpoint.classes)
    assert checkpoint.recipe["unseen_classes"] == "Bag, Dress"


def test_measuring_that_fails_can_be_made_up_for(tmp_path: Path) -> None:
    """What was learned is kept until the checkpoint has its measurements."""
    make_tree(tmp_path)
    spoilt = next((tmp_path / "test").rglob("0.png"))
    whole = spoilt.read_bytes()
    spoilt.write_bytes(b"no picture")
    options = ["--batch-size", "4", "--holdout", "0"]
    failed = run_train(tmp_path, *options)
    assert failed.exit_code == 1
    assert spoilt.name in failed.output
    learned = load_checkpoint(tmp_path / "model.safetensors")
    assert not learned.metrics
    spoilt.write_bytes(whole)
    result = run_train(tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "going on after step 6 of 6" in result.output
    assert "epoch   1" not in result.output
    measured = load_checkpoint(tmp_path / "model.safetensors")
    assert measured.model_id == learned.model_id
    assert measured.metrics
    assert not state_path(tmp_path / "model.safetensors").exists()


# --- going on ---


def test_a_state_of_another_recipe(garments: Path) -> None:
    """Left by a training that could not be measured."""
    labels = garments / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.write_bytes(b"damaged")
    assert run_train(garments).exit_code == 1
    labels.write_bytes(whole)
    state = state_path(garments / "model.safetensors")
    before = state.read_bytes()

    other = run_train(garments, "--n-bits", "16", "--seed", "7")
    assert other.exit_code == 1
    assert "n_bits was 12 and is 16; seed was 1 and is 7" in other.output
    assert state.read_bytes() == before

    anew = run_train(garments, "--n-bits", "16", "--seed", "7", "--no-resume", "--no-evaluate")
    assert anew.exit_code == 0, anew.output
    assert "going on" not in anew.output
    assert load_checkpoint(garments / "model.safetensors").n_bits == 16
    assert not state.exists()


def test_a_damaged_state(garments: Path) -> None:
    state_path(garments / "model.safetensors").write_bytes(b"PK\x03\x04 and no more")
    result = run_train(garments)
    assert result.exit_code == 1
    assert "resume:" in result.output
    assert "cannot be read" in result.output
    assert "--no-resume" in result.output
    assert not (garments / "model.safetensors").exists()
    assert run_train(garments, "--no-resume", "--no-evaluate").exit_code == 0


# --- bad data ---


def test_an_empty_class(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    result = run_train(tmp_path)
    assert result.exit_code == 1
    assert "empty" in result.output
    assert "no images" in result.output


def test_an_unreadable_image(tmp_path: Path) -> None:
    make_tree(tmp_path)
    spoilt = tmp_path / "train" / "red" / "deeper" / "3.jpg"
    spoilt.write_bytes(spoilt.read_bytes()[:200])
    for cache in ("4096", "0"):
        result = run_train(
            tmp_path, "--batch-size", "4", "--holdout", "0", "--max-cache-mib", cache
        )
        assert result.exit_code == 1
        assert str(Path("red", "deeper", "3.jpg")) in result.output.replace("\n", "")
        assert "defect of Hashlens" not in result.output
    left_out = run_train(tmp_path, "--batch-size", "4", "--holdout", "0", "--skip-unreadable")
    assert left_out.exit_code == 0, left_out.output
    assert "left out: " in left_out.output


def test_one_class(tmp_path: Path) -> None:
    make_undivided_tree(tmp_path, {"red": 10})
    result = run_train(tmp_path)
    assert result.exit_code == 1
    assert "only one class, 'red'" in result.output


def test_one_image_of_a_class(tmp_path: Path) -> None:
    make_undivided_tree(tmp_path, {"red": 10, "blue": 1})
    result = run_train(tmp_path, "--batch-size", "4")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "model.safetensors").classes == ("blue", "red")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--batch-size", "200"], "batch_size: 48 training images are fewer"),
        (["--unseen-classes", "Bag,Hat"], "unseen_classes: there is no class 'Hat'"),
        (
            [
                "--unseen-classes",
                "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Bag,Sneaker",
            ],
            "unseen_classes: at least two classes",
        ),
        (["--device", "cuda:99"], "device: device is 'cuda:99', but torch finds"),
        (["--device", "tpu"], "device: device is cpu, cuda, cuda:N or auto"),
        (["--output", "{}/none/model.safetensors"], "output: there is no folder"),
        (["--log", "{}/none/log.csv"], "log: there is no folder"),
        (["--plot", "{}"], "plot: "),
        (["--output", "{}"], "is a folder; name a file"),
        (["--init", "imagenet"], "init: there are no ImageNet weights for resnet9"),
        (["--init", "{}/none"], "none: cannot be read"),
        (["--backbone", "resnet99"], "backbone: there is no backbone 'resnet99'"),
        (["--crop", "7"], "crop: resnet9 needs at least 8 px"),
        (["--crop", "9"], "crop <= resize"),
        (["--n-bits", "0"], "n_bits: n_bits is 1 to 512"),
        (["--amp", "fp16"], "amp: fp16 needs CUDA"),
        (["--freeze", "layer1"], "freeze: no parameter of resnet9"),
        (["--patience", "2", "--holdout", "0.01"], "patience: "),
        (["--n-threads", "-1"], "n_threads"),
    ],
)
def test_one_line_says_what_to_mend(garments: Path, options: list[str], match: str) -> None:
    result = run_train(garments, *(option.format(garments) for option in options))
    assert result.exit_code in (1, 2)
    output = " ".join(result.output.split())
    assert match in output
    assert "defect of Hashlens" not in output
    assert not (garments / "model.safetensors").exists()


def test_no_data(tmp_path: Path) -> None:
    result = run_train(tmp_path)
    assert result.exit_code == 1
    assert "dataset-fashion-mnist" in result.output


# --- first weights ---


def test_preprocessing_goes_with_the_first_weights(checkpoint_file: Path) -> None:
    assert make_preprocessing(make_recipe()).std == (0.25, 0.25, 0.25)
    assert make_preprocessing(make_recipe(init="imagenet")).mean == IMAGENET_MEAN
    from_file = make_preprocessing(make_recipe(init=str(checkpoint_file), crop=20))
    assert (from_file.mean, from_file.crop) == (IMAGENET_MEAN, 20)
    assert not from_file.jpeg_draft
    assert make_preprocessing(make_recipe(jpeg_draft=True)).jpeg_draft


def test_init_from_a_checkpoint(checkpoint: Checkpoint, checkpoint_file: Path) -> None:
    """With other classes and another length."""
    recipe = make_recipe(
        init=str(checkpoint_file), backbone=checkpoint.backbone, n_bits=7, resize=32, crop=32
    )
    network = make_network(recipe, n_classes=5)
    assert (network.n_bits, network.n_classes) == (7, 5)
    theirs = checkpoint.network.backbone.state_dict()
    assert all(torch.equal(t, theirs[k]) for k, t in network.backbone.state_dict().items())


def test_init_from_a_checkpoint_of_another_backbone(garments: Path, checkpoint_file: Path) -> None:
    result = run_train(garments, "--init", str(checkpoint_file))
    assert result.exit_code == 1
    assert "is a mobilenet_v3_small, not a resnet9" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"backbone": "mobilenet_v3_small", "init": "scratch"}, "crop"),
        ({"init": "no-such-file"}, "checkpoint"),
    ],
)
def test_first_weights_that_do_not_fit(changes: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make_network(make_recipe(**changes), 3)
    assert caught.value.field == field


# --- the log ---

REPORT = EpochReport(
    epoch=1,
    step=10,
    loss=0.5,
    train_accuracy=0.25,
    holdout_accuracy=float("nan"),
    holdout_map=float("nan"),
    learning_rate=0.1,
    images_per_s=100.0,
    seconds=2.5,
)


def test_csv_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", [REPORT])
    header, line = (tmp_path / "log.csv").read_text().splitlines()
    assert header.split(",") == [
        *("epoch", "step", "loss", "train_accuracy", "holdout_accuracy", "holdout_map"),
        *("learning_rate", "images_per_s", "seconds"),
    ]
    assert line == "1,10,0.5,0.25,,,0.1,100.0,2.5"


def test_curves_of_one_epoch_without_a_hold_out(tmp_path: Path) -> None:
    draw_curves(tmp_path / "a", [REPORT], "a title with $ and _")
    with Image.open(tmp_path / "a") as image:
        assert image.format == "PNG"


# --- the command module ---


def test_reading_the_commands_does_not_import_torch() -> None:
    """`hashlens --help` reads them, and torch takes seconds."""
    code = "import sys, encoder_service.commands; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
