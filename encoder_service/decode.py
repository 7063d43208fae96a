"""Untrusted bytes -> an RGB image. The only place that opens images, for indexing and querying.

Order matters: length, then magic, then the header, and pixels only when the header's promise is
within the limits. Pillow's own opener for the sniffed format is called directly, so no other
parser ever sees the bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import IO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hashlens.errors import InvalidInputError, LimitError


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What an image may cost."""

    max_bytes: int = 20 * 1024 * 1024
    """Length of the encoded image."""
    max_pixels: int = 50_000_000
    """Width times height, from the header. Decoding takes about 8 bytes of memory for each."""


FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF")
"""What is accepted; of an animation or a multi-page file, the first frame."""

_MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten; each further one costs a pass over all pixels, for no bytes."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A marker that begins a segment or ends the image: not a stuffed 0xff, a restart or padding."""

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


def decode(data: bytes, limits: DecodeLimits) -> Image.Image:
    """Decode an image; safe to call from many threads.

    EXIF orientation is applied, transparency laid on white, 16-bit grey reduced to its upper byte
    (as Pillow does for 16-bit colour), CMYK and YCCK converted.

    Parameters
    ----------
    data
        The encoded image, in one of `FORMATS`.
    limits
        What it may cost.

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
    if name == "JPEG" and _jpeg_scans(data) > _MAX_JPEG_SCANS:
        raise InvalidInputError(
            f"the JPEG has more than {_MAX_JPEG_SCANS} scans. Save it again as a plain JPEG."
        )
    # A filter that stays, because `warnings.catch_warnings` swaps state of the whole process and
    # is not safe in a pool of threads.
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = opener(BytesIO(data))
        width, height = image.size
        if width * height > limits.max_pixels:
            raise InvalidInputError(
                f"the image is {width} x {height} pixels, the limit is {limits.max_pixels:,} in "
                "all. Send a smaller one."
            )
        image.load()
        orientation = _orientation(image)
        upright = _to_rgb(image)
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


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG, up to its end: phones append a film to it."""
    scans, position = 0, 2
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        marker = found.group()[1]
        if marker == 0xD9:  # the end of the image
            break
        scans += marker == 0xDA
        # A segment says how long it is, and what looks like a marker in it is none. After the
        # header of a scan comes its data, in which a marker is one.
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        position = found.end() + max(length, 2)
    return scans


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
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
