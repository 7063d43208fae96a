"""What `hashlens train` can be told. Free of torch, so that the command line reads it fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hashlens.config import setting
from hashlens.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights; stored in the checkpoint."""

    backbone: str = setting("mobilenet_v3_small", "Network up to F7: a name in the registry.")
    n_bits: int = setting(48, "Code length in bits, 1 to 512.")
    hash_norm: Literal["none", "batch"] = setting(
        "batch", "Before the sigmoid of H: nothing, as in the paper, or batch normalisation."
    )
    init: str = setting(
        "scratch", "First weights: scratch, imagenet (downloaded by torchvision), or a checkpoint."
    )
    resize: int = setting(48, "Shorter side of the resized image, in pixels.")
    crop: int = setting(48, "Side of the square that is cut from its centre, in pixels.")
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = setting(
        "bilinear", "How images are resized."
    )
    epochs: int = setting(12, "Passes over the training images.")
    batch_size: int = setting(256, "Images per step.")
    learning_rate: float = setting(4e-3, "Peak of AdamW's one-cycle schedule.")
    weight_decay: float = setting(0.05, "AdamW's, on matrices and kernels only.")
    label_smoothing: float = setting(0.1, "Share of the target spread over all classes.")
    flip: bool = setting(True, "Mirror half of the images.")
    shift: int = setting(3, "Shift images by up to this many pixels in both directions.")
    erase: float = setting(0.2, "Share of images of which a rectangle is blanked out.")
    holdout: int = setting(2500, "Training images kept out, to watch the accuracy by.")
    seed: int = setting(1, "Decides weights, order and augmentation.")

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise InvalidInputError(
                    f"{name} is {low} to {high}, not {getattr(self, name)}.", field=name
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """A recipe, and where things are."""

    data: Path | None = setting(
        None,
        "Folder of the Fashion-MNIST files, or of train/CLASS/* and test/CLASS/* images; without: "
        "where Debian's package dataset-fashion-mnist puts them.",
    )
    download: bool = setting(False, "Download Fashion-MNIST into --data first.")
    output: Path = setting(Path("model.safetensors"), "Checkpoint to write.")
    log: Path | None = setting(None, "CSV file to write, one line per epoch.")
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a device.")
    n_threads: int = setting(0, "CPU threads; 0: torch decides.")

    def recipe(self) -> dict[str, Any]:
        """Return the part that decides the weights, as it is stored."""
        return {name: getattr(self, name) for name in Recipe.__dataclass_fields__}


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs", 1, 100_000),
    ("batch_size", 2, 65_536),
    ("learning_rate", 0, 10),
    ("weight_decay", 0, 10),
    ("label_smoothing", 0, 1),
    ("shift", 0, 4096),
    ("erase", 0, 1),
    ("holdout", 0, 10**9),
)
