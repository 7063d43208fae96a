from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_service.commands import inspect, train
from encoder_service.model.checkpoint import Checkpoint, load_checkpoint
from encoder_service.model.network import HashNet
from encoder_service.preprocess import IMAGENET_MEAN, Preprocessing
from encoder_service.training.datasets import LabelledPixels
from encoder_service.training.depthwise import DenseDepthwise
from encoder_service.training.fit import accuracy, augment, fit
from encoder_service.training.measure import Encodings, _coarse, two_stage_order
from encoder_service.training.recipe import Recipe
from encoder_service.training.run import make_network, make_preprocessing
from hashlens import codes
from hashlens.errors import InvalidInputError
from tests.unit.encoder.conftest import write_small_fashion_mnist

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize=32, crop=32)


def patterns(n: int, seed: int = 0) -> LabelledPixels:
    """Noise with a bright top or a bright bottom."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    pixels = rng.integers(0, 100, (n, 32, 32, 3), dtype=np.uint8)
    pixels[labels == 0, :16] += 120
    pixels[labels == 1, 16:] += 120
    return LabelledPixels(pixels, labels.astype(np.int64), ("top", "bottom"))


NO_CHANGE = Recipe(flip=False, shift=0, erase=0.0)


# --- the loop ---


def test_it_learns() -> None:
    torch.manual_seed(0)
    network = HashNet("mobilenet_v3_small", 8, 2, "batch")
    recipe = Recipe(epochs=6, batch_size=16, flip=False, shift=1, learning_rate=1e-3)
    steps: list[int] = []
    reports = list(
        fit(
            network,
            patterns(96),
            patterns(10, 1),
            PREPROCESSING,
            recipe,
            device=CPU,
            on_step=lambda report: steps.append(report.step),
        )
    )
    assert steps == list(range(1, 37))
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].train_accuracy > 0.95


def test_the_seed_decides_everything() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        network = HashNet("mobilenet_v3_small", 8, 2, "batch")
        recipe = Recipe(epochs=1, batch_size=16, seed=seed)
        list(fit(network, patterns(32), patterns(0), PREPROCESSING, recipe, device=CPU))
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_too_few_images() -> None:
    network = HashNet("mobilenet_v3_small", 8, 2)
    with pytest.raises(InvalidInputError, match="lower batch_size from 256"):
        next(fit(network, patterns(9), patterns(0), PREPROCESSING, Recipe(), device=CPU))


def test_accuracy_counts_right_answers() -> None:
    network = HashNet("mobilenet_v3_small", 8, 2)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    data = patterns(10)
    assert accuracy(network, data, PREPROCESSING, CPU) == 0.5
    assert accuracy(network, data.take(np.arange(0, 10, 2)), PREPROCESSING, CPU) == 1.0
    assert np.isnan(accuracy(network, patterns(0), PREPROCESSING, CPU))


# --- augmentation ---


def test_augmentation_off_changes_nothing() -> None:
    pixels = patterns(8).pixels
    np.testing.assert_array_equal(augment(pixels, NO_CHANGE, np.random.default_rng(0)), pixels)


def test_augmentation_works_on_a_copy() -> None:
    pixels = patterns(8).pixels
    before = pixels.copy()
    changed = augment(pixels, Recipe(), np.random.default_rng(0))
    np.testing.assert_array_equal(pixels, before)
    assert changed.shape == pixels.shape
    assert not np.array_equal(changed, pixels)


def test_flip_mirrors_about_half() -> None:
    pixels = patterns(200).pixels
    changed = augment(pixels, replace(NO_CHANGE, flip=True), np.random.default_rng(0))
    same = (changed == pixels).all(axis=(1, 2, 3))
    mirrored = (changed == pixels[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_shift_moves_and_repeats_the_border() -> None:
    pixels = patterns(50).pixels
    changed = augment(pixels, replace(NO_CHANGE, shift=2), np.random.default_rng(0))
    moves = set()
    for image, got in zip(pixels, changed, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        fits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[y : y + 32, x : x + 32], got)
        ]
        assert fits
        moves.add(fits[0])
    assert len(moves) > 10


def test_erase_blanks_one_rectangle_of_one_value() -> None:
    pixels = patterns(60).pixels
    changed = augment(pixels, replace(NO_CHANGE, erase=0.5), np.random.default_rng(0))
    touched = 0
    for image, got in zip(pixels, changed, strict=True):
        rows, columns = np.nonzero((image != got).any(axis=2))
        if len(rows):
            touched += 1
            patch = got[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert max(patch.shape[:2]) <= 32 // 3
            assert len(np.unique(patch)) == 1
    assert 15 < touched < 45


# --- depthwise convolutions as matrices ---


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(2, 5),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
)
def test_dense_depthwise_is_a_convolution(
    n: int, channels: int, height: int, width: int, kernel: int, stride: int
) -> None:
    generator = torch.Generator().manual_seed(height * 100 + width)
    images = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64)
    layer = torch.nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )
    results = []
    for context in (DenseDepthwise(), torch.enable_grad()):
        inputs = images.clone().requires_grad_()
        layer.weight = torch.nn.Parameter(weight.clone())
        with context:
            output = layer(inputs)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        results.append((output, inputs.grad, layer.weight.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_other_convolutions_are_left_alone() -> None:
    images = torch.randn(2, 4, 3, 3)
    for layer in (
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Conv2d(4, 4, 3, groups=4, bias=True),
        torch.nn.Conv2d(4, 8, 3, groups=4, bias=False),
        torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
    ):
        plain = layer(images)
        with DenseDepthwise():
            assert torch.equal(layer(images), plain)
    with DenseDepthwise():
        assert F.conv2d(images, torch.ones(1, 4, 3, 3), padding="same").shape == (2, 1, 3, 3)


# --- first weights and preprocessing ---


def test_preprocessing_goes_with_the_first_weights(checkpoint_file: Path) -> None:
    assert make_preprocessing(Recipe()).std == (0.25, 0.25, 0.25)
    assert make_preprocessing(Recipe(init="imagenet")).mean == IMAGENET_MEAN
    from_file = make_preprocessing(Recipe(init=str(checkpoint_file), crop=40))
    assert (from_file.mean, from_file.crop) == (IMAGENET_MEAN, 40)


def test_init_from_a_checkpoint(checkpoint: Checkpoint, checkpoint_file: Path) -> None:
    network = make_network(Recipe(init=str(checkpoint_file), n_bits=7), n_classes=5)
    assert (network.n_bits, network.n_classes) == (7, 5)
    theirs = checkpoint.network.backbone.state_dict()
    assert all(torch.equal(t, theirs[k]) for k, t in network.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"backbone": "resnet18"}, "init"),
        ({"crop": 16, "init": "scratch"}, "crop"),
        ({"init": "no-such-file"}, "checkpoint"),
    ],
)
def test_first_weights_that_do_not_fit(
    checkpoint_file: Path, change: dict[str, object], field: str
) -> None:
    recipe = Recipe(**{"init": str(checkpoint_file), **change})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError) as caught:
        make_network(recipe, 3)
    assert caught.value.field == field


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 1}, {"erase": 1.5}])
def test_recipe_ranges(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Recipe(**change)  # type: ignore[arg-type]
    assert caught.value.field in change


# --- measuring ---


def encodings(n: int, n_bits: int, seed: int) -> Encodings:
    rng = np.random.default_rng(seed)
    bits = rng.random((n, n_bits)) < 0.5
    return Encodings(
        codes.as_words(codes.pack(bits)),
        rng.standard_normal((n, 4)).astype(np.float32),
        rng.integers(0, 3, n),
    )


def test_coarse_map_against_its_definition() -> None:
    stored, asked = encodings(1500, 10, 0), encodings(20, 10, 1)
    got = _coarse(stored, asked, lambda done, total: None)
    bits = [codes.unpack(e.words.T.copy().view(np.uint8)[:, :2], 10) for e in (stored, asked)]
    for depth, name in ((1000, "coarse_map_at_1000"), (1500, "coarse_map_full")):
        total = 0.0
        for query in range(20):
            distances = [int((bits[1][query] != row).sum()) for row in bits[0]]
            ranked = sorted(range(1500), key=lambda row: (distances[row], row))[:depth]
            found, precisions = 0, []
            for rank, row in enumerate(ranked, 1):
                if stored.labels[row] == asked.labels[query]:
                    found += 1
                    precisions.append(found / rank)
            total += sum(precisions) / len(precisions)
        assert got[name] == pytest.approx(total / 20)


def test_two_stage_order_against_its_definition() -> None:
    stored, asked = encodings(1500, 10, 0), encodings(5, 10, 1)
    for query in range(5):
        order = two_stage_order(stored, asked, query)
        distances = np.bitwise_count(stored.words[0] ^ asked.words[0, query])
        radius = next(t for t in range(11) if (distances <= t).sum() >= 1000)
        assert sorted(order) == np.flatnonzero(distances <= radius).tolist()
        gaps = np.linalg.norm(stored.features[order] - asked.features[query], axis=1)
        assert (np.diff(gaps) >= -1e-6).all()


# --- the commands ---


def run_train(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        train,
        [
            *("--data", str(folder), "--output", str(folder / "model.safetensors")),
            *("--log", str(folder / "log.csv"), "--epochs", "2", "--batch-size", "32"),
            *("--resize", "32", "--crop", "32", "--n-bits", "12", "--holdout", "40"),
            *("--device", "cpu", *arguments),
        ],
        catch_exceptions=False,
    )


def test_train_then_inspect(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    result = run_train(tmp_path)
    assert result.exit_code == 0
    assert "epoch   2  loss" in result.output

    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.n_bits == 12
    assert checkpoint.recipe["epochs"] == 2
    assert "data" not in checkpoint.recipe
    assert set(checkpoint.metrics) == {
        "test_accuracy",
        "test_distinct_codes",
        "coarse_map_at_1000",
        "coarse_map_full",
        "two_stage_precision_at_10",
        "two_stage_precision_at_100",
    }
    with (tmp_path / "log.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["epoch"] for line in lines] == ["1", "2"]
    assert float(lines[1]["loss"]) > 0

    shown = CliRunner().invoke(inspect, [str(tmp_path / "model.safetensors")])
    assert shown.exit_code == 0
    assert checkpoint.model_id in shown.output
    assert "mobilenet_v3_small" in shown.output

    facts = json.loads(
        CliRunner().invoke(inspect, [str(tmp_path / "model.safetensors"), "--json"]).output
    )
    assert facts["model_id"] == checkpoint.model_id
    assert facts["dim"] == 1024
    assert facts["metrics"] == dict(checkpoint.metrics)


def test_train_without_a_test_split(tmp_path: Path) -> None:
    from tests.unit.encoder.test_datasets import make_tree

    make_tree(tmp_path)
    for path in sorted((tmp_path / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "test").rmdir()
    assert run_train(tmp_path, "--batch-size", "4", "--holdout", "0").exit_code == 0
    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.classes == ("blue", "red")
    assert not checkpoint.metrics


def test_train_without_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="dataset-fashion-mnist"):
        run_train(tmp_path)
    with pytest.raises(InvalidInputError, match="no folder"):
        run_train(tmp_path, "--output", str(tmp_path / "none" / "model.safetensors"))


def test_reading_the_commands_does_not_import_torch() -> None:
    """`hashlens --help` reads them, and torch takes seconds."""
    import subprocess
    import sys

    code = "import sys, encoder_service.commands; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
