"""Small files that ask for much: memory by their header, time by their structure."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image

FULL_BYTES = 20 * 2**20 - 4096
"""About as long as the encoder takes a file."""

SIDE = 7_000
"""A square of this side is just within the limit of pixels."""


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


# --- PNG ---


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, depth: int, colour: int, body: bytes) -> bytes:
    """Return a PNG whose chunks between the header and the end are given."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


def _png_zeros(width: int, height: int, *, depth: int, colour: int, filter_type: int) -> bytes:
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes([filter_type]) + bytes((width * samples * depth + 7) // 8)
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, depth=depth, colour=colour, body=png_chunk(b"IDAT", packed))


def _png_many_chunks(size_bytes: int) -> bytes:
    ihdr_and_pixels = png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    empty = png_chunk(b"prVt", b"")
    return png(1, 1, depth=8, colour=0, body=empty * (size_bytes // len(empty)) + ihdr_and_pixels)


def _png_many_data_chunks(size_bytes: int) -> bytes:
    empty = png_chunk(b"IDAT", b"")
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    return png(1, 1, depth=8, colour=0, body=empty * (size_bytes // len(empty)) + pixels)


def _png_chunks_behind(size_bytes: int) -> bytes:
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    empty = png_chunk(b"prVt", b"")
    return png(1, 1, depth=8, colour=0, body=pixels + empty * (size_bytes // len(empty)))


def _png_texts(size_bytes: int) -> bytes:
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    return png(1, 1, depth=8, colour=0, body=text * (size_bytes // len(text)) + pixels)


# --- JPEG ---


def _jpeg(width: int, height: int, **settings: object) -> bytes:
    return encoded(Image.new("RGB", (width, height), (90, 120, 30)), "JPEG", **settings)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    """Return one segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _jpeg_scans(side: int, n_scans: int) -> bytes:
    """Repeat the last scan of a progressive JPEG, which refines a few coefficients everywhere."""
    data = _jpeg(side, side, progressive=True)
    scan = data.rindex(b"\xff\xda")
    n = data.count(b"\xff\xda")
    return data[:scan] + data[scan:-2] * (n_scans - n + 1) + data[-2:]


def _jpeg_arithmetic(side: int, n_scans: int) -> bytes:
    """A progressive JPEG in arithmetic coding, whose scans decode zeros without end."""
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    scans = [b"\1\1\0" + bytes([0, 0, 0])]
    scans += [b"\1\1\0" + bytes([1, 63, 0])] * (n_scans - 1)
    body = b"".join(jpeg_segment(0xDA, scan) + bytes(64) for scan in scans)
    tables = jpeg_segment(0xDB, b"\0" + bytes([1] * 64))
    return b"\xff\xd8" + tables + jpeg_segment(0xCA, frame) + body + b"\xff\xd9"


def _jpeg_segments(size_bytes: int, segment: bytes) -> bytes:
    data = _jpeg(8, 8)
    return data[:2] + segment * (size_bytes // len(segment)) + data[2:]


def _jpeg_padding(size_bytes: int) -> bytes:
    data = _jpeg(8, 8)
    return data[:2] + b"\xff" * size_bytes + data[2:]


def _jpeg_noise_between(size_bytes: int) -> bytes:
    """Bytes that are no marker, between two segments."""
    data = _jpeg(8, 8)
    at = data.index(b"\xff\xdb")
    return data[:at] + b"\x01" * size_bytes + data[at:]


def _jpeg_exif(n_tags: int, size_bytes: int) -> bytes:
    """Many tags that all name the same long piece; the EXIF comes in many segments."""
    exif = ifd(
        [(0x8000 + i, 7, size_bytes - 70_000, 60_000) for i in range(n_tags)], size_bytes, "<"
    )
    parts = [exif[i : i + 65_000] for i in range(0, len(exif), 65_000)]
    segments = b"".join(jpeg_segment(0xE1, b"Exif\0\0" + part) for part in parts)
    data = _jpeg(8, 8)
    return data[:2] + segments + data[2:]


# --- GIF ---


def _gif(width: int, height: int) -> bytes:
    return encoded(Image.new("P", (width, height)), "GIF")


def _gif_blocks(size_bytes: int, label: int) -> bytes:
    """An extension of blocks of one byte each."""
    data = _gif(4, 4)
    at = data.index(b"\x2c", 13)
    return data[:at] + bytes([0x21, label]) + b"\1x" * (size_bytes // 2) + b"\0" + data[at:]


def _gif_extensions(size_bytes: int) -> bytes:
    data = _gif(4, 4)
    at = data.index(b"\x2c", 13)
    return data[:at] + b"\x21\x01\0" * (size_bytes // 3) + data[at:]


def _gif_resized(width: int, height: int) -> bytes:
    data = bytearray(_gif(4, 4))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def _gif_frame_beyond_screen(width: int, height: int) -> bytes:
    data = bytearray(_gif(4, 4))
    at = data.index(b"\x2c", 13)
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data)


# --- BMP ---


def _bmp_rle(width: int, height: int, body: bytes, *, bits: int) -> bytes:
    palette = bytes(4 * 2**bits)
    offset = 54 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", offset + len(body), 0, 0, offset)
    info = struct.pack(
        *("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2),
        *(len(body), 0, 0, 2**bits, 0),
    )
    return header + info + palette + body


# --- TIFF ---


def ifd(
    entries: list[tuple[int, int, int, int]], total_bytes: int, order: str, next_ifd: int = 0
) -> bytes:
    """Return a TIFF of one directory, entries (tag, type, count, value or offset), and zeros."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}IH", 8, len(entries))
    body = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return (head + body + struct.pack(f"{order}I", next_ifd)).ljust(total_bytes, b"\0")


def tiff_frame(
    width: int, height: int, *, compression: int = 1, bits: int = 8, rows_per_strip: int = 0
) -> list[tuple[int, int, int, int]]:
    """Return the entries of a grey image of one strip, whose bytes begin at 512."""
    return [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 512),
        (277, 3, 1, 1),
        (278, 4, 1, rows_per_strip or height),
        (279, 4, 1, width * height * bits // 8),
    ]


def _tiff_many_strips(n_strips: int) -> bytes:
    """A strip for each row, all of them at the same place."""
    entries = tiff_frame(1, n_strips, rows_per_strip=1)
    entries[5] = (273, 4, n_strips, 512)
    entries[8] = (279, 3, n_strips, 512)
    return ifd(entries, 512 + 4 * n_strips, "<")


def _tiff_tags(n_tags: int, size_bytes: int) -> bytes:
    """Tags that all name the same long piece."""
    extra = [(40_000 + i, 7, size_bytes - 10_000, 8_000) for i in range(n_tags)]
    return ifd(tiff_frame(8, 8) + extra, size_bytes, "<")


def _tiff_long_tag(size_bytes: int, kind: int, unit_bytes: int) -> bytes:
    extra = [(305, kind, (size_bytes - 1_000) // unit_bytes, 600)]
    return ifd(tiff_frame(8, 8) + extra, size_bytes, "<")


def _tiff_cycle() -> bytes:
    return ifd(tiff_frame(8, 8), 1_000, "<", next_ifd=8)


def _tiff_cyclic_exif() -> bytes:
    return ifd([*tiff_frame(8, 8), (34_665, 4, 1, 8), (34_853, 4, 1, 8)], 1_000, "<")


def _tiff_jpeg(jpeg: bytes, side: int) -> bytes:
    entries = tiff_frame(side, side, compression=7)
    entries[8] = (279, 4, 1, len(jpeg))
    return ifd(entries, 512, "<") + jpeg


def _grey_jpeg_scans(side: int, n_scans: int) -> bytes:
    data = encoded(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    n = data.count(b"\xff\xda")
    return data[:scan] + data[scan:-2] * (n_scans - n + 1) + data[-2:]


# --- WebP ---


def webp_chunk(name: bytes, body: bytes) -> bytes:
    """Return one chunk of a WebP."""
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def _webp_canvas(width: int, height: int) -> bytes:
    """An animation of one tiny frame on a large canvas."""
    still = encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    canvas = (
        struct.pack("<I", 2) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    )
    frame = bytes(6) + b"\3\0\0\3\0\0" + bytes(4)
    body = (
        webp_chunk(b"VP8X", canvas)
        + webp_chunk(b"ANIM", bytes(6))
        + webp_chunk(b"ANMF", frame + still) * 2
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp_chunks(size_bytes: int) -> bytes:
    data = encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True)
    extra = webp_chunk(b"prVt", b"") * (size_bytes // 8)
    body = webp_chunk(b"VP8X", bytes(4) + b"\3\0\0\3\0\0") + data[12:] + extra
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def bombs(*, size_bytes: int = FULL_BYTES, side: int = SIDE) -> Iterator[tuple[str, bytes]]:
    """Make the files, one after another: each is large.

    Parameters
    ----------
    size_bytes
        About how long those are whose length is what costs.
    side
        Width and height of those whose pixels are what costs.
    """
    makers: dict[str, Callable[[], bytes]] = {
        "png 16-bit rgba": lambda: _png_zeros(side, side, depth=16, colour=6, filter_type=4),
        "png rgba": lambda: _png_zeros(side, side, depth=8, colour=6, filter_type=4),
        "png grey alpha": lambda: _png_zeros(side, side, depth=16, colour=4, filter_type=4),
        "png 16-bit grey": lambda: _png_zeros(side, side, depth=16, colour=0, filter_type=4),
        "png 1-bit": lambda: _png_zeros(side, side, depth=1, colour=0, filter_type=0),
        "png 2e9 square": lambda: png(2**31 - 1, 2**31 - 1, depth=8, colour=2, body=b""),
        "png empty chunks": lambda: _png_many_chunks(size_bytes),
        "png empty data": lambda: _png_many_data_chunks(size_bytes),
        "png chunks behind": lambda: _png_chunks_behind(size_bytes),
        "png texts": lambda: _png_texts(size_bytes),
        "jpeg plain": lambda: _jpeg(side, side),
        "jpeg 444": lambda: _jpeg(side, side, subsampling=0),
        "jpeg progressive": lambda: _jpeg(side, side, progressive=True, subsampling=0),
        "jpeg 100 scans": lambda: _jpeg_scans(side, 100),
        "jpeg cmyk progressive": lambda: encoded(
            Image.new("CMYK", (side, side), (9, 80, 7, 3)), "JPEG", progressive=True
        ),
        "jpeg arithmetic": lambda: _jpeg_arithmetic(side, 100),
        "jpeg comments": lambda: _jpeg_segments(size_bytes, jpeg_segment(0xFE, b"")),
        "jpeg apps": lambda: _jpeg_segments(size_bytes, jpeg_segment(0xE7, b"")),
        "jpeg tables": lambda: _jpeg_segments(size_bytes, jpeg_segment(0xDB, b"\0" + b"\1" * 64)),
        "jpeg exifs": lambda: _jpeg_segments(size_bytes, jpeg_segment(0xE1, b"Exif\0\0")),
        "jpeg iccs": lambda: _jpeg_segments(
            size_bytes, jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 9)
        ),
        "jpeg photoshop": lambda: _jpeg_segments(
            size_bytes, jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\4abcd")
        ),
        "jpeg padding": lambda: _jpeg_padding(size_bytes),
        "jpeg noise between": lambda: _jpeg_noise_between(size_bytes),
        "jpeg exif tags": lambda: _jpeg_exif(3_000, size_bytes // 2),
        "gif canvas": lambda: _gif(side, side),
        "gif frame beyond screen": lambda: _gif_frame_beyond_screen(side, side),
        "gif 65535 square": lambda: _gif_resized(65535, 65535),
        "gif comment blocks": lambda: _gif_blocks(size_bytes, 0xFE),
        "gif extension blocks": lambda: _gif_blocks(size_bytes, 0xFF),
        "gif extensions": lambda: _gif_extensions(size_bytes),
        "bmp rle8 runs of one": lambda: _bmp_rle(side, side, b"\1\7" * (size_bytes // 2), bits=8),
        "bmp rle8 line ends": lambda: _bmp_rle(side, side, b"\0\0" * (size_bytes // 2), bits=8),
        "bmp rle4 runs": lambda: _bmp_rle(side, side, b"\xff\x77" * (size_bytes // 2), bits=4),
        "bmp rle4 nothing": lambda: _bmp_rle(4, side * side // 4, b"\0\0\1\7" * 100, bits=4),
        "bmp rle8 one pixel a line": lambda: _bmp_rle(
            side, side, b"\1\7\0\0" * (size_bytes // 4), bits=8
        ),
        "bmp rle8 too much for a row": lambda: _bmp_rle(
            1, side * side, b"\1\7" * (size_bytes // 2), bits=8
        ),
        "tiff strips": lambda: _tiff_many_strips(size_bytes // 6),
        "tiff tags": lambda: _tiff_tags(3_000, size_bytes),
        "tiff bytes tag": lambda: _tiff_long_tag(size_bytes, 1, 1),
        "tiff shorts tag": lambda: _tiff_long_tag(size_bytes, 3, 2),
        "tiff rationals tag": lambda: _tiff_long_tag(size_bytes, 5, 8),
        "tiff cycle": _tiff_cycle,
        "tiff cyclic exif": _tiff_cyclic_exif,
        "tiff deflate": lambda: encoded(
            Image.new("RGBA", (side, side)), "TIFF", compression="tiff_deflate"
        ),
        "tiff group 4": lambda: encoded(Image.new("1", (side, side)), "TIFF", compression="group4"),
        "tiff jpeg": lambda: encoded(Image.new("RGB", (side, side)), "TIFF", compression="jpeg"),
        "tiff jpeg scans": lambda: _tiff_jpeg(_grey_jpeg_scans(side, 100), side),
        "tiff jpeg small scans": lambda: _tiff_jpeg(
            _grey_jpeg_scans(side * 5 // 6, 100), side * 5 // 6
        ),
        "tiff jpeg arithmetic": lambda: _tiff_jpeg(
            _jpeg_arithmetic(side * 5 // 6, 90), side * 5 // 6
        ),
        "webp canvas": lambda: _webp_canvas(side, side),
        "webp lossless": lambda: encoded(
            Image.new("RGBA", (side, side), (1, 2, 3, 4)), "WEBP", lossless=True, method=0
        ),
        "webp lossy": lambda: encoded(
            Image.effect_noise((side // 2, side // 2), 80).convert("RGB"),
            "WEBP",
            quality=1,
            method=0,
        ),
        "webp chunks": lambda: _webp_chunks(size_bytes),
    }
    for name, make in makers.items():
        yield name, make()
