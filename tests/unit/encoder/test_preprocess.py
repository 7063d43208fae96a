from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder_service.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from hashlens.errors import InvalidInputError

SMALL = Preprocessing(resize=40, crop=32)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def test_shape_dtype_and_layout() -> None:
    got = SMALL(noise(100, 70))
    assert got.shape == (3, 32, 32)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous


def test_normalises_by_channel() -> None:
    got = SMALL(Image.new("RGB", (64, 64), (255, 0, 128)))
    want = (np.array([1, 0, 128 / 255]) - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(got[:, 5, 7], want, rtol=1e-5)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = noise(48, 48)
    same = Preprocessing(resize=48, crop=48)
    np.testing.assert_array_equal(same.resize_crop(image), np.asarray(image))


def test_crop_takes_the_centre() -> None:
    image = noise(40, 40)
    np.testing.assert_array_equal(SMALL.resize_crop(image), np.asarray(image)[4:36, 4:36])


def test_wide_and_high_images_lose_their_ends() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        whole = Preprocessing(resize=50, crop=40).resize_crop(turned)
        assert (whole == [0, 0, 255]).all()


def test_warping_keeps_all_but_the_rim() -> None:
    """All sides become one length, then the centre is cut: here the outer tenth goes."""
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (40, 15, 260, 85))
    image.paste("green", (100, 40, 200, 60))
    warp = Preprocessing(resize=50, crop=40, fit="warp")
    got = warp.resize_crop(image)
    # Columns of 6 px and rows of 2 px, without the outer five of each.
    assert got[0, 0].tolist() == [255, 0, 0]
    assert got[5, 5].tolist() == [0, 0, 255]
    assert got[17:23, 14:26].reshape(-1, 3).tolist() == [[0, 128, 0]] * 72
    usual = np.asarray(image.resize((50, 50), Image.Resampling.BILINEAR).crop((5, 5, 45, 45)))
    assert np.abs(got.astype(int) - usual).max() <= 1


def test_warping_a_square_is_nothing_new() -> None:
    image = noise(90, 90)
    warp = Preprocessing(resize=40, crop=32, fit="warp")
    np.testing.assert_array_equal(warp.resize_crop(image), SMALL.resize_crop(image))


def test_models_without_a_choice_of_fit_keep_their_id() -> None:
    assert "fit" not in SMALL.to_json()
    assert Preprocessing.from_json(SMALL.to_json()) == SMALL
    warp = Preprocessing(resize=40, crop=32, fit="warp")
    assert warp.to_json() == {**SMALL.to_json(), "fit": "warp"}
    assert Preprocessing.from_json(warp.to_json()) == warp


def test_reducing_a_jpeg_is_part_of_the_model_where_it_is_chosen() -> None:
    assert "jpeg_draft" not in SMALL.to_json()
    assert SMALL.least_px == 0
    draft = replace(SMALL, jpeg_draft=True)
    assert draft.least_px == 2 * SMALL.resize
    assert draft.to_json() == {**SMALL.to_json(), "jpeg_draft": True}
    assert Preprocessing.from_json(draft.to_json()) == draft


def test_close_to_resizing_first_and_cropping_after() -> None:
    image = noise(90, 60).resize((900, 600), Image.Resampling.BICUBIC)
    resized = image.resize((60, 40), Image.Resampling.BILINEAR)
    usual = np.asarray(resized.crop((14, 4, 46, 36))).astype(int)
    assert np.abs(SMALL.resize_crop(image).astype(int) - usual).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 3), (5000, 31)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    got = SMALL(Image.new("RGB", size, "white"))
    assert got.shape == (3, 32, 32)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.min(axis=(1, 2)), got.max(axis=(1, 2)))


def test_serving_and_training_see_the_same_numbers() -> None:
    """Training normalises whole batches of cached pixels, serving one image."""
    images = [noise(50 + i, 70) for i in range(5)]
    cached = np.stack([SMALL.resize_crop(image) for image in images])
    batch = SMALL.normalise(cached).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(batch, np.stack([SMALL(image) for image in images]))


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
def test_deterministic_for_every_size(width: int, height: int, interpolation: str) -> None:
    preprocessing = Preprocessing(resize=16, crop=13, interpolation=interpolation)
    image = noise(width, height)
    np.testing.assert_array_equal(preprocessing(image), preprocessing(image.copy()))


@pytest.mark.parametrize(
    "settings",
    [
        {"resize": 10, "crop": 11},
        {"crop": 0},
        {"resize": 5000, "crop": 10},
        {"interpolation": "nearest"},
        {"fit": "long"},
        {"jpeg_draft": "yes"},
        {"std": (0.1, 0.0, 0.1)},
        {"mean": (0.1, 0.1)},
    ],
)
def test_refuses(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Preprocessing(**settings)  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    odd = Preprocessing(48, 40, "lanczos", (0.5, 0.25, 0.125), (1.0, 2.0, 3.0))
    assert Preprocessing.from_json(json.loads(json.dumps(odd.to_json()))) == odd


def test_json_does_not_depend_on_how_numbers_were_written() -> None:
    assert json.dumps(Preprocessing(mean=(0, 0, 0)).to_json()) == json.dumps(
        Preprocessing(mean=(0.0, 0.0, 0.0)).to_json()
    )


@pytest.mark.parametrize("plain", [{}, {"resize": "x"}, {**SMALL.to_json(), "mean": [1, 2]}])
def test_broken_json_is_refused(plain: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Preprocessing.from_json(plain)
