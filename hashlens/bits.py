"""What each bit of a code means, read off the classifier that was trained on the codes.

The classifier sees the codes' layer H and nothing else (Lin et al. 2015, section 3.2), so what it
makes of a bit is what the bit says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import InvalidInputError

CLEAR_SHARE = 0.5
"""A class is named for a bit if its weight is at least this share of the bit's largest."""


@dataclass(frozen=True, slots=True)
class BitMeaning:
    """What one bit says about the class."""

    bit: int
    """Its position in the code."""
    fires_for: tuple[int, ...]
    """Classes that the set bit speaks clearly for, strongest first."""
    silent_for: tuple[int, ...]
    """Classes that the set bit speaks clearly against, strongest first: the clear bit speaks for
    them."""
    weights: tuple[float, ...]
    """By class: how much setting the bit raises the class's logit, above the mean class."""


def bit_meanings(weights: NDArray[Any], bias: NDArray[Any]) -> tuple[BitMeaning, ...]:
    """Say which classes each bit speaks for and against.

    Setting bit b adds ``weights[c, b]`` to the logit of each class c. What all classes get alike
    changes no probability, so the mean over the classes is taken off. A class is named if the rest
    is at least `CLEAR_SHARE` of the bit's largest, by magnitude: of a bit for one class that class
    alone, of a bit that splits the classes in halves both halves.

    Parameters
    ----------
    weights
        Of the classifier: float, finite, shape ``[n_classes, n_bits]``.
    bias
        Of the classifier, shape ``[n_classes]``. The same whatever the code says, so it moves no
        bit's meaning; it is only checked.

    Returns
    -------
    tuple of BitMeaning
        One per bit, in order. A bit that is the same for all classes names none.

    Raises
    ------
    InvalidInputError
        The shapes do not fit together, or a number is not finite.
    """
    if weights.ndim != 2 or weights.shape[0] < 1 or bias.shape != weights.shape[:1]:
        raise InvalidInputError(
            "a classifier has weights [n_classes, n_bits] and bias [n_classes], not "
            f"{list(weights.shape)} and {list(bias.shape)}.",
            field="weights",
        )
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise InvalidInputError("the classifier holds NaN or infinity.", field="weights")
    values = weights.astype(np.float64)
    centred = values - values.mean(axis=0)
    # Below this a difference is rounding: all classes have the same weight.
    noise = 1e-6 * np.abs(values).max(axis=0, initial=0.0)
    return tuple(
        _meaning(
            bit, column, floor=max(CLEAR_SHARE * float(np.abs(column).max()), float(noise[bit]))
        )
        for bit, column in enumerate(centred.T)
    )


def _meaning(bit: int, column: NDArray[np.float64], *, floor: float) -> BitMeaning:
    # Stable, so that equal weights stay in the order of the classes.
    strongest_first = np.argsort(-np.abs(column), kind="stable")
    clear = [int(c) for c in strongest_first if abs(column[c]) >= floor and column[c] != 0]
    return BitMeaning(
        bit=bit,
        fires_for=tuple(c for c in clear if column[c] > 0),
        silent_for=tuple(c for c in clear if column[c] < 0),
        weights=tuple(column.tolist()),
    )
