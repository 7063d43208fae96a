"""JPEG files to encode: small ones as the bundled model knows them, and large ones like photos."""

from __future__ import annotations

from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

from hashlens.cli.demo_data import load_demo_images

Kind = Literal["garment", "photo"]
"""``garment``: 28 x 28, of the bundled test images. ``photo``: 640 x 480, made up."""

_QUALITY = 85
_WIDTH, _HEIGHT = 640, 480


def make_pictures(kind: Kind, n: int, seed: int) -> list[bytes]:
    """Return n JPEG files, all different."""
    rng = np.random.default_rng(seed)
    if kind == "garment":
        images, _, _ = load_demo_images()
        rows = rng.choice(len(images), n, replace=False)
        return [_jpeg(Image.fromarray(images[row])) for row in rows]
    return make_photos(n, rng, (_WIDTH, _HEIGHT))


def make_photos(n: int, rng: np.random.Generator, size: tuple[int, int]) -> list[bytes]:
    """Return n JPEG files that are made up, of a width and height in pixels."""
    return [_jpeg(_photo(rng, *size)) for _ in range(n)]


def _photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft colours, edges and grain: about as many bytes as a photo of that size has."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(soft).astype(np.int16)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        rows, columns = rng.integers(20, 200, 2)
        pixels[top : top + rows, left : left + columns] += rng.integers(-80, 80, 3, dtype=np.int16)
    pixels += rng.normal(0, 6, pixels.shape).astype(np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
