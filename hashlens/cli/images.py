"""What the command itself does with pictures: thumbnails to show, and small ones enlarged.

Only this module of the command imports Pillow, which comes with the extra ``encoder``.
"""

from __future__ import annotations

import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_FILE_BYTES = 64 * 2**20
"""Files above this get no thumbnail."""


def thumbnail(data: bytes, side: int) -> bytes | None:
    """Return a picture as a small WebP of at most `side` x `side` pixels, None if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as image:
                image.draft("RGB", (side, side))
                image.thumbnail((2 * side, 2 * side))
                upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning):
        return None
    upright.thumbnail((side, side))
    ground = Image.new("RGBA", upright.size, "white")
    out = BytesIO()
    Image.alpha_composite(ground, upright).convert("RGB").save(out, "WEBP", quality=82)
    return out.getvalue()


def thumbnail_of_file(path: Path, side: int) -> bytes | None:
    """Return the thumbnail of a file, None if it cannot be read or is no picture."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            return None
        return thumbnail(path.read_bytes(), side)
    except (OSError, ValueError):
        return None


def enlarged(image: NDArray[np.uint8], factor: int, image_format: str) -> bytes:
    """Return a grey picture enlarged, bicubic, as a file's bytes.

    Parameters
    ----------
    image
        uint8, shape ``[h, w]``.
    factor
        How many times as wide and high.
    image_format
        ``PNG`` or ``JPEG``.
    """
    grey = Image.fromarray(image)
    size = (grey.width * factor, grey.height * factor)
    out = BytesIO()
    grey.resize(size, Image.Resampling.BICUBIC).convert("RGB").save(
        out, image_format, **({"quality": 95} if image_format == "JPEG" else {"compress_level": 1})
    )
    return out.getvalue()


def png(image: NDArray[np.uint8]) -> bytes:
    """Return a grey picture, uint8 of shape ``[h, w]``, as a PNG."""
    out = BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()
