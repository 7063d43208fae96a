"""Random changes of training images that leave their class as it is. NumPy and Pillow only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashlens.errors import InvalidInputError

_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green, blue in brightness: ITU-R BT.601, as Pillow's conversion to grey."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How much images are changed. Lengths are shares of the crop's side.

    So a preset means the same at 28 and at 224 pixels.

    Raises
    ------
    InvalidInputError
        A value is out of its range.
    """

    mirror: float = 0.0
    """Probability of a left-right mirror image."""
    crop: Literal["centre", "random"] = "centre"
    """Where the crop is cut from a larger square."""
    shift: float = 0.0
    """Reach of a shift in both directions, beyond the square too: what comes in from outside
    repeats its border."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the side of what is cut, as a share of the crop: below 1 enlarges."""
    rotate_deg: float = 0.0
    """Reach of a rotation to either side, in degrees."""
    erase: float = 0.0
    """Probability that a rectangle is filled with one shade of grey (random erasing: Zhong et al.,
    AAAI 2020)."""
    erase_side: tuple[float, float] = (1 / 7, 3 / 7)
    """Range of the rectangle's width, and of its height."""
    brightness: float = 0.0
    """Reach of a factor around 1 on all samples."""
    contrast: float = 0.0
    """Reach of a factor around 1 on the distance to the image's mean brightness."""
    saturation: float = 0.0
    """Reach of a factor around 1 on the distance to the pixel's own grey."""

    def __post_init__(self) -> None:
        for name, high in _REACHES:
            if not 0 <= getattr(self, name) <= high:
                raise InvalidInputError(
                    f"{name} is 0 to {high}, not {getattr(self, name)}.", field=f"augment.{name}"
                )
        for name, limit in (("scale", 4.0), ("erase_side", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit:
                raise InvalidInputError(
                    f"{name} is a range within 0 to {limit}, not {low} to {high}.",
                    field=f"augment.{name}",
                )


_REACHES = (
    ("mirror", 1),
    ("shift", 1),
    ("rotate_deg", 180),
    ("erase", 1),
    ("brightness", 1),
    ("contrast", 1),
    ("saturation", 1),
)

PRESETS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "none": Augmentation(),
        "mirror": Augmentation(mirror=0.5, crop="random"),
        "light": Augmentation(mirror=0.5, crop="random", shift=1 / 28),
        "standard": Augmentation(mirror=0.5, crop="random", shift=1 / 14, erase=0.3),
        "strong": Augmentation(
            mirror=0.5,
            crop="random",
            shift=1 / 14,
            scale=(0.7, 1.1),
            rotate_deg=10,
            erase=0.5,
            brightness=0.3,
            contrast=0.3,
            saturation=0.3,
        ),
    }
)
"""By name, from nothing to much. ``mirror`` is what the 2015 training files do."""


