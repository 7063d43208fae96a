from __future__ import annotations

import numpy as np
import pytest

from hashlens.bits import bit_meanings
from hashlens.errors import InvalidInputError


def test_classes_are_named_strongest_first() -> None:
    weights = np.array(
        # one class alone, halves, nothing, against one class, weak ones left out
        [
            [3.0, 1.0, 5.0, 0.0, 2.0],
            [0.0, 2.0, 5.0, 0.0, 0.1],
            [0.0, -1.0, 5.0, 0.0, -0.1],
            [0.0, -2.0, 5.0, -4.0, -2.0],
        ],
        dtype=np.float32,
    )
    found = bit_meanings(weights, np.zeros(4, np.float32))
    assert [meaning.bit for meaning in found] == [0, 1, 2, 3, 4]
    assert [meaning.fires_for for meaning in found] == [(0,), (1, 0), (), (), (0,)]
    assert [meaning.silent_for for meaning in found] == [(), (3, 2), (), (3,), (3,)]
    assert found[0].weights == pytest.approx((2.25, -0.75, -0.75, -0.75))


def test_what_all_classes_share_and_the_bias_change_nothing() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((10, 48))
    plain = bit_meanings(weights, np.zeros(10))
    shifted = bit_meanings(weights + rng.standard_normal(48), rng.standard_normal(10))
    for a, b in zip(plain, shifted, strict=True):
        assert (a.fires_for, a.silent_for) == (b.fires_for, b.silent_for)
        assert a.weights == pytest.approx(b.weights)
        assert a.fires_for or a.silent_for


def test_equal_weights_that_only_rounding_tells_apart_name_nothing() -> None:
    weights = np.full((3, 2), 0.1, dtype=np.float32)
    weights[0] = np.nextafter(weights[0], np.float32(1))
    assert all(m.fires_for == m.silent_for == () for m in bit_meanings(weights, np.zeros(3)))


def test_one_class_names_nothing() -> None:
    (meaning,) = bit_meanings(np.array([[2.0]]), np.zeros(1))
    assert (meaning.fires_for, meaning.silent_for, meaning.weights) == ((), (), (0.0,))


@pytest.mark.parametrize(
    ("weights", "bias"),
    [
        (np.zeros((2, 3)), np.zeros(3)),
        (np.zeros(3), np.zeros(3)),
        (np.zeros((0, 3)), np.zeros(0)),
        (np.array([[np.nan]]), np.zeros(1)),
        (np.zeros((1, 1)), np.array([np.inf])),
    ],
)
def test_what_is_no_classifier_is_refused(weights: np.ndarray, bias: np.ndarray) -> None:
    with pytest.raises(InvalidInputError):
        bit_meanings(weights, bias)
