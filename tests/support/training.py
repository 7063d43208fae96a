"""Trainings that take a second: tiny pictures, the smallest network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result

from encoder_service.data.images import ImageSet
from encoder_service.data.types import OnProgress, nobody
from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing
from encoder_service.training.distributed import ALONE, Processes
from encoder_service.training.fit import StepReport, Trainer
from encoder_service.training.history import EpochReport
from encoder_service.training.recipe import Recipe, make_recipe
from encoder_service.training.run import make_network

CPU = torch.device("cpu")
SIDE = 8
PREPROCESSING = Preprocessing(resize=SIDE, crop=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)

SMALL: dict[str, Any] = {
    "backbone": "resnet9",
    "resize": SIDE,
    "crop": SIDE,
    "n_bits": 8,
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 0.05,
}
"""Settings that make a recipe small, whichever it is."""

SMALL_OPTIONS = [
    *("--n-bits", "12", "--epochs", "2", "--batch-size", "8", "--holdout", "0.2"),
    *("--resize", str(SIDE), "--crop", str(SIDE), "--learning-rate", "0.05"),
    *("--device", "cpu", "--n-threads", "1"),
]
"""The same for the command line."""


def patterns(n: int, seed: int = 0, *, multi_label: bool = False) -> ImageSet:
    """Noise with a bright top, bottom or left; with several labels an image, two of them."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    flags = np.zeros((n, 3), bool)
    flags[np.arange(n), labels] = True
    if multi_label:
        flags[np.arange(n), (labels + np.arange(n) // 3 % 2) % 3] = True
    pixels = random.integers(0, 90, (n, SIDE, SIDE, 3), dtype=np.uint8)
    half = SIDE // 2
    pixels[flags[:, 0], :half] += 80
    pixels[flags[:, 1], half:] += 80
    pixels[flags[:, 2], :, :half] += 80
    chosen = flags if multi_label else labels.astype(np.int64)
    return ImageSet.from_pixels(pixels, chosen, ("top", "bottom", "left"))


def small_recipe(recipe: str = "orthohash", **changes: Any) -> Recipe:
    """Return a named recipe, made small, with changes."""
    return make_recipe(recipe, **{**SMALL, "init": "scratch", **changes})  # type: ignore[arg-type]


def make_trainer(
    recipe: Recipe,
    train: ImageSet | None = None,
    holdout: ImageSet | None = None,
    *,
    network: HashNet | None = None,
    group: Processes = ALONE,
    n_workers: int = 2,
) -> Trainer:
    """Make a trainer on patterns, its network from the recipe's seed."""
    images = patterns(64) if train is None else train
    torch.manual_seed(recipe.seed)
    return Trainer(
        make_network(recipe, len(images.classes)) if network is None else network,
        images,
        patterns(0) if holdout is None else holdout,
        PREPROCESSING,
        recipe,
        device=CPU,
        group=group,
        n_workers=n_workers,
    )


def flat_weights(network: torch.nn.Module) -> torch.Tensor:
    """Return all parameters and buffers as one vector."""
    return torch.cat(
        [tensor.detach().flatten().double() for tensor in network.state_dict().values()]
    )


def run_train(folder: Path, *arguments: str) -> Result:
    """Run `hashlens train` in this process, on the data in `folder`, to ``model.safetensors``."""
    from hashlens.cli.main import main

    return CliRunner().invoke(
        main,
        [
            *("train", "--data", str(folder), "--output", str(folder / "model.safetensors")),
            *SMALL_OPTIONS,
            *arguments,
        ],
    )


class Quiet:
    """An observer that shows nothing."""

    def begin(self, what: str) -> OnProgress:
        return nobody

    def step(self, report: StepReport) -> None: ...

    def epoch(self, report: EpochReport) -> None: ...

    def note(self, text: str) -> None: ...
