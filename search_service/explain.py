"""Why an answer is what it is: the bits that differ, what they mean, the classes a model sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.bits import bit_meanings
from hashlens.types import (
    Classifier,
    Embedding,
    ExplainedBit,
    Explanation,
    ModelInfo,
    Prediction,
    ReplyExplanation,
)
from search_service.cancel import Cancel

MAX_NAMED = 8
"""Most classes that one bit is said to speak for, and against; the contract says so."""

MAX_CLASSIFIER_BYTES = 2**20
"""What the contract allows. A larger one would hold up the searches meanwhile."""

_BLOCK_ROWS = 4096
"""Codes classified between two looks at the cancel flag; 512 bits and 1000 classes take 0.1 s."""


@dataclass(frozen=True, slots=True, eq=False)
class Meanings:
    """What a model's classifier makes of codes, or why that is not known."""

    classifier: Classifier | None = None
    classes: tuple[str, ...] = ()
    """Empty without a classifier, as are `bits`."""
    bits: tuple[ExplainedBit, ...] = ()
    """One for each bit of the code."""
    detail: str = "No classifier was given."
    """Why there is no classifier; else empty."""

    @classmethod
    def of(cls, model: ModelInfo) -> Self:
        """Read a model's classifier; InvalidInputError if it is none."""
        classifier = model.classifier
        if classifier is None or classifier.weights.nbytes > MAX_CLASSIFIER_BYTES:
            return cls(detail="The model's classifier is too large to be sent along.")
        return cls(
            classifier,
            model.classes,
            tuple(
                ExplainedBit(
                    meaning.bit, meaning.fires_for[:MAX_NAMED], meaning.silent_for[:MAX_NAMED]
                )
                for meaning in bit_meanings(classifier.weights, classifier.bias)
            ),
            detail="",
        )


def explain_query(query: Embedding, meanings: Meanings) -> ReplyExplanation:
    """Say what is known of a query's code.

    Parameters
    ----------
    query
        The query; its activations, if it has them, are what is classified, else its code.
    meanings
        Of the model that made it.
    """
    activations = query.activations
    seen = _bits_of(query) if activations is None else activations
    (prediction,) = _predict(seen[np.newaxis], meanings)
    return ReplyExplanation(
        code=query.code,
        certainty=() if activations is None else tuple(_certainty(activations)),
        prediction=prediction,
        bits=meanings.bits,
        classes=meanings.classes,
        detail=meanings.detail,
    )


def explain_hits(
    query: Embedding, packed: NDArray[np.uint8], meanings: Meanings, cancel: Cancel
) -> list[Explanation]:
    """Say of each hit which bits differ from the query's, and which class its code is.

    Parameters
    ----------
    query
        The query.
    packed
        Codes of the hits: uint8, shape ``[n, n_bytes]``.
    meanings
        Of the model that made them.
    cancel
        Polled between blocks.

    Returns
    -------
    list of Explanation
        One per hit.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    asked = _bits_of(query)
    certainty = None if query.activations is None else _certainty(query.activations)
    explanations = []
    for lo in range(0, packed.shape[0], _BLOCK_ROWS):
        cancel.check()
        bits = codes.unpack(packed[lo : lo + _BLOCK_ROWS], query.n_bits)
        for row, prediction in zip(bits, _predict(bits, meanings), strict=True):
            differing = np.flatnonzero(row != asked).tolist()
            explanations.append(
                Explanation(
                    tuple(differing),
                    () if certainty is None else tuple(certainty[bit] for bit in differing),
                    prediction,
                )
            )
    return explanations


def _bits_of(query: Embedding) -> NDArray[np.bool_]:
    return codes.unpack(np.frombuffer(query.code, dtype=np.uint8), query.n_bits)


def _certainty(activations: NDArray[np.float32]) -> list[float]:
    """Return |H - 0.5| of each bit, 0 to 0.5."""
    certainty: list[float] = np.abs(activations - np.float32(0.5)).tolist()
    return certainty


def _predict(
    activations: NDArray[np.float32] | NDArray[np.bool_], meanings: Meanings
) -> list[Prediction | None]:
    """Return the likeliest class for each row of H or of bits, shape ``[n, n_bits]``."""
    classifier = meanings.classifier
    if classifier is None:
        return [None] * activations.shape[0]
    # In float64 no finite weights overflow.
    scores = activations.astype(np.float64) @ classifier.weights.T.astype(np.float64)
    scores += classifier.bias
    likeliest = scores.argmax(axis=1)
    best = scores.max(axis=1, keepdims=True)
    probability = 1 / np.exp(scores - best).sum(axis=1)
    return [
        Prediction(class_index, share)
        for class_index, share in zip(likeliest.tolist(), probability.tolist(), strict=True)
    ]
