"""Pixels -> the numbers the network sees. Training and serving both go through here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashlens.errors import InvalidInputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


Fit = Literal["short", "warp"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, crop the centre, normalise: a fixed function, kept with the weights.

    Resize and crop are one step: what survives the crop is found in the source and only that is
    resampled. So a 1 x 100 000 image costs no more than any other.

    Raises
    ------
    InvalidInputError
        A value is out of its range.
    """

    resize: int = 256
    """Length the shorter side is brought to, or both if `fit` is ``warp``, in pixels."""
    crop: int = 224
    """Side of the centre square that is kept, in pixels; at most `resize`."""
    interpolation: str = "bilinear"
    """``bilinear``, ``bicubic`` or ``lanczos``; antialiased when it shrinks, as Pillow does."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from red, green, blue in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides them after that."""
    fit: Fit = "short"
    """What becomes a square of side `resize`, of which the crop is cut: ``short``, the largest
    centred square; ``warp``, the whole image with its sides made equal, as the 2015 training files
    have it."""
    jpeg_draft: bool = False
    """Whether a JPEG file is decoded at a half, a quarter or an eighth of its size where no side
    gets shorter than `least_px`: large photographs cost a fraction, and other bits."""

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize <= 4096:
            raise InvalidInputError(
                f"1 <= crop <= resize <= 4096 must hold; got crop {self.crop}, "
                f"resize {self.resize}.",
                field="preprocessing.crop",
            )
        if self.interpolation not in _FILTERS:
            raise InvalidInputError(
                f"interpolation is one of {', '.join(_FILTERS)}; not {self.interpolation!r}.",
                field="preprocessing.interpolation",
            )
        numbers = (*self.mean, *self.std)
        lengths = (len(self.mean), len(self.std))
        if lengths != (3, 3) or not (all(map(math.isfinite, numbers)) and min(self.std) > 0):
            raise InvalidInputError(
                "mean and std are three finite numbers each, and std is positive.",
                field="preprocessing.std",
            )
        if self.fit not in get_args(Fit):
            raise InvalidInputError(
                f"fit is {' or '.join(get_args(Fit))}; not {self.fit!r}.", field="preprocessing.fit"
            )
        if not isinstance(self.jpeg_draft, bool):
            raise InvalidInputError(
                f"jpeg_draft is true or false; not {self.jpeg_draft!r}.",
                field="preprocessing.jpeg_draft",
            )

    @property
    def least_px(self) -> int:
        """To what the sides of an image may be reduced before it is resized, in pixels; 0: not.

        Twice `resize`: the resampling, which averages better than a JPEG decoder, does the rest.
        """
        return 2 * self.resize if self.jpeg_draft else 0

    def resize_crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop.

        Parameters
        ----------
        image
            Mode RGB, any size.

        Returns
        -------
        ndarray
            uint8, shape ``[crop, crop, 3]``, a new array.
        """
        width, height = image.size
        whole = (width, height) if self.fit == "warp" else (min(width, height),) * 2
        kept_width, kept_height = (length * self.crop / self.resize for length in whole)
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        square = image.resize(
            (self.crop, self.crop),
            _FILTERS[self.interpolation],
            box=(left, top, left + kept_width, top + kept_height),
        )
        return np.asarray(square, dtype=np.uint8)

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale to 0..1, subtract the mean, divide by the standard deviation.

        Parameters
        ----------
        pixels
            uint8, shape ``[..., 3]``, channels last.

        Returns
        -------
        ndarray
            float32, the same shape, a new array.
        """
        std = np.asarray(self.std, dtype=np.float64)
        scale = (1 / (255 * std)).astype(np.float32)
        offset = (-np.asarray(self.mean, dtype=np.float64) / std).astype(np.float32)
        # By whole lines of pixels: NumPy is slow along an axis of three.
        width = pixels.shape[-2]
        lines: NDArray[np.float32] = pixels.reshape(-1, width * 3).astype(np.float32)
        lines *= np.tile(scale, width)
        lines += np.tile(offset, width)
        return lines.reshape(pixels.shape)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Turn a decoded image into the network's input; safe to call from many threads.

        Parameters
        ----------
        image
            Mode RGB, any size.

        Returns
        -------
        ndarray
            float32, shape ``[3, crop, crop]``, C-contiguous, a new array.
        """
        return np.ascontiguousarray(self.normalise(self.resize_crop(image)).transpose(2, 0, 1))

    def to_json(self) -> dict[str, Any]:
        """Return the plain form that is stored with the weights and hashed into `model_id`.

        What models from before there was a choice have, is left out: they keep their id.
        """
        return {
            name: [float(number) for number in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if (name, value) not in (("fit", "short"), ("jpeg_draft", False))
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """Build from the plain form; InvalidInputError if it is not one."""
        try:
            return cls(
                resize=int(plain["resize"]),
                crop=int(plain["crop"]),
                interpolation=str(plain["interpolation"]),
                mean=_three(plain["mean"]),
                std=_three(plain["std"]),
                fit=plain.get("fit", "short"),
                jpeg_draft=plain.get("jpeg_draft", False),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(
                f"this is no description of a preprocessing: {error!r}.", field="preprocessing"
            ) from error


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = values
    return float(first), float(second), float(third)
