"""Hostile and odd images."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from encoder_service.decode import DecodeLimits, decode
from hashlens.errors import InvalidInputError

LIMITS = DecodeLimits()
RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
SMOOTH = Image.fromarray(
    np.stack(np.meshgrid(np.arange(0, 240, 4), np.arange(0, 160, 4)) * 2, axis=-1)[..., :3].astype(
        np.uint8
    )
)


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixels(data: bytes, limits: DecodeLimits = LIMITS) -> np.ndarray:
    image = decode(data, limits)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data: bytes, match: str, limits: DecodeLimits = LIMITS) -> None:
    with pytest.raises(InvalidInputError, match=match):
        decode(data, limits)


def of_decoding(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """Leave out what somebody else forgot to close, which is found out at any time."""
    return [one for one in caught if not issubclass(one.category, ResourceWarning)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_formats_give_the_pixels_back(kind: str, settings: dict[str, object]) -> None:
    np.testing.assert_array_equal(pixels(encoded(RGB, kind, **settings)), np.asarray(RGB))


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg(settings: dict[str, object]) -> None:
    got = pixels(encoded(SMOOTH, "JPEG", quality=95, **settings)).astype(int)
    assert np.abs(got - np.asarray(SMOOTH)).max() <= 8


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}])
@pytest.mark.parametrize(
    ("least_px", "size"),
    [(0, (240, 161)), (1, (30, 21)), (20, (30, 21)), (21, (60, 41)), (81, (240, 161))],
)
def test_a_jpeg_is_reduced_as_it_is_decoded(
    settings: dict[str, object], least_px: int, size: tuple[int, int]
) -> None:
    """By 1, 2, 4 or 8, never below what is asked for, and to nearly what resizing would make."""
    image = SMOOTH.resize((240, 161), Image.Resampling.BICUBIC)
    image = image.convert(str(settings.get("mode", "RGB")))
    data = encoded(image, "JPEG", quality=95, **{k: v for k, v in settings.items() if k != "mode"})
    got = decode(data, LIMITS, least_px)
    assert (got.mode, got.size) == ("RGB", size)
    resized = decode(data, LIMITS).resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(resized)).mean() < 4


def test_only_a_jpeg_is_reduced() -> None:
    for kind in ("PNG", "WEBP", "TIFF", "BMP"):
        assert decode(encoded(RGB, kind), LIMITS, 1).size == RGB.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_turned_as_well(orientation: int) -> None:
    turn = TURNED[orientation]
    image = SMOOTH.resize((480, 320), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if turn is None else image.transpose(turn)
    got = decode(encoded(stored, "JPEG", quality=98, subsampling=0, exif=exif), LIMITS, 160)
    assert got.size == (240, 160)
    wanted = np.asarray(image.resize((240, 160), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(got) - wanted).max() <= 6


def test_grey_becomes_rgb() -> None:
    got = pixels(encoded(RGB.convert("L"), "PNG"))
    np.testing.assert_array_equal(got[..., 0], np.asarray(RGB.convert("L")))
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


def test_bilevel() -> None:
    bits = np.array([[True, False], [False, True]])
    got = pixels(encoded(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(got[..., 1], np.where(bits, 255, 0))


# --- samples of other kinds ---


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_byte(kind: str) -> None:
    samples = np.array([[0, 255, 256], [0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    got = pixels(encoded(Image.fromarray(samples), kind))
    np.testing.assert_array_equal(got[..., 0], [[0, 0, 1], [0x7F, 0x80, 0xFF]])
    np.testing.assert_array_equal(got[..., 0], got[..., 1])


def test_16_bit_big_endian_tiff() -> None:
    samples = np.array([[0, 0x1234], [0x8000, 0xFFFF]], dtype=np.uint16)
    big = Image.frombytes("I;16B", (2, 2), samples.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(encoded(big, "TIFF"))[..., 0], [[0, 0x12], [0x80, 0xFF]])


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """Write a PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = b"".join(chunk(c[:4], c[4:]) for c in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_16_bit_grey_and_colour_agree() -> None:
    value = 0x9ABC
    grey = png(1, 1, 16, 0, b"\0" + struct.pack(">H", value))
    colour = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", value, value, value))
    np.testing.assert_array_equal(pixels(grey), pixels(colour))
    assert pixels(grey)[0, 0, 0] == 0x9A


def test_16_bit_grey_with_a_transparent_value() -> None:
    rows = b"\0" + struct.pack(">2H", 0x0100, 0x0101)
    got = pixels(png(2, 1, 16, 0, rows, b"tRNS" + struct.pack(">H", 0x0100)))
    np.testing.assert_array_equal(got[0, :, 0], [255, 1])


def test_cmyk_and_ycck() -> None:
    cmyk = SMOOTH.convert("CMYK")
    want = np.asarray(cmyk.convert("RGB")).astype(int)
    assert np.abs(pixels(encoded(cmyk, "TIFF")) - want).max() == 0
    # Pillow writes Adobe's inverted CMYK, as Photoshop does.
    assert np.abs(pixels(encoded(cmyk, "JPEG", quality=98)) - want).max() <= 12


def test_32_bit_samples_are_refused() -> None:
    for samples in (np.ones((2, 2), np.int32), np.ones((2, 2), np.float32)):
        refused(encoded(Image.fromarray(samples), "TIFF"), "32-bit samples")


# --- transparency lies on white ---


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha(kind: str) -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 128)])
    settings = {"lossless": True} if kind == "WEBP" else {}
    got = pixels(encoded(rgba, kind, **settings))[0].astype(int)
    assert got[0].tolist() == [200, 0, 0]
    assert got[1].tolist() == [255, 255, 255]
    assert np.abs(got[2] - [227, 127, 127]).max() <= 1


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(10, 255), (10, 0)])
    np.testing.assert_array_equal(pixels(encoded(image, "PNG"))[0, :, 0], [10, 255])


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    got = pixels(encoded(image, "PNG", transparency=transparency))[0]
    assert got.tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_rgb_with_a_transparent_colour() -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    got = pixels(encoded(image, "PNG", transparency=(1, 2, 3)))[0]
    assert got.tolist() == [[255, 255, 255], [4, 5, 6]]


