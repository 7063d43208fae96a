"""The log of a training, as a file and as a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One line of the training log."""

    epoch: int
    """Counted from 1."""
    step: int
    """Optimiser steps so far."""
    loss: float
    """Mean over the epoch's steps, on augmented images."""
    train_accuracy: float
    """Share of augmented training images put in their class; with several labels an image, of
    (image, class) pairs decided rightly."""
    holdout_accuracy: float
    """The same of the held-out training images, as they are; NaN if none are held out."""
    holdout_map: float
    """Tie-aware mean average precision of the codes of the held-out images among themselves, over
    the full list; NaN if fewer than two are held out."""
    learning_rate: float
    """After the last step; of the first group of parameters."""
    images_per_s: float
    seconds: float


def write_log(path: Path, reports: Sequence[EpochReport]) -> None:
    """Write the log: JSON if the file's name ends so, else CSV. NaN is null and nothing."""
    plain = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(report).items()
        }
        for report in reports
    ]
    if path.suffix == ".json":
        path.write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(EpochReport)])
        writer.writeheader()
        writer.writerows(plain)


def draw_curves(path: Path, reports: Sequence[EpochReport], title: str) -> None:
    """Draw loss, accuracy, mAP and learning rate by epoch to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [report.epoch for report in reports]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    try:
        _curve(axes[0], epochs, [("training loss", [r.loss for r in reports])])
        axes[0].set_ylabel("loss")
        _curve(
            axes[1],
            epochs,
            [
                ("training images, augmented: accuracy", [r.train_accuracy for r in reports]),
                ("hold-out: accuracy", [r.holdout_accuracy for r in reports]),
                ("hold-out: mAP of the codes", [r.holdout_map for r in reports]),
            ],
        )
        axes[1].set_ylabel("share")
        axes[1].set_ylim(top=1.0)
        _curve(axes[2], epochs, [("learning rate", [r.learning_rate for r in reports])])
        axes[2].set_ylabel("learning rate after the epoch")
        figure.suptitle(title)
        figure.savefig(path, dpi=120, format="png")
    finally:
        pyplot.close(figure)


def _curve(axis: Any, epochs: list[int], lines: Sequence[tuple[str, list[float]]]) -> None:
    for label, values in lines:
        if not all(math.isnan(value) for value in values):
            axis.plot(epochs, values, marker=".", label=label)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)
