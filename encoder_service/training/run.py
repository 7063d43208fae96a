"""One training from images to checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from encoder_service.encoder import resolve_device
from encoder_service.model.backbones import get_backbone, load_imagenet
from encoder_service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from encoder_service.model.network import HashNet
from encoder_service.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from encoder_service.training.datasets import (
    OnProgress,
    download_fashion_mnist,
    has_test_split,
    load_split,
)
from encoder_service.training.fit import EpochReport, StepReport, fit
from encoder_service.training.measure import measure
from encoder_service.training.recipe import Recipe, TrainConfig
from hashlens.errors import InvalidInputError


class Observer(Protocol):
    """Told how a training goes."""

    def begin(self, what: str) -> OnProgress:
        """A step with this name begins; return what is told how far it is."""

    def step(self, report: StepReport) -> None:
        """One optimiser step is done."""

    def epoch(self, report: EpochReport) -> None:
        """One epoch is done."""


def train_model(config: TrainConfig, observer: Observer) -> Checkpoint:
    """Train, measure on the test split, write the checkpoint.

    The test split is read only after training: nothing is chosen by it. Seeds torch's global
    generator, which draws the first weights and the dropout.

    Parameters
    ----------
    config
        The settings.
    observer
        Told how it goes.

    Returns
    -------
    Checkpoint
        As it was written to ``config.output``.

    Raises
    ------
    InvalidInputError
        The data is not there, or a setting does not fit.
    """
    device = resolve_device(config.device)
    if config.n_threads:
        torch.set_num_threads(config.n_threads)
    root = config.data
    if config.download:
        if root is None:
            raise InvalidInputError("say with --data where to download to.", field="data")
        root = download_fashion_mnist(root)
    if not config.output.parent.is_dir():
        raise InvalidInputError(f"there is no folder {config.output.parent}.", field="output")
    preprocessing = make_preprocessing(config)
    images = load_split(root, "train", preprocessing, observer.begin("read the train split"))
    order = np.random.default_rng(config.seed).permutation(len(images))
    held_out, learned = (
        images.take(rows) for rows in (order[: config.holdout], order[config.holdout :])
    )
    torch.manual_seed(config.seed)
    network = make_network(config, len(images.classes))
    reports: list[EpochReport] = []
    for report in fit(
        network, learned, held_out, preprocessing, config, device=device, on_step=observer.step
    ):
        reports.append(report)
        observer.epoch(report)
        if config.log is not None:
            _write_log(config.log, reports)
    checkpoint = Checkpoint(
        network=network.cpu(),
        preprocessing=preprocessing,
        classes=images.classes,
        recipe=config.recipe(),
        data_licence=images.licence,
    )
    # Before measuring, which may be interrupted.
    save_checkpoint(checkpoint, config.output)
    if has_test_split(root):
        test = load_split(root, "test", preprocessing, observer.begin("read the test split"))
        metrics = measure(
            checkpoint, images, test, device=config.device, on_progress=observer.begin
        )
        checkpoint = replace(checkpoint, network=network.cpu(), metrics=metrics)
        save_checkpoint(checkpoint, config.output)
    return checkpoint


def make_preprocessing(recipe: Recipe) -> Preprocessing:
    """Return the preprocessing that goes with a recipe."""
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    if recipe.init == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif recipe.init != "scratch":
        start = load_checkpoint(Path(recipe.init)).preprocessing
        mean, std = start.mean, start.std
    return Preprocessing(
        resize=recipe.resize,
        crop=recipe.crop,
        interpolation=recipe.interpolation,
        mean=mean,
        std=std,
    )


def make_network(recipe: Recipe, n_classes: int) -> HashNet:
    """Make the network with its first weights.

    ``init`` is ``scratch``, ``imagenet``, or a checkpoint with the same backbone: of that, all but
    H and the classifier is taken.

    Raises
    ------
    InvalidInputError
        The weights cannot be had, are of another backbone, or the input is too small for it.
    """
    backbone = get_backbone(recipe.backbone)
    if recipe.crop < backbone.min_size:
        raise InvalidInputError(
            f"{backbone.name} needs at least {backbone.min_size} px, not {recipe.crop}.",
            field="crop",
        )
    network = HashNet(recipe.backbone, recipe.n_bits, n_classes, recipe.hash_norm)
    if recipe.init == "imagenet":
        load_imagenet(network.backbone, backbone)
    elif recipe.init != "scratch":
        start = load_checkpoint(Path(recipe.init))
        if start.backbone != recipe.backbone:
            raise InvalidInputError(
                f"{recipe.init} is a {start.backbone}, not a {recipe.backbone}.", field="init"
            )
        network.backbone.load_state_dict(start.network.backbone.state_dict())
    return network


def _write_log(path: Path, reports: Sequence[EpochReport]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(EpochReport)])
        writer.writeheader()
        writer.writerows(asdict(report) for report in reports)
