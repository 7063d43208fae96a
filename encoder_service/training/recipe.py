"""What `hashlens train` can be told. Free of torch, so that the command line reads it fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from encoder_service.data.config import DataConfig, split_names
from hashlens.config import setting
from hashlens.errors import InvalidInputError

RecipeName = Literal["orthohash", "csq", "ssdh", "lin2015-modern", "lin2015"]

LossName = Literal["softmax", "ssdh", "orthohash", "csq"]

DEFAULT_RECIPE: RecipeName = "orthohash"
"""The best of docs/training.md's table."""

RECIPES: dict[str, Mapping[str, Any]] = {
    # Hoe, Ng, Zhang, Chan, Song, Xiang, "One Loss for All: Deep Hashing with a Single Cosine
    # Similarity based Learning Objective", NeurIPS 2021.
    "orthohash": {},
    # Yuan, Wang, Zhang, Tay, Jie, Liu, Feng, "Central Similarity Quantization for Efficient Image
    # and Video Retrieval", CVPR 2020.
    "csq": {"loss": "csq"},
    # Yang, Lin, Chen, "Supervised Learning of Semantics-Preserving Hash via Deep Convolutional
    # Neural Networks", TPAMI 2018.
    "ssdh": {"loss": "ssdh", "hash_norm": "none"},
    # The network and the loss of 2015, trained as one would today.
    "lin2015-modern": {
        "loss": "softmax",
        "hash_norm": "none",
        "backbone": "alexnet",
        "resize": 64,
        "crop": 64,
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "label_smoothing": 0.0,
    },
    # The author's own training files, see docs/training.md.
    "lin2015": {
        "loss": "softmax",
        "hash_norm": "none",
        "backbone": "alexnet",
        "init": "imagenet",
        "resize": 256,
        "crop": 227,
        "fit": "warp",
        "augment": "mirror",
        "optimizer": "sgd",
        "schedule": "step",
        "steps": 50_000,
        "decay_every_steps": 25_000,
        "batch_size": 32,
        "learning_rate": 0.001,
        "bias_learning_rate_scale": 2.0,
        "classifier_learning_rate_scale": 10.0,
        "nesterov": False,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "ema": 0.0,
        "holdout": 0.0,
    },
}
"""By name, what differs from the defaults of `Recipe`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights; stored in the checkpoint.

    Raises
    ------
    InvalidInputError
        A value is out of its range, or two do not go together.
    """

    recipe: RecipeName = setting(
        DEFAULT_RECIPE, "Named settings; it decides the defaults of all that follows."
    )
    backbone: str = setting("resnet9", "Network up to F7: a name in the registry.")
    n_bits: int = setting(48, "Code length in bits, 1 to 512.")
    loss: LossName = setting("orthohash", "What is made small.")
    hash_norm: Literal["none", "batch"] = setting(
        "batch", "Before the sigmoid of H: nothing, as in the paper, or batch normalisation."
    )
    init: str = setting(
        "scratch", "First weights: scratch, imagenet (downloaded by torchvision), or a checkpoint."
    )
    freeze: str = setting(
        "", "Backbone parameters that stay as they are: prefixes with commas between, or all."
    )
    resize: int = setting(28, "Shorter side of the resized image, in pixels.")
    crop: int = setting(28, "Side of the square that is cut from its centre, in pixels.")
    fit: Literal["short", "warp"] = setting(
        "short", "Resize by the shorter side, or warp the whole picture to a square."
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = setting(
        "bilinear", "How images are resized."
    )
    jpeg_draft: bool = setting(
        False,
        "Decode JPEG files at a half, a quarter or an eighth, down to twice resize: large "
        "photographs cost a fraction. Part of the model, as resize is.",
    )
    augment: Literal["none", "mirror", "light", "standard", "strong"] = setting(
        "standard", "How much training images are changed at random."
    )
    epochs: int = setting(24, "Passes over the training images; see steps.")
    steps: int = setting(0, "Optimiser steps, in place of epochs; 0: as many as those have.")
    batch_size: int = setting(256, "Images per step, over all processes.")
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD with momentum, or AdamW.")
    momentum: float = setting(0.9, "SGD's; AdamW has its own.")
    nesterov: bool = setting(True, "SGD with Nesterov's momentum.")
    schedule: Literal["one-cycle", "step"] = setting(
        "one-cycle", "Learning rate: up, then down to nothing; or a tenth every so many steps."
    )
    decay_every_steps: int = setting(0, "See schedule; 0: half of all steps.")
    learning_rate: float = setting(0.2, "Peak, for parameters that no scale is set for.")
    backbone_learning_rate_scale: float = setting(1.0, "Of the learning rate, for the backbone.")
    depth_learning_rate_decay: float = setting(
        1.0, "Times this for each block of the backbone, counted from its end."
    )
    classifier_learning_rate_scale: float = setting(1.0, "Of the learning rate, for F8.")
    bias_learning_rate_scale: float = setting(1.0, "Of the learning rate, for biases.")
    weight_decay: float = setting(5e-4, "On matrices and kernels only.")
    label_smoothing: float = setting(0.1, "Share of the target spread over all classes.")
    margin: float = setting(0.2, "orthohash: taken from the cosine to the own class's target.")
    scale: float = setting(0.0, "orthohash: of the cosines; 0: the root of n_bits.")
    structure_weight: float = setting(
        0.0, "orthohash: of keeping codes as far apart as F7 has them, whatever their class."
    )
    push_weight: float = setting(1.0, "ssdh: of the push of H away from 0.5.")
    fire_weight: float = setting(1.0, "ssdh: of the pull to half of the bits at 1.")
    quantisation_weight: float = setting(1e-4, "csq: of the pull of H to 0 and 1.")
    ema: float = setting(0.998, "Decay per step of the averaged weights that are kept; 0: none.")
    holdout: float = setting(0.05, "Share of the training images kept out, to watch it by.")
    patience: int = setting(
        0,
        "Stop when the hold-out's mAP has not risen for so many epochs, and keep the best; 0: "
        "keep the last.",
    )
    unseen_classes: str = setting(
        "",
        "Classes left out of the training, with commas between, or semicolons where a name has a "
        "comma; see hashlens evaluate.",
    )
    amp: Literal["none", "bf16", "fp16"] = setting(
        "none", "Mixed precision: bf16 on CUDA and on CPUs with AMX, fp16 on CUDA."
    )
    seed: int = setting(1, "Decides weights, order and augmentation.")

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            # Those of `TrainConfig` are among them.
            value = getattr(self, name, low)
            if not low <= value <= high:
                raise InvalidInputError(f"{name} is {low:g} to {high:g}, not {value}.", field=name)
        if self.recipe not in RECIPES:
            raise InvalidInputError(
                f"there is no recipe {self.recipe!r}. Use one of: {', '.join(RECIPES)}.",
                field="recipe",
            )
        if self.patience and not self.holdout:
            raise InvalidInputError(
                "patience watches the hold-out, of which there is none: set holdout.",
                field="patience",
            )

    def to_json(self) -> dict[str, Any]:
        """Return every setting by name, as it is stored."""
        return {field.name: getattr(self, field.name) for field in fields(Recipe)}

    @property
    def unseen(self) -> tuple[str, ...]:
        """The names in `unseen_classes`."""
        return split_names(self.unseen_classes)


def make_recipe(recipe: RecipeName = DEFAULT_RECIPE, **changes: Any) -> Recipe:
    """Return a named recipe with changes, as the command line does."""
    return Recipe(recipe=recipe, **{**RECIPES[recipe], **changes})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe, DataConfig):
    """A recipe, and where things are."""

    output: Path = setting(Path("model.safetensors"), "Checkpoint to write.")
    log: Path | None = setting(
        None, "File to write, an entry per epoch: JSON if its name ends so, else CSV."
    )
    plot: Path | None = setting(None, "PNG file to draw the curves to.")
    resume: bool = setting(True, "Go on where an interrupted training left its state.")
    save_every_s: float = setting(600.0, "Save the state so often, and after each epoch, seconds.")
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a device.")
    n_threads: int = setting(0, "CPU threads; 0: torch decides.")
    n_workers: int = setting(2, "Threads that prepare batches.")
    max_cache_mib: int = setting(4096, "Keep the images in memory if they fit in this, MiB.")
    evaluate: bool = setting(True, "Measure on the test split at the end.")


