"""How an image file is built, looked at before a parser is: some are made to be slow.

Pixels are bounded by the header's promise, bytes by the length. What else costs: pieces without
content, each a turn of a parser's loop; passes over all pixels that take no bytes; lists that are
longer than the image.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from typing import Any, NamedTuple

from hashlens.errors import InvalidInputError

_MAX_READS = 200_000
"""How often a parser may ask for bytes. Real files need some hundred; a PNG of 20 MiB in chunks of
8 KiB needs ten thousand."""

_MAX_SEGMENTS = 10_000
"""Segments of a JPEG. The largest colour profile takes 255."""

_MAX_STRIPS = 65_536
"""Strips or tiles of a TIFF: more than the rows of any real one of one row a strip."""

_MAX_SCANS = 100
_FREE_SCANS = 20
"""As many scans as any writer of progressive JPEGs makes, whatever the size."""
_MAX_SCANNED_PIXELS = 500_000_000
"""Scans times pixels, beyond that: about half a second."""

_MAX_RUN_PIXELS = 4_000_000
"""Pixels of a BMP with run lengths, which Pillow takes apart one by one in Python: a second."""

_BMP_RUNS = (b"\1\0\0\0", b"\2\0\0\0")

_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A marker that begins a segment or ends the image: not a stuffed 0xff, a restart or padding."""

_ARITHMETIC = frozenset((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
"""Frames in arithmetic coding, which decodes for ever from no bytes, and which no browser reads."""

_ODD_FRAME_IN_TIFF = re.compile(rb"\xff[\xc2\xc6\xc9-\xcb\xcd-\xcf]\0[\x0b\x0e\x11\x14]\x08")
_SCAN_IN_TIFF = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""Header of a frame and of a scan, exact enough not to be met by chance in other bytes."""

_STRIPS, _TILES, _COMPRESSION = 273, 324, 259
_JPEG_IN_TIFF = (6, 7)


class CountedFile(BytesIO):
    """Bytes as a file that can be read so often only.

    Raises
    ------
    InvalidInputError
        From `read`, when a parser has asked too often.
    """

    _left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        self._left -= 1
        if self._left < 0:
            raise InvalidInputError(
                "the image is made of too many small pieces. Save it again, as PNG or JPEG."
            )
        return super().read(size)


class PixelLimit(NamedTuple):
    """How large an image may be that is built in some way."""

    pixels: float
    """Width times height; infinite if how it is built costs nothing."""
    advice: str = ""
    """Why so few, and what to do."""


def pixel_limit(name: str, data: bytes) -> PixelLimit:
    """Look at how a file is built, and refuse what is built to harm.

    Parameters
    ----------
    name
        The format, as `encoder_service.decode` names it.
    data
        The file.

    Returns
    -------
    PixelLimit
        How many pixels can be decoded in reasonable time, for that.

    Raises
    ------
    InvalidInputError
        Too many segments, strips or scans, or a coding that is not accepted.
    """
    if name == "JPEG":
        return _limit_of_scans(_jpeg_scans(data))
    if name == "TIFF":
        return _limit_of_scans(_tiff_scans(data))
    if name == "BMP" and data[30:34] in _BMP_RUNS:
        return PixelLimit(_MAX_RUN_PIXELS, "for run lengths. Save it again without compression.")
    return PixelLimit(float("inf"))


def _limit_of_scans(scans: int) -> PixelLimit:
    if scans <= _FREE_SCANS:
        return PixelLimit(float("inf"))
    return PixelLimit(
        _MAX_SCANNED_PIXELS // scans, f"for {scans} scans. Save it again as a plain JPEG."
    )


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG, up to its end: phones append a film to it."""
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None or found.group()[1] == 0xD9:  # the end of the image
            return scans
        marker = found.group()[1]
        if marker in _ARITHMETIC:
            raise InvalidInputError(
                "the JPEG is in arithmetic coding. Save it again as a plain JPEG."
            )
        scans += marker == 0xDA
        if scans > _MAX_SCANS:
            raise InvalidInputError(
                f"the JPEG has more than {_MAX_SCANS} scans. Save it again as a plain JPEG."
            )
        # A segment says how long it is, and what looks like a marker in it is none. After the
        # header of a scan comes its data, in which a marker is one.
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        position = found.end() + max(length, 2)
    raise InvalidInputError(
        f"the JPEG has more than {_MAX_SEGMENTS:,} segments. Save it again as a plain JPEG."
    )


def _tiff_scans(data: bytes) -> int:
    """Count the scans of the JPEGs in a strip of a TIFF; 1 if there are none."""
    n_strips, is_jpeg = 1, False
    for tag, _, count, value in _tiff_entries(data):
        if tag in (_STRIPS, _TILES):
            n_strips = max(n_strips, count)
        elif tag == _COMPRESSION:
            # One short in the first half of four bytes, whichever half that is.
            is_jpeg |= value in _JPEG_IN_TIFF or value >> 16 in _JPEG_IN_TIFF
    if n_strips > _MAX_STRIPS:
        raise InvalidInputError(
            f"the TIFF has {n_strips:,} strips, the limit is {_MAX_STRIPS:,}. Save it again with "
            "more rows in each."
        )
    if not is_jpeg:
        return 1
    if _ODD_FRAME_IN_TIFF.search(data):
        raise InvalidInputError(
            "the TIFF holds a JPEG that is progressive or in arithmetic coding. Save it again with "
            "another compression."
        )
    n_scans = sum(1 for _ in _SCAN_IN_TIFF.finditer(data))
    return -(-n_scans // n_strips)


def _tiff_entries(data: bytes) -> list[Any]:
    """Return tag, type, count and value of each entry of the first directory."""
    order = "<" if data.startswith(b"II") else ">"
    at = int.from_bytes(data[4:8], "little" if order == "<" else "big")
    n = int.from_bytes(data[at : at + 2], "little" if order == "<" else "big")
    whole = data[at + 2 : at + 2 + 12 * n]
    return list(struct.iter_unpack(f"{order}HHII", whole[: len(whole) // 12 * 12]))
