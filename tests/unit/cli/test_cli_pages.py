from __future__ import annotations

import json
import re
from html import unescape
from io import BytesIO, StringIO
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hashlens.cli import demo
from hashlens.cli.gallery import search_page
from hashlens.cli.images import enlarged, png, thumbnail, thumbnail_of_file
from hashlens.cli.report import STAGES, Answer, Asked, LabelScore, Report, demo_page
from hashlens.cli.search import as_dict, as_table, receipt_line
from hashlens.types import (
    EncodeTimings,
    FeatureDtype,
    Hit,
    ModelInfo,
    Receipt,
    SearchResult,
    StageTimings,
)

EVIL = '<script>alert("1")</script>&'

TIMINGS = StageTimings(
    encode=EncodeTimings(decode_ns=1_000_000, queue_ns=2_000_000, inference_ns=3_000_000),
    encode_call_ns=7_000_000,
    coarse_ns=400_000,
    fine_ns=500_000,
)


def picture(color: str, size: tuple[int, int] = (40, 30), image_format: str = "PNG") -> bytes:
    out = BytesIO()
    Image.new("RGB", size, color).save(out, image_format)
    return out.getvalue()


def result_of(*hits: Hit, truncated: bool = False) -> SearchResult:
    receipt = Receipt(
        rows_scanned=4800,
        threshold_bits=6,
        pool_size=1204,
        pool_histogram=(1, 2),
        pool_truncated=truncated,
        rows_without_feature=0,
        exact=not truncated,
        version=9,
        timings=TIMINGS,
    )
    return SearchResult(hits, receipt)


def hit_of(path: str, *, distance: float | None = 1.5, bits: int = 2) -> Hit:
    return Hit(
        id=path, hamming_bits=bits, distance=distance, payload=json.dumps({"path": path}).encode()
    )


# -- search ------------------------------------------------------------------------------------


def test_the_gallery_shows_what_it_can_read(tmp_path: Path) -> None:
    red = tmp_path / "red & blue.png"
    red.write_bytes(picture("red"))
    hits = [hit_of(str(red)), hit_of(str(tmp_path / "gone.png")), hit_of("/dev/zero", bits=1)]
    page = search_page(str(red), red.read_bytes(), "photos", result_of(*hits), 12.5)
    assert page.count("data:image/webp;base64,") == 2, "the query and the first hit"
    assert page.count("no preview") == 2
    assert red.as_uri() in page
    assert "red &amp; blue.png" in page
    assert "1.500 · 2 bits" in page
    assert "1.500 · 1 bit<" in page


def test_the_gallery_cannot_be_injected_into() -> None:
    hit = Hit(id=f"/{EVIL}", hamming_bits=0, distance=None, payload=EVIL.encode())
    page = search_page(f"/a/{EVIL}", b"no image", EVIL, result_of(hit), 1.0)
    assert "<script" not in page
    assert unescape(page).count(EVIL) == 3, "it is there, as text"


def test_the_gallery_of_nothing() -> None:
    assert "Nothing was found." in search_page("x", None, "photos", result_of(), 1.0)


def test_the_table_takes_paths_as_they_are() -> None:
    out = Console(width=100, markup=False, file=(file := StringIO()))
    out.print(as_table(result_of(hit_of("/a/[red]b.jpg"), hit_of("/a/\x1b[2J.jpg", distance=None))))
    text = file.getvalue()
    assert "/a/[red]b.jpg" in text
    assert "\\x1b[2J.jpg" in text
    assert "\x1b" not in text


def test_the_receipt_in_one_line() -> None:
    assert receipt_line(result_of().receipt, 9.0) == (
        "pool 1,204 of 4,800 within 6 bits · exact · "
        "encode 7.00 + coarse 0.40 + fine 0.50 of 9.00 ms"
    )
    cut = receipt_line(result_of(truncated=True).receipt, 9.0)
    assert "not exact, pool cut by --max-pool" in cut