def make_train_config(recipe: RecipeName = DEFAULT_RECIPE, **changes: Any) -> TrainConfig:
    """Return the configuration that the command line makes of a recipe and options."""
    return TrainConfig(recipe=recipe, **{**RECIPES[recipe], **changes})


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs", 1, 100_000),
    ("steps", 0, 10**9),
    ("batch_size", 2, 65_536),
    ("momentum", 0, 0.9999),
    ("decay_every_steps", 0, 10**9),
    ("learning_rate", 0, 10),
    ("backbone_learning_rate_scale", 0, 1000),
    ("depth_learning_rate_decay", 0.01, 1),
    ("classifier_learning_rate_scale", 0, 1000),
    ("bias_learning_rate_scale", 0, 1000),
    ("weight_decay", 0, 10),
    ("label_smoothing", 0, 1),
    ("margin", 0, 2),
    ("scale", 0, 1000),
    ("structure_weight", 0, 1000),
    ("push_weight", 0, 1000),
    ("fire_weight", 0, 1000),
    ("quantisation_weight", 0, 1000),
    ("ema", 0, 0.99999),
    ("holdout", 0, 0.9),
    ("patience", 0, 100_000),
    ("seed", 0, 2**63 - 1),
    ("save_every_s", 0, 10**9),
    ("n_threads", 0, 4096),
    ("n_workers", 1, 256),
    ("max_cache_mib", 0, 10**9),
)
