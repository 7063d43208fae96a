"""Pictures of every kind that is accepted, small, to be spoiled; and files that are two things."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageCms

from tests.fuzz.bombs import encoded, ifd, jpeg_segment, png, png_chunk, tiff_frame

UPRIGHT_TURN = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright scene is stored under each EXIF orientation, from the standard."""


def scene(width: int = 48, height: int = 36) -> Image.Image:
    """Return a picture without any symmetry."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = (x * 255 // width, y * 255 // height, (x * 7 + y * 3) % 256)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def with_orientation(picture: Image.Image, orientation: int, kind: str) -> bytes:
    """Store a picture as a camera held that way does."""
    turn = UPRIGHT_TURN[orientation]
    stored = picture if turn is None else picture.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    return encoded(stored, kind, exif=exif, **settings)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("index.html", "<script>alert(1)</script>" * 20)
    return buffer.getvalue()


def _exifs() -> dict[str, bytes]:
    """EXIF blocks that are damaged, each in its own way."""
    whole = Image.Exif()
    whole[0x0112] = 6
    whole[0x010F] = "camera"
    plain = whole.tobytes()
    return {
        "cut": plain[: len(plain) // 2],
        "only a name": b"Exif\0\0",
        "twice": b"Exif\0\0" + plain,
        "no end": b"Exif\0\0" + ifd([(0x0112, 3, 1, 6)], 0, "<", next_ifd=8),
        "to itself": b"Exif\0\0" + ifd([(0x8769, 4, 1, 8), (0x0112, 3, 1, 6)], 0, ">"),
        "of another type": b"Exif\0\0" + ifd([(0x0112, 2, 4, 0x36363636)], 0, "<"),
        "far away": b"Exif\0\0" + ifd([(0x0112, 3, 2**31, 2**32 - 1)], 0, "<"),
        "denominator 0": b"Exif\0\0" + ifd([(0x011A, 5, 1, 8), (0x0112, 3, 1, 6)], 64, "<"),
    }


def _profiles() -> dict[str, bytes]:
    """Colour profiles, damaged."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "whole": plain,
        "cut": plain[: len(plain) // 3],
        "noise": bytes(range(256)) * 8,
        "huge length": struct.pack(">I", 2**32 - 1) + plain[4:],
    }


def _jpegs(picture: Image.Image) -> dict[str, bytes]:
    plain = encoded(picture, "JPEG", quality=90)
    cmyk = picture.convert("CMYK")
    files = {
        "jpeg": plain,
        "jpeg grey": encoded(picture.convert("L"), "JPEG"),
        "jpeg progressive": encoded(picture, "JPEG", progressive=True),
        "jpeg restarts": encoded(picture, "JPEG", restart_marker_rows=1),
        "jpeg optimised 444": encoded(picture, "JPEG", optimize=True, subsampling=0),
        "jpeg cmyk": encoded(cmyk, "JPEG"),
        # Pillow writes CMYK; the transform byte of the Adobe segment makes a reader see YCCK.
        "jpeg ycck": encoded(cmyk, "JPEG").replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"),
        "jpeg no adobe": encoded(cmyk, "JPEG").replace(b"Adobe", b"adobe"),
        "jpeg and zip": plain + _zip(),
        "jpeg around zip": plain[:2] + jpeg_segment(0xFE, _zip()) + plain[2:],
        "jpeg twice": plain + plain,
        "jpeg comment html": encoded(picture, "JPEG", comment=b"<script>alert(1)</script>"),
    }
    for name, exif in _exifs().items():
        files[f"jpeg exif {name}"] = encoded(picture, "JPEG", exif=exif)
    for name, profile in _profiles().items():
        files[f"jpeg profile {name}"] = encoded(picture, "JPEG", icc_profile=profile)
    for orientation in UPRIGHT_TURN:
        files[f"jpeg orientation {orientation}"] = with_orientation(picture, orientation, "JPEG")
    return files