def augment(
    pixels: NDArray[np.uint8], augmentation: Augmentation, crop: int, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Cut a crop from each image of a batch, changed at random.

    Parameters
    ----------
    pixels
        uint8, shape ``[n, s, s, 3]``; not changed.
    augmentation
        How much.
    crop
        Side of the result, at most ``s``.
    random
        Source of chance: the same state gives the same result.

    Returns
    -------
    ndarray
        uint8, shape ``[n, crop, crop, 3]``, a new array.

    Raises
    ------
    InvalidInputError
        The images are smaller than the crop.
    """
    _check_crop(pixels, crop)
    cut = _cut(pixels, augmentation, crop, random)
    if augmentation.brightness or augmentation.contrast or augmentation.saturation:
        cut = _jitter(cut, augmentation, random)
    if augmentation.erase:
        _erase(cut, augmentation, random)
    return cut


def centre_crop(pixels: NDArray[np.uint8], crop: int) -> NDArray[np.uint8]:
    """Return the centre of each image, uint8 ``[n, crop, crop, 3]``, as a view.

    Where what is cut off is odd, the upper left gets the smaller part.
    """
    _check_crop(pixels, crop)
    start = (pixels.shape[1] - crop) // 2
    return pixels[:, start : start + crop, start : start + crop]


def _check_crop(pixels: NDArray[np.uint8], crop: int) -> None:
    if not 1 <= crop <= pixels.shape[1]:
        raise InvalidInputError(
            f"a crop of {crop} px cannot be cut from images of {pixels.shape[1]} px.", field="crop"
        )


def _cut(
    pixels: NDArray[np.uint8], augmentation: Augmentation, crop: int, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Crop, shift, mirror, zoom and rotate."""
    n, side = len(pixels), int(pixels.shape[1])
    if augmentation.crop == "random":
        corners = random.integers(0, side - crop + 1, (n, 2))
    else:
        corners = np.full((n, 2), (side - crop) // 2)
    reach = round(augmentation.shift * crop)
    corners = corners + random.integers(-reach, reach + 1, (n, 2))
    mirrored = random.random(n) < augmentation.mirror
    turns = augmentation.rotate_deg > 0 or augmentation.scale != (1.0, 1.0)
    # A turned window is wider than the crop, by its diagonal at most.
    widest = augmentation.scale[1] * _width_when_turned(augmentation.rotate_deg) if turns else 1.0
    margin = reach + (math.ceil(crop * max(0.0, widest - 1) / 2) + 1 if turns else 0)
    padding = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(pixels, padding, mode="edge") if margin else pixels
    corners = corners + margin
    result = np.empty((n, crop, crop, 3), np.uint8)
    # Image by image: rows of pixels are copied whole, which no indexing of the batch does as fast.
    if not turns:
        for image, source, (top, left), flip in zip(
            result, padded, corners.tolist(), mirrored.tolist(), strict=True
        ):
            window = source[top : top + crop, left : left + crop]
            image[:] = window[:, ::-1] if flip else window
        return result
    low, high = augmentation.scale
    scales = random.uniform(low, high, n)
    angles = np.radians(random.uniform(-augmentation.rotate_deg, augmentation.rotate_deg, n))
    for row in range(n):
        matrix = _matrix(corners[row], crop, scales[row], angles[row], bool(mirrored[row]))
        turned = Image.fromarray(padded[row]).transform(
            (crop, crop), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        result[row] = np.asarray(turned)
    return result


def _width_when_turned(reach_deg: float) -> float:
    """Return the width of a unit square's bounding box, at most, turned by up to `reach_deg`."""
    angle = math.radians(min(reach_deg, 45.0))
    return math.cos(angle) + math.sin(angle)


def _matrix(
    corner: NDArray[np.int64], crop: int, scale: float, angle: float, mirrored: bool
) -> tuple[float, ...]:
    """Return Pillow's six numbers, which take a point of the result to one of the source."""
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    a, b, d, e = cosine, -sine, sine, cosine
    if mirrored:
        a, d = -a, -d
    half = crop / 2
    top, left = corner
    return (a, b, left + half - (a + b) * half, d, e, top + half - (d + e) * half)


def _jitter(
    pixels: NDArray[np.uint8], augmentation: Augmentation, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Change brightness, contrast and saturation, each by a factor of the image's own.

    All three are linear, so one matrix for each image does them.
    """
    n = len(pixels)
    reaches = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    brightness, contrast, saturation = (1 + r * random.uniform(-1, 1, n) for r in reaches)
    means = np.stack([pixels[..., channel].mean(axis=(1, 2)) for channel in range(3)], axis=1)
    gain = (brightness * contrast)[:, None, None]
    share = saturation[:, None, None]
    mixes = gain * (share * np.eye(3) + (1 - share) * _LUMA)
    offsets = brightness * (1 - contrast) * (means @ _LUMA)
    rows = np.concatenate([mixes, np.broadcast_to(offsets[:, None, None], (n, 3, 1))], axis=2)
    result = np.empty_like(pixels)
    for row in range(n):
        matrix = tuple(rows[row].ravel().tolist())
        result[row] = np.asarray(Image.fromarray(pixels[row]).convert("RGB", matrix))
    return result


def _erase(
    pixels: NDArray[np.uint8], augmentation: Augmentation, random: np.random.Generator
) -> None:
    """Fill a rectangle of some images, in place."""
    chosen = np.flatnonzero(random.random(len(pixels)) < augmentation.erase)
    side = pixels.shape[1]
    low, high = (max(1, round(share * side)) for share in augmentation.erase_side)
    lengths = random.integers(low, high + 1, (len(chosen), 2))
    corners = random.integers(0, side - lengths + 1)
    shades = random.integers(0, 256, len(chosen))
    for row, (top, left), (height, width), shade in zip(
        chosen.tolist(), corners.tolist(), lengths.tolist(), shades.tolist(), strict=True
    ):
        pixels[row, top : top + height, left : left + width] = shade
