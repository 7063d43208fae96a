"""Augmentation by what can be seen of it."""

from __future__ import annotations

import time
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_service.data.augment import PRESETS, Augmentation, augment, centre_crop
from hashlens.errors import InvalidInputError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(n: int, side: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def grid(n: int, side: int) -> np.ndarray:
    """Images whose red is the row and whose green is the column."""
    images = np.zeros((n, side, side, 3), np.uint8)
    images[..., 0] = np.arange(side)[:, None]
    images[..., 1] = np.arange(side)
    return images


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    n=st.integers(0, 5),
    crop=st.integers(1, 20),
    more=st.integers(0, 6),
)
def test_shape_and_determinism(name: str, n: int, crop: int, more: int) -> None:
    pixels = noise(n, crop + more)
    before = pixels.copy()
    first, second = (augment(pixels, PRESETS[name], crop, rng(7)) for _ in range(2))
    assert first.shape == (n, crop, crop, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(pixels, before)


def test_nothing_is_the_centre() -> None:
    pixels = noise(3, 11)
    got = augment(pixels, PRESETS["none"], 8, rng())
    np.testing.assert_array_equal(got, centre_crop(pixels, 8))
    np.testing.assert_array_equal(got, pixels[:, 1:9, 1:9])
    assert not np.shares_memory(got, pixels)


def test_random_crops_reach_everywhere() -> None:
    got = augment(grid(400, 10), Augmentation(crop="random"), 8, rng())
    corners = {(int(image[0, 0, 0]), int(image[0, 0, 1])) for image in got}
    assert corners == {(top, left) for top in range(3) for left in range(3)}
    for image in got[:10]:
        np.testing.assert_array_equal(image - image[0, 0], grid(1, 8)[0])


def test_half_are_mirrored() -> None:
    pixels = noise(1000, 4)
    got = augment(pixels, Augmentation(mirror=0.5), 4, rng())
    mirrored = (got == pixels[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored ^ (got == pixels).all(axis=(1, 2, 3))).all()
    assert 430 < mirrored.sum() < 570


def test_shifts_repeat_the_border() -> None:
    got = augment(grid(500, 28), Augmentation(shift=1 / 14), 28, rng())
    shifts = got[:, 14, 14, :2].astype(int) - 14
    assert {tuple(shift) for shift in shifts.tolist()} == {
        (down, right) for down in range(-2, 3) for right in range(-2, 3)
    }
    places = np.arange(28)
    for image, (down, right) in zip(got, shifts, strict=True):
        np.testing.assert_array_equal(image[:, 0, 0], np.clip(places + down, 0, 27))
        np.testing.assert_array_equal(image[0, :, 1], np.clip(places + right, 0, 27))


def test_reach_grows_with_the_side() -> None:
    got = augment(grid(200, 224), Augmentation(shift=1 / 14), 224, rng())
    shifts = got[:, 112, 112, 0].astype(int) - 112
    assert (shifts.min(), shifts.max()) == (-16, 16)


def test_erased_rectangles() -> None:
    pixels = np.full((600, 28, 28, 3), 77, np.uint8)
    got = augment(pixels, Augmentation(erase=0.3), 28, rng())
    changed = (got != 77).any(axis=3)
    # Of 256 shades one cannot be told from the image.
    n_erased = changed.any(axis=(1, 2)).sum()
    assert 140 < n_erased < 220
    heights, widths = set(), set()
    for image, mask in zip(got, changed, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert len(np.unique(image[mask])) == 1
            heights.add(len(rows))
            widths.add(len(columns))
    assert heights == widths == set(range(4, 13))


def test_zoom_and_turn_keep_the_middle() -> None:
    """A turned and zoomed ramp still is one: its slope says by how much."""
    side = 41
    ramp = np.zeros((300, side, side, 3), np.uint8)
    ramp[..., 0] = np.arange(side)[:, None] * 4 + 40
    ramp[..., 1] = np.arange(side) * 4 + 40
    changed = Augmentation(scale=(0.7, 0.9), rotate_deg=10)
    got = augment(ramp, changed, side, rng()).astype(float)
    middle = got[:, 20, 20, :2]
    assert np.abs(middle - 120).max() <= 1
    down = (got[:, 30, 20, :2] - got[:, 10, 20, :2]) / 20 / 4
    scale = np.hypot(down[:, 0], down[:, 1])
    angle = np.degrees(np.arctan2(down[:, 1], down[:, 0]))
    assert 0.68 < scale.min() < 0.73
    assert 0.87 < scale.max() < 0.92
    assert -11 < angle.min() < -8
    assert 8 < angle.max() < 11


def test_what_turns_in_from_outside_repeats_the_border() -> None:
    white = np.full((100, 20, 20, 3), 255, np.uint8)
    for side, changed in ((20, (1.0, 1.5)), (16, (1.0, 1.0))):
        got = augment(
            white,
            Augmentation(scale=changed, rotate_deg=45, shift=0.2, crop="random", mirror=0.5),
            side,
            rng(),
        )
        assert (got == 255).all()


def test_no_turn_by_the_turning_code_is_no_change() -> None:
    """The two ways of cutting agree on what a corner, a shift and a mirror image are."""
    pixels = noise(200, 12)
    plain = Augmentation(mirror=0.5, crop="random", shift=0.2)
    straight = augment(pixels, plain, 9, rng(5))
    turning = Augmentation(mirror=0.5, crop="random", shift=0.2, scale=(0.999999, 1.000001))
    turned = augment(pixels, turning, 9, rng(5))
    assert np.abs(turned.astype(int) - straight).max() <= 1


def test_colours() -> None:
    pixels = noise(200, 8)
    grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
    for name in ("brightness", "contrast", "saturation"):
        got = augment(pixels, Augmentation(**{name: 0.3}), 8, rng())
        inside = (got > 0) & (got < 255)
        moved = got.astype(float) - pixels
        base = {
            "brightness": pixels.astype(float),
            "contrast": pixels - grey.mean(axis=(1, 2))[:, None, None, None],
            "saturation": pixels - grey[..., None],
        }[name]
        # One factor for each image explains every sample that was not cut off.
        factors = [
            float((m[i] * b[i]).sum() / (b[i] ** 2).sum())
            for m, b, i in zip(moved, base, inside, strict=True)
        ]
        for m, b, i, factor in zip(moved, base, inside, factors, strict=True):
            assert np.abs(m[i] - factor * b[i]).max() <= 1
        assert -0.31 < min(factors) < -0.25
        assert 0.25 < max(factors) < 0.31


def test_presets_change_more_and_more() -> None:
    """Mean distance from the plain image, on what looks like a photograph more than noise does."""
    pixels = np.repeat(np.repeat(noise(64, 8), 4, axis=1), 4, axis=2)
    change = {
        name: np.abs(
            augment(pixels, preset, 28, rng()) - centre_crop(pixels, 28).astype(int)
        ).mean()
        for name, preset in PRESETS.items()
    }
    assert list(PRESETS) == ["none", "mirror", "light", "standard", "strong"]
    assert change["none"] == 0
    assert change["mirror"] < change["standard"] < change["strong"]


@pytest.mark.parametrize(
    "change",
    [
        {"mirror": 1.5},
        {"shift": -0.1},
        {"rotate_deg": 181},
        {"erase": float("nan")},
        {"scale": (0.0, 1.0)},
        {"scale": (1.2, 1.0)},
        {"erase_side": (0.5, 1.1)},
        {"contrast": 2},
    ],
)
def test_values_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Augmentation(**change)  # type: ignore[arg-type]
    assert caught.value.field == f"augment.{next(iter(change))}"
    assert next(iter(change)) in {field.name for field in fields(Augmentation)}


def test_a_crop_larger_than_the_image() -> None:
    for cut in (
        lambda: augment(noise(1, 8), PRESETS["none"], 9, rng()),
        lambda: centre_crop(noise(1, 8), 9),
        lambda: centre_crop(noise(1, 8), 0),
    ):
        with pytest.raises(InvalidInputError, match="cannot be cut"):
            cut()


def test_it_keeps_up_with_the_network() -> None:
    """At 28 px a small network learns from some thousands a second. Measured: 200,000."""
    pixels = noise(256, 28)
    best = np.inf
    for _ in range(5):
        began = time.thread_time()  # Whoever else is at work on this machine.
        augment(pixels, PRESETS["standard"], 28, rng())
        best = min(best, time.thread_time() - began)
    assert 256 / best > 10_000