# --- several frames ---


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert (pixels(data) == [255, 0, 0]).all()


def test_gif_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 80, 80, 80])
    image.putdata([0, 1])
    got = pixels(encoded(image, "GIF", transparency=0))[0]
    assert got.tolist() == [[255, 255, 255], [80, 80, 80]]


# --- orientation ---

TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright scene under each orientation, from the EXIF standard."""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    turn = TURNED[orientation]
    stored = SMOOTH if turn is None else SMOOTH.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}
    got = pixels(encoded(stored, kind, exif=exif, **settings.get(kind, {})))
    assert got.shape == (SMOOTH.height, SMOOTH.width, 3)
    assert np.abs(got.astype(int) - np.asarray(SMOOTH)).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_out_of_range_means_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(RGB, "PNG", exif=exif)), np.asarray(RGB))


def test_damaged_exif_neither_warns_nor_kills() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\xff\0\0\xf0\xff\0\0"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(encoded(RGB, "JPEG", exif=exif), LIMITS).size == RGB.size
    assert not of_decoding(caught)


# --- what is refused ---


def test_empty() -> None:
    refused(b"", "zero bytes")


@pytest.mark.parametrize(
    "data",
    [
        b"hello, world",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"PK\x03\x04" + bytes(100),
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"\0" * 100,
    ],
)
def test_other_formats_are_refused_by_their_magic(data: bytes) -> None:
    refused(data, "JPEG, PNG, WebP, GIF, BMP or TIFF")


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "JPEG2000"])
def test_formats_pillow_reads_but_we_do_not(kind: str) -> None:
    try:
        data = encoded(RGB, kind)
    except OSError:
        pytest.skip(f"this Pillow cannot write {kind}")
    refused(data, "no image of a format")


def test_polyglot_goes_to_the_parser_its_first_bytes_name() -> None:
    picture = encoded(RGB, "PNG")
    np.testing.assert_array_equal(pixels(picture + b"PK\x03\x04 a zip"), np.asarray(RGB))
    refused(b"GIF89a" + picture, "the GIF image is damaged")
    refused(b"BM" + encoded(RGB, "TIFF"), "the BMP image is damaged")
    refused(b"\xff\xd8\xff" + b"<script>alert(1)</script>", "the JPEG image is damaged")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_truncated(kind: str, share: float) -> None:
    data = encoded(RGB, kind)
    refused(data[: int(len(data) * share)], "damaged or incomplete|no image of a format")


def test_too_many_bytes() -> None:
    data = encoded(RGB, "PNG")
    assert decode(data, DecodeLimits(max_bytes=len(data))).size == RGB.size
    refused(data, "the limit is", DecodeLimits(max_bytes=len(data) - 1))


def test_too_many_pixels() -> None:
    data = encoded(RGB, "PNG")
    assert decode(data, DecodeLimits(max_pixels=600)).size == RGB.size
    refused(data, "30 x 20 pixels, the limit is 599", DecodeLimits(max_pixels=599))


def bombs() -> dict[str, bytes]:
    """Small files whose headers promise gigantic images."""
    gif = bytearray(encoded(RGB.convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(encoded(RGB, "BMP"))
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    jpeg = bytearray(encoded(RGB, "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65535, 65535)
    tiff = bytearray(encoded(RGB, "TIFF"))
    for tag in (256, 257):
        for kind in (3, 4):
            at = tiff.find(struct.pack("<HHI", tag, kind, 1))
            if at >= 0:
                tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 200_000)
    webp = bytearray(encoded(RGB.convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0II*\0"))
    at = webp.index(b"VP8X")
    webp[at + 12 : at + 18] = b"\xff\x3f\0\xff\x3f\0"
    return {
        "PNG": png(200_000, 200_000, 8, 2, b""),
        "GIF": bytes(gif),
        "BMP": bytes(bmp),
        "JPEG": bytes(jpeg),
        "TIFF": bytes(tiff),
        "WEBP": bytes(webp),
    }


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG", "TIFF"])
def test_bombs_are_refused_by_their_header(kind: str) -> None:
    refused(bombs()[kind], "pixels, the limit is")


def test_webp_bomb_is_refused() -> None:
    # Pillow's own header check may come first: either way no pixel is decoded.
    refused(bombs()["WEBP"], "pixels, the limit is|damaged or incomplete")


def test_a_large_image_within_the_limits_does_not_warn() -> None:
    """Pillow warns above 89 million pixels; here only our own limit counts."""
    data = encoded(Image.new("1", (10_000, 9_000)), "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused(data, "the limit is 50,000,000")
        assert decode(data, DecodeLimits(max_pixels=90_000_000)).size == (10_000, 9_000)
    assert not of_decoding(caught)


def test_progressive_jpeg_with_too_many_scans() -> None:
    data = encoded(SMOOTH, "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    refused(data[:scan] + data[scan:-2] * 120 + data[-2:], "more than 100 scans")


def test_decompressed_text_bomb_in_png() -> None:
    text = b"zTXtk\0\0" + zlib.compress(bytes(20_000_000), 9)
    refused(png(1, 1, 8, 0, b"\0\0", text), "damaged or incomplete")


# --- surroundings ---


def test_pillow_settings_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    decode(encoded(RGB, "PNG"), LIMITS)
    refused(encoded(RGB, "JPEG")[:-50], "incomplete")
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_many_threads() -> None:
    files = [encoded(RGB, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    want = [pixels(data) for data in files]
    barrier = threading.Barrier(4)

    def work(_: int) -> list[np.ndarray]:
        barrier.wait()
        return [pixels(data) for data in files]

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(work, range(4)):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)


SEEDS = [encoded(SMOOTH, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")] + [
    encoded(RGB.convert("P"), "PNG", transparency=3),
    encoded(RGB.convert("CMYK"), "JPEG"),
    encoded(SMOOTH, "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    encoded(RGB, "TIFF", compression="tiff_deflate"),
    encoded(RGB, "GIF", save_all=True, append_images=[SMOOTH.resize(RGB.size)]),
]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), max_size=6),
    keep=st.floats(0.02, 1),
)
def test_mutated_bytes_succeed_or_are_refused(
    seed: bytes, edits: list[tuple[float, bytes]], keep: float
) -> None:
    data = bytearray(seed)
    for place, patch in edits:
        at = int(place * len(data))
        data[at : at + len(patch)] = patch
    try:
        image = decode(bytes(data[: max(1, int(keep * len(data)))]), DecodeLimits(10**6, 10**6))
    except InvalidInputError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 10**6


@settings(max_examples=100, deadline=None)
@given(
    magic=st.sampled_from(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM", b"II*\0"]
    ),
    rest=st.binary(max_size=300),
)
def test_random_bytes_after_a_magic_are_refused_or_tiny(magic: bytes, rest: bytes) -> None:
    try:
        image = decode(magic + rest, DecodeLimits(max_pixels=10**6))
    except InvalidInputError:
        return
    assert image.mode == "RGB"


def test_a_phones_jpeg_with_a_film_behind_it_is_decoded() -> None:
    jpeg = encoded(Image.effect_noise((64, 48), 50).convert("RGB"), "JPEG")
    film = np.random.default_rng(0).integers(0, 256, 8_000_000, dtype=np.uint8).tobytes()
    assert film.count(b"\xff\xda") > 100
    assert decode(jpeg + film, DecodeLimits()).size == (64, 48)
