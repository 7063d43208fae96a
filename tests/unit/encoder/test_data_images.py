"""Pixels from memory and on demand, held-out rows and chosen classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_service.data.augment import centre_crop
from encoder_service.data.config import DataConfig
from encoder_service.data.images import ImageSet, load_images
from encoder_service.data.source import Source, open_split
from encoder_service.data.split import holdout, select_classes, take
from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from hashlens.errors import InvalidInputError
from tests.support.pictures import make_tree

PREPROCESSING = Preprocessing(resize=40, crop=32)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    make_tree(tmp_path)
    return open_split(DataConfig(data=tmp_path), "train")


# --- pixels ---


@pytest.mark.parametrize(
    "change", [{"fit": "short"}, {"fit": "warp"}, {"resize": 10, "crop": 10, "jpeg_draft": True}]
)
def test_memory_and_demand_give_what_serving_sees(source: Source, change: dict[str, Any]) -> None:
    preprocessing = replace(PREPROCESSING, **change)
    side, least_px = preprocessing.crop, preprocessing.least_px
    told: list[tuple[int, int]] = []
    n_bytes = len(source) * side * side * 3
    kept = load_images(
        source, preprocessing, max_cache_bytes=n_bytes, on_progress=lambda *far: told.append(far)
    )
    assert told == [(12, 12)]
    told.clear()
    on_demand = load_images(
        source, preprocessing, max_cache_bytes=n_bytes - 1, on_progress=lambda *f: told.append(f)
    )
    assert not told
    rows = np.array([3, 11, 0, 3])
    for images in (kept, on_demand):
        assert (len(images), images.side, images.multi_label) == (12, side, False)
        pixels = images.batch(rows)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        for row, image in zip(rows, preprocessing.normalise(pixels), strict=True):
            served = preprocessing(decode(source.image_bytes(row), DecodeLimits(), least_px))
            np.testing.assert_array_equal(image.transpose(2, 0, 1), served)
        part = images.take(np.array([5, 3]))
        np.testing.assert_array_equal(part.batch(np.array([1])), pixels[:1])
        assert part.labels.tolist() == source.labels[[5, 3]].tolist()
        assert images.batch(np.empty(0, np.int64)).shape == (0, side, side, 3)


def test_a_batch_is_a_copy(source: Source) -> None:
    images = load_images(source, PREPROCESSING)
    before = images.batch(np.arange(3))
    images.batch(np.arange(3))[:] = 0
    np.testing.assert_array_equal(images.batch(np.arange(3)), before)


@pytest.mark.parametrize("fit", ["short", "warp"])
def test_the_square_before_the_crop(source: Source, fit: str) -> None:
    """Its centre is what serving sees, but for rounding."""
    preprocessing = replace(PREPROCESSING, fit=fit)  # type: ignore[arg-type]
    rows = np.arange(len(source))
    square = load_images(source, preprocessing, side=40).batch(rows)
    assert square.shape == (12, 40, 40, 3)
    served = load_images(source, preprocessing).batch(rows)
    assert np.abs(centre_crop(square, 32).astype(int) - served).max() <= 1


def test_an_image_that_cannot_be_read_on_demand(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    source = open_split(DataConfig(data=tmp_path), "train")
    with pytest.raises(InvalidInputError, match=r"broken\.png: the PNG image is damaged"):
        load_images(source, PREPROCESSING)
    images = load_images(source, PREPROCESSING, max_cache_bytes=0)
    assert images.batch(np.arange(4)).shape == (4, 32, 32, 3)
    with pytest.raises(InvalidInputError, match=r"broken\.png: the PNG image is damaged"):
        images.batch(np.arange(len(images)))


# --- held-out rows ---


def test_each_class_gives_its_share() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    train, held = holdout(labels, 100, seed=3)
    assert np.bincount(labels[held]).tolist() == [60, 30, 10]
    assert sorted([*train, *held]) == list(range(1000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held) > 0).all()
    assert holdout(labels, 100, seed=3)[1].tolist() == held.tolist()
    assert holdout(labels, 100, seed=4)[1].tolist() != held.tolist()
    # Chance decides which classes of one size are first, and which images of a class.
    firsts = {int(holdout(np.arange(100) % 10, 1, seed)[1][0]) for seed in range(30)}
    assert len(firsts) > 10
    assert len({row % 10 for row in firsts}) > 4


def test_the_choice_is_fixed() -> None:
    """A training that is resumed on another machine must hold out the same images."""
    assert holdout(np.arange(30) % 3, 6, seed=1)[1].tolist() == FIXED


FIXED = [1, 4, 5, 11, 12, 24]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_no_class_loses_its_last_image(values: list[int], n: int, seed: int) -> None:
    labels = np.array(values)
    if n > len(values) - len(set(values)):
        with pytest.raises(InvalidInputError) as caught:
            holdout(labels, n, seed)
        assert caught.value.field == "holdout"
        return
    train, held = holdout(labels, n, seed)
    assert len(held) == n
    assert sorted([*train, *held]) == list(range(len(values)))
    assert set(labels[train]) == set(values)
    counts = np.bincount(labels)
    for label, count in enumerate(counts):
        # Each class's share, rounded; or all but one, where that is less.
        assert (labels[held] == label).sum() <= np.ceil(n * count / max(1, len(values))) + len(
            counts
        )


def test_several_labels_are_held_out_at_random() -> None:
    labels = np.random.default_rng(0).random((50, 3)) < 0.5
    train, held = holdout(labels, 10, seed=0)
    assert (len(train), len(held)) == (40, 10)
    assert sorted([*train, *held]) == list(range(50))


# --- chosen classes ---


def number_images(labels: np.ndarray) -> ImageSet:
    """Images whose only sample says which they are."""
    pixels = (
        np.zeros((len(labels), 1, 1, 3), np.uint8) + np.arange(len(labels))[:, None, None, None]
    )
    return ImageSet.from_pixels(pixels.astype(np.uint8), labels, ("a", "b", "c", "d"), "CC0")


def test_chosen_classes_of_an_image_set() -> None:
    images = number_images(np.array([0, 1, 2, 3, 2, 1]))
    kept = select_classes(images, ["c", "b"])
    assert kept.classes == ("c", "b")
    assert kept.labels.tolist() == [1, 0, 0, 1]
    assert kept.batch(np.arange(4))[:, 0, 0, 0].tolist() == [1, 2, 4, 5]
    assert kept.licence == "CC0"
    again = select_classes(kept.take(np.array([3, 1])), ("b", "c"))
    assert again.labels.tolist() == [0, 1]
    assert again.batch(np.arange(2))[:, 0, 0, 0].tolist() == [5, 2]


def test_chosen_classes_of_images_with_several() -> None:
    labels = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    kept = select_classes(number_images(labels), ["b", "a"])
    assert kept.multi_label
    # The second also is a "c", which is not to be seen.
    assert kept.labels.tolist() == [[True, True], [True, False]]
    assert kept.batch(np.arange(2))[:, 0, 0, 0].tolist() == [0, 2]


def test_chosen_classes_of_a_source(source: Source, tmp_path: Path) -> None:
    # Nothing is read: the files may be gone.
    swapped = select_classes(source, ["red", "blue"])
    assert swapped.labels.tolist() == [1] * 6 + [0] * 6
    assert [swapped.name(i) for i in range(12)] == [source.name(i) for i in range(12)]
    few = take(swapped, np.array([11, 0]))
    assert few.labels.tolist() == [0, 1]
    assert few.classes == ("red", "blue")
    assert few.image_bytes(0) == source.image_bytes(11)
    assert few.picture(1).tobytes() == source.picture(0).tobytes()
    assert few.name(1) == source.name(0)


@pytest.mark.parametrize(
    ("classes", "wrong"),
    [
        (["a", "e"], "no class 'e'.*'a', 'b', 'c', 'd'"),
        (["a", "a"], "each once"),
        (["a"], "two classes or more"),
        (["a", "d"], "no image is left of 'd'"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_classes_that_cannot_be_chosen(classes: list[str], wrong: str, several: bool) -> None:
    labels: np.ndarray = np.array([0, 1, 2])
    if several:
        labels = np.eye(4, dtype=bool)[labels]
    with pytest.raises(InvalidInputError, match=wrong) as caught:
        select_classes(number_images(labels), classes)
    assert caught.value.field == "classes"