def test_json_is_stable() -> None:
    hits = [hit_of("/a.jpg"), Hit(id="b", hamming_bits=3, distance=None, payload=b"\xff")]
    found = as_dict({"image": "/q.jpg"}, "photos", result_of(*hits), 9.0)
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"query", "collection", "hits", "receipt"}
    assert found["hits"] == [
        {
            "rank": 1,
            "id": "/a.jpg",
            "hamming_bits": 2,
            "distance": 1.5,
            "payload": {"path": "/a.jpg"},
        },
        {"rank": 2, "id": "b", "hamming_bits": 3, "distance": None, "payload": None},
    ]
    assert found["receipt"]["timings_ms"]["inference"] == 3.0


def test_json_is_json_whatever_the_numbers() -> None:
    far = Hit(id="far", hamming_bits=1, distance=float("inf"), payload=b'{"n": NaN, "big": 1e999}')
    (hit,) = as_dict({"id": "x"}, "photos", result_of(far), 1.0)["hits"]
    json.dumps(hit, allow_nan=False)
    assert (hit["distance"], hit["payload"]) == (None, None)


@pytest.mark.parametrize("payload", [b"", b"[1]", b'{"path": 3}', b"[" * 60_000, b"{"])
def test_a_payload_of_another_kind_is_no_path(payload: bytes) -> None:
    hit = Hit(id="the id", hamming_bits=0, distance=0.0, payload=payload)
    table = as_table(result_of(hit))
    assert list(table.columns[-1].cells) == ["the id"]


# -- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_thumbnails(image_format: str) -> None:
    made = thumbnail(picture("red", (400, 200), image_format), 100)
    assert made is not None
    with Image.open(BytesIO(made)) as image:
        assert image.size == (100, 50)


def test_thumbnails_are_upright_and_opaque() -> None:
    clear = Image.new("RGBA", (20, 40), (0, 0, 0, 0))
    exif = clear.getexif()
    exif[0x0112] = 6
    out = BytesIO()
    clear.save(out, "PNG", exif=exif)
    made = thumbnail(out.getvalue(), 40)
    assert made is not None
    with Image.open(BytesIO(made)) as image:
        assert image.size == (40, 20)
        assert image.mode == "RGB"
        assert min(image.getpixel((5, 5))) > 250  # type: ignore[arg-type]


def test_no_thumbnail_of_what_is_no_picture(tmp_path: Path) -> None:
    whole = picture("red", (400, 200), "JPEG")
    assert thumbnail(whole[:200], 100) is None
    assert thumbnail(b"", 100) is None
    assert thumbnail_of_file(tmp_path, 100) is None
    assert thumbnail_of_file(Path("/dev/zero"), 100) is None
    assert thumbnail_of_file(Path("nul\0"), 100) is None


def test_enlarged() -> None:
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    for image_format in ("PNG", "JPEG"):
        with Image.open(BytesIO(enlarged(grey, 4, image_format))) as image:
            assert (image.format, image.size, image.mode) == (image_format, (112, 112), "RGB")
    with Image.open(BytesIO(png(grey))) as image:
        np.testing.assert_array_equal(np.asarray(image), grey)


# -- demo --------------------------------------------------------------------------------------


def report_of(classes: tuple[str, ...]) -> Report:
    model = ModelInfo(
        model_id="abc",
        backbone=EVIL,
        n_bits=48,
        dim=1024,
        classes=classes,
        preprocessing={},
        metrics={},
        licence="",
        max_image_bytes=1,
        max_image_pixels=1,
        max_batch_items=1,
        max_message_bytes=1,
        feature_dtype=FeatureDtype.F16,
        device="cpu",
    )
    score = LabelScore(classes[0], 1, 0.5, 0.25)
    return Report(model, 10, score, (score,), dict.fromkeys(STAGES, 1.0), 2.0)


