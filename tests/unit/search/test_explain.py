from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hashlens import codes
from hashlens.errors import CancelledError
from hashlens.types import (
    Classifier,
    Embedding,
    ExplainedBit,
    FeatureDtype,
    ModelInfo,
    Rank,
    SearchOptions,
)
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.explain import MAX_NAMED, Meanings, explain_hits, explain_query
from search_service.snapshot import Snapshot

MODEL = ModelInfo(
    model_id="m",
    backbone="alexnet",
    n_bits=3,
    dim=1,
    classes=("cat", "dog"),
    preprocessing={},
    metrics={},
    licence="",
    max_image_bytes=1,
    max_image_pixels=1,
    max_batch_items=1,
    max_message_bytes=1,
    feature_dtype=FeatureDtype.F32,
    device="cpu",
    classifier=Classifier(
        # Bit 0 is for cats, bit 1 for dogs, bit 2 for either.
        np.array([[2, 0, 1], [0, 4, 1]], dtype=np.float32),
        np.array([0.5, 0], dtype=np.float32),
    ),
)


def embedding(bits: str, activations: list[float] | None = None) -> Embedding:
    return Embedding(
        codes.pack(np.array([bit == "1" for bit in bits])).tobytes(),
        len(bits),
        "m",
        activations=None if activations is None else np.array(activations, dtype=np.float32),
    )


def share(score: float, other: float) -> float:
    return math.exp(score) / (math.exp(score) + math.exp(other))


def test_the_query_is_classified_by_h_where_it_is_there() -> None:
    meanings = Meanings.of(MODEL)
    soft = explain_query(embedding("100", [0.75, 0.5, 0.0]), meanings)
    assert soft.prediction is not None
    # cat: 2 * 0.75 + 0.5 = 2, dog: 4 * 0.5 = 2; the first of equals.
    assert soft.prediction.class_index == 0
    assert soft.prediction.probability == pytest.approx(0.5)
    assert soft.certainty == (0.25, 0.0, 0.5)
    hard = explain_query(embedding("110"), meanings)
    assert hard.prediction is not None
    assert hard.prediction.class_index == 1
    assert hard.prediction.probability == pytest.approx(share(4, 2.5))
    assert hard.certainty == ()
    assert hard.code == b"\x03"
    assert (hard.classes, hard.detail) == (("cat", "dog"), "")
    assert hard.bits == (
        ExplainedBit(0, (0,), (1,)),
        ExplainedBit(1, (1,), (0,)),
        ExplainedBit(2, (), ()),
    )


def test_hits_are_classified_by_their_codes() -> None:
    packed = np.array([[0b001], [0b010], [0b111]], dtype=np.uint8)
    query = embedding("101", [0.9, 0.4, 0.5])
    first, second, third = explain_hits(query, packed, Meanings.of(MODEL), Cancel())
    assert [first.differing_bits, second.differing_bits, third.differing_bits] == [
        (2,),
        (0, 1, 2),
        (1,),
    ]
    assert second.certainty == pytest.approx((0.4, 0.1, 0.0))
    found = [e.prediction for e in (first, second, third) if e.prediction is not None]
    assert [p.class_index for p in found] == [0, 1, 1]
    assert [p.probability for p in found] == pytest.approx(
        [share(2.5, 0), share(4, 0.5), share(5, 3.5)]
    )


def test_without_a_classifier_the_bits_still_differ() -> None:
    unknown = Meanings.of(replace(MODEL, classifier=None))
    assert "too large" in unknown.detail
    packed = np.array([[0b001]], dtype=np.uint8)
    (hit,) = explain_hits(embedding("000"), packed, unknown, Cancel())
    assert (hit.differing_bits, hit.certainty, hit.prediction) == ((0,), (), None)
    query = explain_query(embedding("000", [0, 0, 0.5]), unknown)
    assert (query.prediction, query.bits, query.classes) == (None, (), ())
    assert query.certainty == (0.5, 0.5, 0.0)
    assert query.detail == unknown.detail


def test_scores_too_large_for_an_exponential_are_no_trouble() -> None:
    assert MODEL.classifier is not None
    huge = Classifier(MODEL.classifier.weights * np.float32(5e37), MODEL.classifier.bias)
    meanings = Meanings.of(replace(MODEL, classifier=huge))
    prediction = explain_query(embedding("111"), meanings).prediction
    assert prediction is not None
    assert (prediction.class_index, prediction.probability) == (1, 1.0)


def test_of_many_classes_the_strongest_are_named() -> None:
    n_classes = 100
    weights = np.repeat([[1.0], [-1.0]], n_classes // 2, axis=0).astype(np.float32)
    weights[70] = -1.5
    model = replace(
        MODEL,
        n_bits=1,
        classes=tuple(map(str, range(n_classes))),
        classifier=Classifier(weights, np.zeros(n_classes, dtype=np.float32)),
    )
    (bit,) = Meanings.of(model).bits
    assert bit.fires_for == tuple(range(MAX_NAMED))
    assert bit.silent_for == (70, *range(50, 50 + MAX_NAMED - 1))


def test_classifying_many_hits_can_be_stopped() -> None:
    cancel = Cancel()
    cancel.set()
    with pytest.raises(CancelledError):
        explain_hits(embedding("000"), np.zeros((1, 1), dtype=np.uint8), Meanings.of(MODEL), cancel)


def test_the_engine_explains_what_it_is_asked_to() -> None:
    rng = np.random.default_rng(0)
    packed = codes.pack(rng.random((50, 3)) < 0.5)
    snapshot = Snapshot.from_arrays(packed, n_bits=3)
    query = embedding("010", [0.1, 0.9, 0.45])
    options = SearchOptions(k=50, rank=Rank.HAMMING, with_explanation=True)
    meanings = Meanings.of(MODEL)
    result = Engine().search(snapshot, query, options, meanings=meanings)
    assert result.explanation == explain_query(query, meanings)
    rows = np.array([int(hit.id) for hit in result.hits])
    want = explain_hits(query, packed[rows], meanings, Cancel())
    assert [hit.explanation for hit in result.hits] == want
    plain = Engine().search(snapshot, query, replace(options, with_explanation=False))
    assert plain.explanation is None
    assert [hit.id for hit in plain.hits] == [hit.id for hit in result.hits]
    unknown = Engine().search(snapshot, query, options).explanation
    assert unknown is not None
    assert unknown.detail
