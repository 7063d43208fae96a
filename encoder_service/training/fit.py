"""The training loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder_service.data.augment import centre_crop
from encoder_service.data.images import ImageSet
from encoder_service.evaluation.local import quick_map
from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing
from encoder_service.training.average import WeightAverage
from encoder_service.training.batches import Batches, to_input, to_labels
from encoder_service.training.depthwise import DenseDepthwise
from encoder_service.training.distributed import ALONE, Processes
from encoder_service.training.history import EpochReport
from encoder_service.training.losses import make_loss
from encoder_service.training.optim import freeze, frozen_modules, make_optimizer, make_schedule
from encoder_service.training.recipe import Recipe
from hashlens import codes
from hashlens.errors import InvalidInputError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepReport:
    """Sent to the observer after each step."""

    step: int
    """Counted from 1 over the whole training."""
    steps: int
    """How many there will be."""
    loss: float
    """Mean over this epoch's steps so far."""
    accuracy: float
    """Of this epoch's augmented images so far; see `EpochReport.train_accuracy`."""
    images_per_s: float
    """Over this epoch so far, in this process."""


class Trainer:
    """Trains a network in place; can be stopped, stored and gone on with between any two steps.

    Parameters
    ----------
    network
        Moved to `device`.
    train, holdout
        What is learned from; what is looked at after each epoch.
    preprocessing
        Its `normalise` turns pixels into input, here as in serving.
    recipe
        The settings.
    device
        Where to train.
    group
        The processes that train together.
    n_workers
        Threads that prepare batches.

    Raises
    ------
    InvalidInputError
        There are fewer images than one step takes, or a setting does not fit the others.
    """

    def __init__(
        self,
        network: HashNet,
        train: ImageSet,
        holdout: ImageSet,
        preprocessing: Preprocessing,
        recipe: Recipe,
        *,
        device: torch.device,
        group: Processes = ALONE,
        n_workers: int = 2,
    ) -> None:
        _check(train, holdout, recipe, device, group)
        self._recipe, self._device, self._group = recipe, device, group
        self._holdout, self._preprocessing = holdout, preprocessing
        self._batches = Batches(train, preprocessing, recipe, group, n_workers)
        network.to(device)
        network.to(memory_format=torch.channels_last)
        self._network = network
        self._loss = make_loss(recipe, len(train.classes), multi_label=train.multi_label).to(device)
        network.detach_classifier = not self._loss.shapes_by_classifier
        freeze(network, recipe.freeze)
        per_epoch = self._batches.per_epoch
        self.steps = recipe.steps or recipe.epochs * per_epoch
        """Optimiser steps of the whole training."""
        self.epochs = math.ceil(self.steps / per_epoch)
        """Passes over the images, of which the last may be cut short."""
        self._optimizer = make_optimizer(network, recipe)
        self._schedule = make_schedule(self._optimizer, recipe, self.steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self._average = WeightAverage(network, recipe.ema) if recipe.ema else None
        self._parallel = group.wrap(network, device)
        # Only now: for several CUDA devices, layers of batch normalisation were replaced.
        self._frozen = frozen_modules(network)
        self._step = 0
        self._sums = [0.0, 0.0, 0.0, 0.0]
        """Of this epoch: loss, right answers, answers, seconds."""
        self._best: dict[str, Any] | None = None
        """Epoch, mAP and weights of the best epoch so far, if the recipe keeps the best."""
        self.reports: list[EpochReport] = []
        """One for each epoch that is done."""

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return self._step

    @property
    def result(self) -> HashNet:
        """The network as it is to be served: averaged, the best or the last."""
        network = self._network if self._average is None else self._average.network
        if self._best is not None:
            network.load_state_dict(self._best["weights"])
        network.detach_classifier = False
        return network

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, for `torch.save`."""
        return {
            "step": self._step,
            "sums": self._sums,
            "network": self._network.state_dict(),
            "average": None if self._average is None else self._average.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "best": self._best,
            "reports": [asdict(report) for report in self.reports],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where another trainer with the same settings and images was stopped."""
        self._step = state["step"]
        # The leader's; the others count from here on, so the log speaks of a part of that epoch.
        self._sums = list(state["sums"])
        self._network.load_state_dict(state["network"])
        if self._average is not None:
            self._average.network.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._best = state["best"]
        self.reports = [EpochReport(**report) for report in state["reports"]]

    def fit(
        self,
        *,
        on_step: Callable[[StepReport], None] = lambda report: None,
        on_pause: Callable[[], None] = lambda: None,
    ) -> Iterator[EpochReport]:
        """Train to the end.

        Parameters
        ----------
        on_step
            Told of every step.
        on_pause
            Called between steps, when everything is in a state to be stored.

        Yields
        ------
        EpochReport
            After each epoch.

        Raises
        ------
        InvalidInputError
            The loss is no longer a number.
        """
        per_epoch = self._batches.per_epoch
        while self._step < self.steps and not self._has_settled():
            epoch, first_step = divmod(self._step, per_epoch)
            last_step = min(per_epoch, self.steps - epoch * per_epoch)
            n_before = len(self.reports)
            self._train_mode()
            with DenseDepthwise() if self._device.type == "cpu" else nullcontext():
                began = time.perf_counter()
                batches = self._batches.of_epoch(epoch, first_step)
                for step, batch in zip(range(first_step, last_step), batches, strict=False):
                    self._learn(batch.images, batch.labels)
                    self._sums[3] += time.perf_counter() - began
                    self._report_step(on_step, step + 1)
                    # After the last step an epoch has yet to be ended.
                    if step + 1 < last_step:
                        on_pause()
                    began = time.perf_counter()
                batches.close()
            self._end_epoch(epoch, last_step)
            assert len(self.reports) == n_before + 1
            on_pause()
            yield self.reports[-1]

    def _learn(self, images: Tensor, labels: Tensor) -> None:
        """Take one step."""
        # Dropout draws from torch's own generator: seeded by step, it can be gone on with.
        torch.manual_seed(self._seed_of_step())
        images = images.to(self._device, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        with self._autocast():
            output = self._parallel(images)
        # Outside: there, a loss's matrix products would be of 8 bits of precision.
        loss = self._loss(output, labels)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._step += 1
        if self._average is not None:
            self._average.update(self._network, self._step)
        value = loss.item()
        if not math.isfinite(value):
            raise InvalidInputError(
                f"the loss is {value} after {self._step} steps: the training has come apart. Lower "
                f"learning_rate from {self._recipe.learning_rate:g}.",
                field="learning_rate",
            )
        self._sums[0] += value
        self._sums[1] += _n_right(output.logits, labels)
        self._sums[2] += labels.numel()

    def _report_step(self, on_step: Callable[[StepReport], None], done: int) -> None:
        loss, right, asked, seconds = self._sums
        on_step(
            StepReport(
                step=self._step,
                steps=self.steps,
                loss=loss / done,
                accuracy=right / asked,
                images_per_s=done * self._recipe.batch_size / self._group.world / seconds,
            )
        )

    def _end_epoch(self, epoch: int, done: int) -> None:
        seconds = self._sums[3]
        loss, right, asked, _ = self._group.sum(self._sums, self._device)
        accuracy, mean_ap = float("nan"), float("nan")
        if len(self._holdout) and self._group.leads:
            accuracy, mean_ap = self._look(self._holdout)
        accuracy = self._group.agree(accuracy, self._device)
        mean_ap = self._group.agree(mean_ap, self._device)
        report = EpochReport(
            epoch=epoch + 1,
            step=self._step,
            loss=loss / done / self._group.world,
            train_accuracy=right / asked,
            holdout_accuracy=accuracy,
            holdout_map=mean_ap,
            learning_rate=float(self._schedule.get_last_lr()[0]),
            images_per_s=done * self._recipe.batch_size / seconds,
            seconds=seconds,
        )
        self.reports.append(report)
        self._sums = [0.0] * 4
        if self._recipe.patience and (self._best is None or mean_ap > self._best["map"]):
            network = self._network if self._average is None else self._average.network
            weights = copy.deepcopy(network.state_dict())
            self._best = {"epoch": report.epoch, "map": mean_ap, "weights": weights}

    def _has_settled(self) -> bool:
        """Whether the hold-out's mAP has not risen for as long as the recipe waits."""
        if self._best is None:
            return False
        since: int = len(self.reports) - self._best["epoch"]
        return since >= self._recipe.patience

    @torch.inference_mode()
    def _look(self, images: ImageSet) -> tuple[float, float]:
        """Return accuracy, and mAP of the codes among themselves, of images as they are."""
        network = self._network if self._average is None else self._average.network
        network.eval()
        n_right, n_asked = 0, 0
        packed = []
        for start in range(0, len(images), 250):
            rows = np.arange(start, min(start + 250, len(images)))
            pixels = centre_crop(images.batch(rows), self._recipe.crop)
            with self._autocast():
                output = network(to_input(pixels, self._preprocessing).to(self._device))
            labels = to_labels(images.labels[rows]).to(self._device)
            n_right += _n_right(output.logits, labels)
            n_asked += labels.numel()
            packed.append(codes.pack(output.scores.float().cpu().numpy() > 0))
        # One image has none to be found.
        mean_ap = (
            quick_map(np.concatenate(packed), images.labels, self._recipe.n_bits)
            if len(images) > 1
            else float("nan")
        )
        return n_right / n_asked, mean_ap

    def _train_mode(self) -> None:
        self._network.train()
        for module in self._frozen:
            module.eval()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self._recipe.amp)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def _seed_of_step(self) -> int:
        words = np.random.SeedSequence([self._recipe.seed, self._step, self._group.rank])
        return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _n_right(logits: Tensor, labels: Tensor) -> int:
    """Count right answers: classes, or, with several labels an image, (image, class) pairs."""
    if labels.ndim == 2:
        return int(((logits > 0) == (labels > 0.5)).sum())
    return int((logits.argmax(1) == labels).sum())


def _check(
    train: ImageSet,
    holdout: ImageSet,
    recipe: Recipe,
    device: torch.device,
    group: Processes,
) -> None:
    if len(train) < recipe.batch_size:
        raise InvalidInputError(
            f"{len(train)} training images are fewer than one step takes: lower batch_size from "
            f"{recipe.batch_size}, or holdout.",
            field="batch_size",
        )
    if recipe.batch_size % group.world or recipe.batch_size < 2 * group.world:
        raise InvalidInputError(
            f"batch_size is {recipe.batch_size}; {group.world} processes need an even share of at "
            "least 2 images each.",
            field="batch_size",
        )
    if recipe.patience and len(holdout) < 2:
        raise InvalidInputError(
            f"patience watches the hold-out, which has {len(holdout)} images: raise holdout from "
            f"{recipe.holdout:g}.",
            field="patience",
        )
    if recipe.amp == "fp16" and device.type != "cuda":
        raise InvalidInputError("fp16 needs CUDA. Use bf16 or none.", field="amp")
