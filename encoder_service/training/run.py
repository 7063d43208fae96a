"""One training from images to checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from encoder_service.data.images import ImageSet, load_images
from encoder_service.data.source import has_split, open_split
from encoder_service.data.split import holdout, select_classes
from encoder_service.data.types import OnProgress, Source, Split
from encoder_service.evaluation.local import measure
from encoder_service.forward_pass import resolve_device
from encoder_service.model.backbones import get_backbone, load_imagenet
from encoder_service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from encoder_service.model.network import HashNet
from encoder_service.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from encoder_service.training.distributed import Processes, local_device, processes
from encoder_service.training.fit import StepReport, Trainer
from encoder_service.training.history import EpochReport, draw_curves, write_log
from encoder_service.training.recipe import Recipe, TrainConfig
from encoder_service.training.state import load_state, save_state, state_path
from hashlens.errors import InvalidInputError


class Observer(Protocol):
    """Told how a training goes."""

    def begin(self, what: str) -> OnProgress:
        """A step with this name begins; return what is told how far it is."""

    def step(self, report: StepReport) -> None:
        """One optimiser step is done."""

    def epoch(self, report: EpochReport) -> None:
        """One epoch is done."""

    def note(self, text: str) -> None:
        """Something happened that the user should know."""


class _Silent:
    """Of several processes, all but the first."""

    def begin(self, what: str) -> OnProgress:
        return lambda done, total: None

    def step(self, report: StepReport) -> None: ...

    def epoch(self, report: EpochReport) -> None: ...

    def note(self, text: str) -> None: ...


def train_model(config: TrainConfig, observer: Observer) -> Checkpoint:
    """Train, write the checkpoint, measure on the test split, write the measurements into it.

    The test split is read only after training: nothing is chosen by it. Beside the checkpoint lies
    the training's state until it is done: started again with the same settings and images, an
    interrupted training goes on there, to the same result. Seeds torch's global generator.

    Parameters
    ----------
    config
        The settings.
    observer
        Told how it goes, in the first of several processes.

    Returns
    -------
    Checkpoint
        As it was written to ``config.output``.

    Raises
    ------
    InvalidInputError
        The data is not there, or a setting does not fit.
    OSError
        The disk is full.
    """
    device = local_device(resolve_device(config.device))
    if config.n_threads:
        torch.set_num_threads(config.n_threads)
    for name in ("output", "log", "plot"):
        path = getattr(config, name)
        if path is not None and not path.parent.is_dir():
            raise InvalidInputError(f"there is no folder {path.parent}.", field=name)
        if path is not None and path.is_dir():
            raise InvalidInputError(f"{path} is a folder; name a file.", field=name)
    with processes(device) as group:
        if not group.leads:
            observer = _Silent()
        learned = _learn(config, observer, device, group)
        if group.leads:
            checkpoint = learned.checkpoint
            save_checkpoint(checkpoint, config.output)
            if config.evaluate:
                checkpoint = _measure(config, learned, observer)
                save_checkpoint(checkpoint, config.output)
            # Only now: interrupted while it measures, it goes on with that.
            state_path(config.output).unlink(missing_ok=True)
            return checkpoint
    return learned.checkpoint


@dataclass(frozen=True, slots=True)
class _Learned:
    checkpoint: Checkpoint
    train: Source
    """All images of the classes that were trained on."""
    images: ImageSet | None
    """Their pixels as serving sees them, if training had the same."""


def _learn(
    config: TrainConfig, observer: Observer, device: torch.device, group: Processes
) -> _Learned:
    preprocessing = make_preprocessing(config)
    source = _open(config, "train", observer)
    if config.unseen:
        source = select_classes(source, _seen(source.classes, config.unseen))
    images = load_images(
        source,
        preprocessing,
        side=config.resize,
        max_cache_bytes=config.max_cache_mib << 20,
        on_progress=observer.begin("read the train split"),
    )
    learned, held_out = holdout(images.labels, round(config.holdout * len(images)), config.seed)
    torch.manual_seed(config.seed)
    trainer = Trainer(
        make_network(config, len(images.classes)),
        images.take(learned),
        images.take(held_out),
        preprocessing,
        config,
        device=device,
        group=group,
        n_workers=config.n_workers,
    )
    fingerprint = _fingerprint(config, images, group)
    _train(trainer, config, observer, device, group, fingerprint)
    checkpoint = Checkpoint(
        network=trainer.result.cpu(),
        preprocessing=preprocessing,
        classes=images.classes,
        recipe=config.to_json(),
        data_licence=images.licence,
    )
    return _Learned(checkpoint, source, images if config.resize == config.crop else None)


def _train(
    trainer: Trainer,
    config: TrainConfig,
    observer: Observer,
    device: torch.device,
    group: Processes,
    fingerprint: Mapping[str, Any],
) -> None:
    """Train to the end, storing the state on the way."""
    path = state_path(config.output)
    stored = load_state(path, fingerprint) if config.resume else None
    if stored is not None:
        trainer.restore(stored["trainer"])
        observer.note(
            f"going on after step {stored['trainer']['step']} of {trainer.steps}, from {path}"
        )
    if group.agree(trainer.step, device) != trainer.step:
        raise InvalidInputError(
            f"the first process goes on from {path}, another one does not see that file: put "
            "--output where all of them can read it, or use --no-resume.",
            field="resume",
        )
    saved_at = time.monotonic()

    def save(due_s: float) -> None:
        nonlocal saved_at
        if group.leads and time.monotonic() - saved_at >= due_s:
            save_state({"fingerprint": dict(fingerprint), "trainer": trainer.state()}, path)
            saved_at = time.monotonic()

    for report in trainer.fit(on_step=observer.step, on_pause=lambda: save(config.save_every_s)):
        save(0)
        observer.epoch(report)
        if group.leads:
            _write_history(config, trainer)
    if group.leads and trainer.reports:
        _write_history(config, trainer)


def _write_history(config: TrainConfig, trainer: Trainer) -> None:
    if config.log is not None:
        write_log(config.log, trainer.reports)
    if config.plot is not None:
        title = f"{config.recipe}, {config.backbone}, {config.n_bits} bits, seed {config.seed}"
        draw_curves(config.plot, trainer.reports, title)


def _measure(config: TrainConfig, learned: _Learned, observer: Observer) -> Checkpoint:
    """Return the checkpoint with its measurements, if there is a test split."""
    checkpoint = learned.checkpoint
    if not has_split(config, "test"):
        observer.note("there is no test split to measure on")
        return checkpoint
    test = _open(config, "test", observer)
    if config.unseen:
        test = select_classes(test, _seen(test.classes, config.unseen))
    database, queries = (
        load_images(
            source,
            checkpoint.preprocessing,
            max_cache_bytes=config.max_cache_mib << 20,
            on_progress=observer.begin(f"read the {name} split"),
        )
        if ready is None
        else ready
        for source, name, ready in ((learned.train, "train", learned.images), (test, "test", None))
    )
    metrics = measure(
        checkpoint, database, queries, device=config.device, on_progress=observer.begin
    )
    return replace(checkpoint, network=checkpoint.network.cpu(), metrics=metrics)


def _open(config: TrainConfig, split: Split, observer: Observer) -> Source:
    source = open_split(config, split, observer.begin(f"look at the {split} split"))
    for name in source.skipped:
        observer.note(f"left out: {name}")
    return source


def _seen(classes: tuple[str, ...], unseen: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in unseen if name not in classes]:
        raise InvalidInputError(
            f"there is no class {unknown[0]!r}. The classes are: {', '.join(classes)}.",
            field="unseen_classes",
        )
    seen = tuple(name for name in classes if name not in unseen)
    if len(seen) < 2:
        raise InvalidInputError(
            "at least two classes have to be left to train on.", field="unseen_classes"
        )
    return seen


def _fingerprint(config: TrainConfig, images: ImageSet, group: Processes) -> dict[str, Any]:
    """Return what must not change between an interruption and going on."""
    recipe = config.to_json()
    if not recipe["jpeg_draft"]:
        del recipe["jpeg_draft"]  # States from before there was a choice are gone on from.
    fingerprint = {
        **recipe,
        "n_images": len(images),
        "labels": hashlib.sha256(np.ascontiguousarray(images.labels).tobytes()).hexdigest(),
        "classes": list(images.classes),
        "processes": group.world,
    }
    if config.init not in ("scratch", "imagenet"):
        fingerprint["init_model_id"] = load_checkpoint(Path(config.init)).model_id
    return fingerprint


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
        fit=recipe.fit,
        interpolation=recipe.interpolation,
        jpeg_draft=recipe.jpeg_draft,
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
