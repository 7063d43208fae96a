"""The training loop: softmax cross-entropy on class labels, as in the paper, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing
from encoder_service.training.datasets import LabelledPixels
from encoder_service.training.depthwise import DenseDepthwise
from encoder_service.training.recipe import Recipe
from hashlens.errors import InvalidInputError


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
    """Share of this epoch's augmented images so far put in their class."""
    images_per_s: float
    """Over this epoch so far."""


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One line of the training log."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Mean over the epoch's steps, with augmentation and label smoothing."""
    train_accuracy: float
    """Share of augmented training images put in their class."""
    holdout_accuracy: float
    """Share of the held-out training images put in their class; NaN if none are held out."""
    learning_rate: float
    """After the last step."""
    images_per_s: float
    seconds: float


def fit(
    network: HashNet,
    train: LabelledPixels,
    holdout: LabelledPixels,
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    device: torch.device,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Iterator[EpochReport]:
    """Train in place, one epoch per item.

    Parameters
    ----------
    network
        Moved to `device`.
    train, holdout
        What is learned from; what is only looked at after each epoch. Nothing is selected by it:
        the last epoch's weights are the result.
    preprocessing
        Its `normalise` turns pixels into input, here as in serving.
    recipe
        The settings.
    device
        Where to train.
    on_step
        Told of every step.

    Yields
    ------
    EpochReport
        After each epoch.

    Raises
    ------
    InvalidInputError
        There are fewer images than one step takes.
    """
    if len(train) < recipe.batch_size:
        raise InvalidInputError(
            f"{len(train)} training images are fewer than one step takes: lower batch_size from "
            f"{recipe.batch_size}, or holdout.",
            field="batch_size",
        )
    random = np.random.default_rng(recipe.seed)
    network.to(device)
    network.to(memory_format=torch.channels_last)
    steps_per_epoch = len(train) // recipe.batch_size
    steps = recipe.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(_parameter_groups(network, recipe.weight_decay), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.25
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        began = time.perf_counter()
        order = random.permutation(len(train))[: steps_per_epoch * recipe.batch_size]
        loss_sum, n_right = 0.0, 0
        with DenseDepthwise() if device.type == "cpu" else nullcontext():
            for step, rows in enumerate(order.reshape(steps_per_epoch, recipe.batch_size), 1):
                pixels = augment(train.pixels[rows], recipe, random)
                labels = torch.from_numpy(train.labels[rows]).to(device)
                logits = network(_to_input(pixels, preprocessing, device)).logits
                loss = loss_of(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.item()
                n_right += int((logits.argmax(1) == labels).sum())
                seen = step * recipe.batch_size
                on_step(
                    StepReport(
                        step=(epoch - 1) * steps_per_epoch + step,
                        steps=steps,
                        loss=loss_sum / step,
                        accuracy=n_right / seen,
                        images_per_s=seen / (time.perf_counter() - began),
                    )
                )
        seconds = time.perf_counter() - began
        yield EpochReport(
            epoch=epoch,
            loss=loss_sum / steps_per_epoch,
            train_accuracy=n_right / len(order),
            holdout_accuracy=accuracy(network, holdout, preprocessing, device),
            learning_rate=float(schedule.get_last_lr()[0]),
            images_per_s=len(order) / seconds,
            seconds=seconds,
        )


def augment(
    pixels: NDArray[np.uint8], recipe: Recipe, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Shift, mirror and blank a batch at random.

    Parameters
    ----------
    pixels
        uint8, shape ``[n, s, s, 3]``; not changed.
    recipe
        Says how much.
    random
        Source of chance.

    Returns
    -------
    ndarray
        uint8, the same shape, a new array. What is shifted in repeats the border.
    """
    n, side = pixels.shape[:2]
    reach = np.arange(side)
    offsets = random.integers(-recipe.shift, recipe.shift + 1, (2, n, 1))
    rows, columns = np.clip(reach + offsets, 0, side - 1)
    if recipe.flip:
        mirrored = random.random(n) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    result: NDArray[np.uint8] = pixels[
        np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    for row in np.flatnonzero(random.random(n) < recipe.erase):
        height, width = random.integers(side // 8, side // 3, 2)
        top, left = random.integers(0, side - height), random.integers(0, side - width)
        result[row, top : top + height, left : left + width] = random.integers(0, 256)
    return result


@torch.inference_mode()
def accuracy(
    network: HashNet, data: LabelledPixels, preprocessing: Preprocessing, device: torch.device
) -> float:
    """Return the share of images put in their class, in evaluation mode; NaN for no images."""
    network.eval()
    n_right = 0
    for start in range(0, len(data), 250):
        pixels = data.pixels[start : start + 250]
        logits = network(_to_input(pixels, preprocessing, device)).logits
        guesses = logits.argmax(1).cpu().numpy()
        n_right += int((guesses == data.labels[start : start + 250]).sum())
    return n_right / len(data) if len(data) else float("nan")


def _to_input(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing, device: torch.device
) -> Tensor:
    # Channels are last in memory already, which is the layout the convolutions like best.
    return torch.from_numpy(preprocessing.normalise(pixels)).to(device).permute(0, 3, 1, 2)


def _parameter_groups(network: HashNet, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