def test_the_report_marks_right_and_wrong() -> None:
    classes = (EVIL, "Bag")
    answers = (Answer(1, 0, 1.25, 1, "Bag 87%", f"bit 3: {EVIL}\nbit 4"), Answer(2, 1, 2.5, 3))
    asked = [Asked(0, 0, answers, "Bag 53%", "bit 9"), Asked(3, 1, (Answer(2, 1, 0.5, 0),))]
    drawn: list[int] = []

    def draw(row: int) -> bytes:
        drawn.append(row)
        return bytes([row])

    page = demo_page(report_of(classes), classes, asked, draw, EVIL)
    assert "<script" not in page
    assert sorted(drawn) == [0, 1, 2, 3], "each picture is made once"
    assert page.count('class="query flawed"') == 1
    assert page.count('class="query"') == 1
    rights = re.findall(r'<li class="right".*?</li>', page, re.DOTALL)
    wrongs = re.findall(r'<li class="wrong".*?</li>', page)
    assert [len(rights), len(wrongs)] == [2, 1]
    assert "✓" in rights[0]
    assert "1.25 · 1 bit<" in rights[0]
    assert "seen as Bag 87%" in rights[0]
    assert "bit 4" in rights[0]
    assert "seen as Bag 53%" in page
    assert 'title="bit 9"' in page
    assert "seen as" not in wrongs[0]
    assert "✗ Bag" in wrongs[0]
    assert "2.50 · 3 bits" in wrongs[0]


def test_queries_and_stored_images_are_balanced_and_disjoint() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10, dtype=np.uint8), 50))
    asked, stored = demo.split(labels, 100, 200)
    assert np.bincount(labels[asked]).tolist() == [10] * 10
    assert np.bincount(labels[stored]).tolist() == [20] * 10
    assert len({*asked.tolist(), *stored.tolist()}) == 300
    again, _ = demo.split(labels, 100, None)
    np.testing.assert_array_equal(asked, again)
    assert len(demo.split(labels, 100, None)[1]) == 400
    assert asked.tolist() != sorted(asked.tolist())


def test_too_few_images_are_a_matter_of_usage() -> None:
    labels = np.zeros(10, np.uint8)
    for n_queries, n_images in ((10, None), (5, 6), (11, 1)):
        with pytest.raises(click.UsageError, match="10 images are bundled"):
            demo.split(labels, n_queries, n_images)


def test_the_demo_counts_what_is_missing_as_wrong() -> None:
    data = demo.Dataset(np.zeros((3, 28, 28), np.uint8), np.array([0, 0, 1], np.uint8), ("a", "b"))

    def measured(row: int, *labels: str) -> demo.Measured:
        payloads = [json.dumps({"row": 0, "label": label}).encode() for label in labels]
        hits = [Hit(id="x", hamming_bits=0, distance=0.0, payload=p) for p in payloads]
        return demo.Measured(row, result_of(*hits), call_ns=10_000_000 * (row + 1))

    asked = [measured(0, *"aaaaabbbbb"), measured(1, *"aaaaaaaaaab"), measured(2, "b")]
    by_label, overall = demo.scores(asked, data)
    assert [(s.name, s.queries) for s in by_label] == [("a", 2), ("b", 1)]
    assert [s.precision_at_10 for s in by_label] == pytest.approx([0.75, 0.1])
    assert [s.precision_at_100 for s in by_label] == pytest.approx([0.075, 0.01])
    assert overall.precision_at_10 == pytest.approx((0.5 + 1.0 + 0.1) / 3)
    assert demo.medians(asked) == pytest.approx(
        {"decode": 1, "queue": 2, "inference": 3, "coarse": 0.4, "fine": 0.5, "whole_call": 20}
    )


def test_no_queries_of_a_label_leaves_it_out() -> None:
    data = demo.Dataset(np.zeros((1, 28, 28), np.uint8), np.array([1], np.uint8), ("a", "b"))
    by_label, overall = demo.scores([demo.Measured(0, result_of(), 1)], data)
    assert [s.name for s in by_label] == ["b"]
    assert overall.precision_at_10 == 0.0
