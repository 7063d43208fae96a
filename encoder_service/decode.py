"""Untrusted bytes -> an RGB image. The only place that opens images, for indexing and querying.

Order matters: length, then magic, then the header, and pixels only when the header's promise is
within the limits. Pillow's own opener for the sniffed format is called directly, so no other
parser ever sees the bytes.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, _imaging
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from encoder_service.structure import CountedFile, pixel_limit
from hashlens.errors import InvalidInputError, LimitError


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What an image may cost."""

    max_bytes: int = 20 * 1024 * 1024
    """Length of the encoded image."""
    max_pixels: int = 50_000_000
    """Width times height, from the header. Decoding takes 8 bytes of memory for each, of a WebP
    16, before anything else."""


FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF")
"""What is accepted; of an animation or a multi-page file, the first frame."""

_STRIP_PIXELS = 2**20

_ORIENTATION_TAG = 0x0112

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the image upright."""

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""The entry of `warnings.filters` that keeps Pillow silent."""


def decode(data: bytes, limits: DecodeLimits, least_px: int = 0) -> Image.Image:
    """Decode an image; safe to call from many threads.

    EXIF orientation is applied, transparency laid on white, 16-bit grey reduced to its upper byte
    (as Pillow does for 16-bit colour), CMYK and YCCK converted.

    Parameters
    ----------
    data
        The encoded image, in one of `FORMATS`.
    limits
        What it may cost.
    least_px
        Unless it is 0, a JPEG is reduced by 2, 4 or 8 as it is decoded, as far as no side gets
        shorter than this, in pixels. See `Preprocessing.jpeg_draft`.

    Returns
    -------
    Image
        Mode RGB, loaded.

    Raises
    ------
    InvalidInputError
        Not an image of an accepted format, damaged, truncated, or over a limit.
    """
    if not data:
        raise InvalidInputError("the image has zero bytes. Send the content of an image file.")
    if len(data) > limits.max_bytes:
        raise InvalidInputError(
            f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}. "
            "Send a smaller or more strongly compressed one."
        )
    name, opener = _sniff(data)
    structure = pixel_limit(name, data)
    _silence_parsers()
    # A filter that stays, because `warnings.catch_warnings` swaps state of the whole process and
    # is not safe in a pool of threads.
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = opener(CountedFile(data))
        width, height = image.size
        if width * height > limits.max_pixels:
            raise InvalidInputError(
                f"the image is {width} x {height} pixels, the limit is {limits.max_pixels:,} in "
                "all. Send a smaller one."
            )
        if width * height > structure.pixels:
            raise InvalidInputError(
                f"the {name} is {width} x {height} pixels, the limit is {structure.pixels:,} "
                f"{structure.advice}"
            )
        if least_px and isinstance(image, JpegImageFile):
            image.draft(None, (least_px, least_px))
        image.load()
        orientation = _orientation(image)
        upright = _to_rgb(image)
        del image  # Its pixels are not needed beside those of what comes.
    except InvalidInputError:
        raise
    except MemoryError:
        raise LimitError(
            "there is no memory left to decode this image. Send a smaller one, or give the encoder "
            "more."
        ) from None
    except Exception as error:  # Hostile bytes reach nearly any exception in the parsers.
        raise InvalidInputError(
            f"the {name} image is damaged or incomplete ({_first_line(error)}). "
            "Send the whole file, or save it again."
        ) from error
    if orientation in _TRANSPOSE:
        return upright.transpose(_TRANSPOSE[orientation])
    return upright


def _sniff(data: bytes) -> tuple[str, Callable[[IO[bytes]], ImageFile]]:
    """Tell the format by its first bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP", WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF", GifImageFile
    if data.startswith(b"BM"):
        return "BMP", BmpImageFile
    if data.startswith((b"II*\0", b"MM\0*")):
        return "TIFF", TiffImageFile
    raise InvalidInputError(
        f"these bytes are no image of a format that is accepted. Send {', '.join(FORMATS[:-1])} "
        f"or {FORMATS[-1]}."
    )


def _orientation(image: ImageFile) -> int:
    """Read the EXIF orientation of a loaded image; 1, upright, if there is none or it is damaged.

    Pillow has turned a TIFF upright already, and removed the tag.
    """
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # As above; a picture with bad EXIF is still a picture.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        transparent = image.info.get("transparency")
        grey = (samples >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[samples == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise InvalidInputError(
            "the image has 32-bit samples, for which black and white are not defined. "
            "Save it with 8 or 16 bits per sample."
        )
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Lay an image on white, a few rows at a time: whole layers would take thrice the memory."""
    width, height = image.size
    whole = Image.new("RGB", image.size)
    n_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, n_rows):
        layer = image.crop((0, top, width, min(top + n_rows, height))).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        whole.paste(Image.alpha_composite(white, layer).convert("RGB"), (0, top))
    return whole


@functools.cache
def _silence_parsers() -> None:
    """Have Pillow and libtiff write no logs of their own: a stranger would fill ours with them."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    library = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        handler = getattr(library, name, None)  # Missing where Pillow was built to hide it.
        if handler is not None:
            handler.argtypes, handler.restype = (ctypes.c_void_p,), ctypes.c_void_p
            handler(None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