def _pngs(picture: Image.Image) -> dict[str, bytes]:
    rgba = picture.copy()
    rgba.putalpha(picture.convert("L"))
    palette = picture.quantize(16)
    grey16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    rows = b"".join(b"\0" + bytes(range(48)) * 8 for _ in range(36))
    frames = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    plain = encoded(picture, "PNG")
    files = {
        "png": plain,
        "png rgba": encoded(rgba, "PNG"),
        "png grey": encoded(picture.convert("L"), "PNG"),
        "png grey alpha": encoded(picture.convert("LA"), "PNG"),
        "png 1-bit": encoded(picture.convert("1"), "PNG"),
        "png palette": encoded(palette, "PNG"),
        "png palette transparent": encoded(palette, "PNG", transparency=3),
        "png palette alphas": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png 4-bit": encoded(palette, "PNG", bits=4),
        "png 16-bit grey": encoded(grey16, "PNG"),
        "png 16-bit rgba": png(
            48, 36, depth=16, colour=6, body=png_chunk(b"IDAT", zlib.compress(rows))
        ),
        "png interlaced header": png(
            48, 36, depth=16, colour=6, body=png_chunk(b"IDAT", zlib.compress(rows))
        ).replace(b"\x10\x06\0\0\0", b"\x10\x06\0\0\1"),
        "png one colour transparent": encoded(picture, "PNG", transparency=(1, 2, 3)),
        "png animated": encoded(picture, "PNG", save_all=True, append_images=frames[1:]),
        "png and zip": plain + _zip(),
        "png and html": plain + b"<html><script>alert(1)</script>",
        "png raw exif": encoded(picture, "PNG", exif=_exifs()["to itself"]),
    }
    for name, profile in _profiles().items():
        files[f"png profile {name}"] = encoded(picture, "PNG", icc_profile=profile)
    for orientation in (3, 6):
        files[f"png orientation {orientation}"] = with_orientation(picture, orientation, "PNG")
    return files


def _others(picture: Image.Image) -> dict[str, bytes]:
    rgba = picture.copy()
    rgba.putalpha(picture.convert("L"))
    palette = picture.quantize(16)
    frames = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * 2
    gif = encoded(palette, "GIF")
    files = {
        "webp": encoded(picture, "WEBP", quality=80),
        "webp lossless": encoded(picture, "WEBP", lossless=True),
        "webp alpha": encoded(rgba, "WEBP", quality=80),
        "webp animated": encoded(picture, "WEBP", save_all=True, append_images=frames),
        "webp orientation 5": with_orientation(picture, 5, "WEBP"),
        "webp profile noise": encoded(picture, "WEBP", icc_profile=_profiles()["noise"]),
        "gif": gif,
        "gif transparent": encoded(palette, "GIF", transparency=0),
        "gif animated": encoded(picture, "GIF", save_all=True, append_images=frames),
        "gif interlaced": encoded(palette, "GIF", interlace=True),
        # A comment opens before the header is over: browsers that sniff would run it.
        "gif and html": encoded(palette, "GIF", comment=b"<script>alert(1)</script>")
        + b"*/=1;alert(1)//",
        "gif and zip": gif + _zip(),
        "bmp": encoded(picture, "BMP"),
        "bmp grey": encoded(picture.convert("L"), "BMP"),
        "bmp palette": encoded(palette, "BMP"),
        "bmp 1-bit": encoded(picture.convert("1"), "BMP"),
        "tiff": encoded(picture, "TIFF"),
        "tiff rgba": encoded(rgba, "TIFF"),
        "tiff cmyk": encoded(picture.convert("CMYK"), "TIFF"),
        "tiff 1-bit group 4": encoded(picture.convert("1"), "TIFF", compression="group4"),
        "tiff pages": encoded(picture, "TIFF", save_all=True, append_images=frames),
        "tiff big-endian": ifd(tiff_frame(8, 8), 1_000, ">"),
        "tiff cycle": ifd(tiff_frame(8, 8), 1_000, "<", next_ifd=8),
        "tiff cyclic exif": ifd([*tiff_frame(8, 8), (34_665, 4, 1, 8)], 1_000, "<"),
        "tiff float": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "tiff orientation 7": with_orientation(picture, 7, "TIFF"),
    }
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        files[f"tiff {compression}"] = encoded(picture, "TIFF", compression=compression)
    return files


def corpus() -> dict[str, bytes]:
    """Return the files by name; each is read, or refused, as it is."""
    picture = scene()
    files = _jpegs(picture) | _pngs(picture) | _others(picture)
    files["nothing"] = b""
    files["zeros"] = bytes(400)
    files["zip"] = _zip()
    files["html"] = b"<html><script>alert(1)</script></html>"
    files["svg"] = (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    )
    return files
