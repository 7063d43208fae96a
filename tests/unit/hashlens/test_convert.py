"""Messages to values and back; and every malformed message refused where it is malformed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import codes, convert
from hashlens.errors import InvalidInputError
from hashlens.types import (
    Classifier,
    CollectionInfo,
    CollectionSpec,
    Embedding,
    EncodeTimings,
    ExplainedBit,
    Explanation,
    FeatureDtype,
    Hit,
    Item,
    ModelInfo,
    Prediction,
    Query,
    Rank,
    Receipt,
    ReplicaInfo,
    ReplyExplanation,
    SearchOptions,
    SearchResult,
    StageTimings,
    TagFilter,
)
from hashlens.v1 import embedding_pb2 as epb
from hashlens.v1 import search_service_pb2 as spb

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "data" / "golden" / "features.json").read_text("utf-8")
)


def same(left: Any, right: Any) -> bool:
    """Compare values that may hold arrays."""
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


finite = st.floats(-60000, 60000, width=16)


@st.composite
def embeddings(draw: st.DrawFn) -> Embedding:
    n_bits = draw(st.integers(1, codes.MAX_BITS))
    bits = np.array(draw(st.lists(st.booleans(), min_size=n_bits, max_size=n_bits)))
    dtype = draw(st.sampled_from(FeatureDtype))
    values = draw(st.none() | st.lists(finite, min_size=1, max_size=20))
    sure = draw(st.booleans())
    return Embedding(
        code=codes.pack(bits).tobytes(),
        n_bits=n_bits,
        model_id=draw(st.text(max_size=10)),
        feature=None if values is None else np.array(values, dtype=dtype.numpy),
        activations=np.linspace(0, 1, n_bits, dtype=np.float32) if sure else None,
    )


@given(embedding=embeddings())
def test_embedding_round_trip(embedding: Embedding) -> None:
    message = epb.Embedding.FromString(convert.embedding_to_proto(embedding).SerializeToString())
    assert same(convert.embedding_from_proto(message), embedding)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["dtype"])
def test_features_on_the_wire_are_the_golden_bytes(case: dict[str, Any]) -> None:
    feature = np.array(case["values"], dtype=FeatureDtype(case["dtype"]).numpy)
    message = convert.feature_to_proto(feature)
    assert message.values.hex() == case["hex"]
    assert same(convert.feature_from_proto(message), feature)


counts = st.integers(0, 2**62)
timings = st.builds(
    EncodeTimings,
    decode_ns=counts,
    queue_ns=counts,
    inference_ns=counts,
    total_ns=counts,
    batch_items=st.integers(0, 1000),
)
small = st.integers(0, 512)
certainties = st.lists(st.floats(0, 0.5, width=32), max_size=3).map(tuple)
predictions = st.none() | st.builds(
    Prediction, class_index=small, probability=st.floats(0, 1, width=32)
)
hits = st.builds(
    Hit,
    id=st.text(min_size=1, max_size=5),
    hamming_bits=small,
    distance=st.none() | st.floats(0, 1e6, width=32),
    payload=st.binary(max_size=5),
    code=st.none() | st.binary(min_size=6, max_size=6),
    feature=st.none() | st.just(np.array([1.5, -2], dtype=np.float16)),
    explanation=st.none()
    | st.builds(
        Explanation,
        differing_bits=st.lists(small, max_size=3).map(tuple),
        certainty=certainties,
        prediction=predictions,
    ),
)
some = st.lists(small, max_size=3).map(tuple)
reply_explanations = st.builds(
    ReplyExplanation,
    code=st.binary(min_size=6, max_size=6),
    certainty=certainties,
    prediction=predictions,
    bits=st.lists(st.builds(ExplainedBit, bit=small, fires_for=some, silent_for=some)).map(tuple),
    classes=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    detail=st.text(max_size=5),
)
receipts = st.builds(
    Receipt,
    rows_scanned=counts,
    threshold_bits=small,
    pool_size=counts,
    pool_histogram=st.lists(counts, max_size=4).map(tuple),
    pool_truncated=st.booleans(),
    rows_without_feature=counts,
    exact=st.booleans(),
    version=counts,
    timings=st.builds(
        StageTimings,
        wait_version_ns=counts,
        encode=timings,
        encode_call_ns=counts,
        queue_ns=counts,
        coarse_ns=counts,
        fine_ns=counts,
        fetch_ns=counts,
        total_ns=counts,
    ),
    margins_used=st.booleans(),
)


@given(
    result=st.builds(
        SearchResult,
        hits=st.lists(hits, max_size=3).map(tuple),
        receipt=receipts,
        explanation=st.none() | reply_explanations,
    )
)
def test_result_round_trip(result: SearchResult) -> None:
    message = spb.SearchResponse.FromString(convert.result_to_proto(result, 48).SerializeToString())
    assert same(convert.result_from_proto(message), result)


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60)
conditions = st.sets(words, max_size=4).map(lambda tags: tuple(sorted(tags, key=str.encode)))
filters = st.builds(TagFilter, any=conditions, all=conditions, none=conditions)


@given(wanted=filters)
def test_filter_round_trip(wanted: TagFilter) -> None:
    message = convert.filter_to_proto(wanted)
    assert (message is None) == wanted.is_empty
    assert message is None or convert.filter_from_proto(message) == wanted
    shuffled = spb.TagFilter(
        any=wanted.any[::-1] * 2, all=wanted.all[::-1] * 2, none=wanted.none[::-1] * 2
    )
    assert convert.filter_from_proto(shuffled) == (None if wanted.is_empty else wanted)


@given(
    options=st.builds(
        SearchOptions,
        k=st.integers(1, 1000),
        max_hamming_bits=st.none() | small,
        min_pool=small,
        max_pool=st.none() | st.integers(1000, 10**6),
        rank=st.sampled_from(Rank),
        with_payload=st.booleans(),
        with_code=st.booleans(),
        with_feature=st.booleans(),
        with_explanation=st.booleans(),
        min_version=counts,
        ignore_margins=st.booleans(),
        filter=st.none() | filters.filter(lambda wanted: not wanted.is_empty),
    )
)
def test_options_round_trip(options: SearchOptions) -> None:
    assert convert.options_from_proto(convert.options_to_proto(options)) == options


MODEL = ModelInfo(
    "m",
    "alexnet",
    48,
    4096,
    ("cat", "dog"),
    {"resize": 256.0, "mean": [0.5, 0.5, 0.5]},
    {"accuracy": 0.9},
    "MIT",
    1,
    2,
    3,
    4,
    FeatureDtype.F16,
    "cpu",
)
CLASSIFIER = Classifier(
    np.arange(96, dtype=np.float32).reshape(2, 48), np.array([1, -1], dtype=np.float32)
)

SPEC = CollectionSpec(name="a-1", model_id="m", n_bits=48, dim=3, feature_dtype=FeatureDtype.F32)


@pytest.mark.parametrize(
    ("value", "there", "back"),
    [
        (SPEC, convert.spec_to_proto, convert.spec_from_proto),
        (
            CollectionInfo(SPEC, "e", 7, 5, 2, 6, "always", False, "why"),
            convert.info_to_proto,
            convert.info_from_proto,
        ),
        (
            ReplicaInfo("r", "host:1", 7, 5, 1200, True),
            convert.replica_to_proto,
            convert.replica_from_proto,
        ),
        (MODEL, convert.model_to_proto, convert.model_from_proto),
        (
            dataclasses.replace(MODEL, classifier=CLASSIFIER),
            convert.model_to_proto,
            convert.model_from_proto,
        ),
        (Item(id="é/1", image=b"\x89PNG", payload=b"x"), convert.item_to_proto, None),
        (Query(image=b"x"), convert.query_to_proto, convert.query_from_proto),
        (Query(id="x"), convert.query_to_proto, convert.query_from_proto),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_round_trips(
    value: Any, there: Callable[[Any], Any], back: Callable[[Any], Any] | None
) -> None:
    assert same((back or convert.item_from_proto)(there(value)), value)


def test_classifiers_are_compared_by_their_numbers() -> None:
    again = Classifier(CLASSIFIER.weights.copy(), CLASSIFIER.bias.copy())
    other = Classifier(CLASSIFIER.weights, CLASSIFIER.bias + 1)
    assert again == CLASSIFIER
    assert hash(again) == hash(CLASSIFIER)
    assert other != CLASSIFIER
    assert CLASSIFIER != "classifier"


@pytest.mark.parametrize(
    ("weights", "bias"),
    [
        (np.zeros(95), np.zeros(2)),
        (np.zeros(96), np.zeros(3)),
        (np.full(96, np.nan), np.zeros(2)),
        (np.zeros(96), np.array([0, np.inf])),
    ],
)
def test_a_classifier_that_fits_no_model_is_refused(weights: np.ndarray, bias: np.ndarray) -> None:
    message = convert.model_to_proto(MODEL)
    message.classifier.weights = weights.astype("<f4").tobytes()
    message.classifier.bias = bias.astype("<f4").tobytes()
    with pytest.raises(InvalidInputError) as caught:
        convert.model_from_proto(message)
    assert caught.value.field == "classifier"


def good_embedding() -> epb.Embedding:
    return convert.embedding_to_proto(
        Embedding(
            code=b"\x01\x02",
            n_bits=12,
            model_id="m",
            feature=np.array([1, 2], dtype=np.float32),
            activations=np.full(12, 0.5, dtype=np.float32),
        )
    )


def spoil(path: str, value: Any) -> Callable[[epb.Embedding], None]:
    def change(message: Any) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda message: message.ClearField("code"), "code"),
        (spoil("code.n_bits", 0), "code.n_bits"),
        (spoil("code.n_bits", 513), "code.n_bits"),
        (spoil("code.bits", b"\x01"), "code.bits"),
        (spoil("code.bits", b"\x01\x02\x03"), "code.bits"),
        (spoil("code.bits", b"\x01\x12"), "code.bits"),
        (spoil("feature.dtype", 0), "feature.dtype"),
        (spoil("feature.dtype", 9), "feature.dtype"),
        (spoil("feature.dim", 0), "feature.dim"),
        (spoil("feature.dim", 3), "feature.values"),
        (spoil("feature.dim", 70000), "feature.dim"),
        (spoil("feature.values", b"\x00" * 7), "feature.values"),
        (spoil("feature.values", np.array([1, math.nan], "<f4").tobytes()), "feature.values"),
        (spoil("feature.values", np.array([math.inf, 1], "<f4").tobytes()), "feature.values"),
        (spoil("activations.values", b"\x00" * 44), "activations.values"),
        (spoil("activations.values", np.full(12, 1.5, "<f4").tobytes()), "activations.values"),
        (spoil("activations.values", np.full(12, math.nan, "<f4").tobytes()), "activations.values"),
    ],
)
def test_a_malformed_embedding_is_refused_at_its_field(
    change: Callable[[epb.Embedding], None], field: str
) -> None:
    message = good_embedding()
    convert.embedding_from_proto(message)
    change(message)
    with pytest.raises(InvalidInputError) as caught:
        convert.embedding_from_proto(message)
    assert caught.value.field == field
    assert caught.value.message


def test_every_half_number_is_told_finite_or_not() -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view("<f2")
    finite = np.isfinite(numbers)
    feature = convert.feature_to_proto(numbers[finite])
    assert np.array_equal(convert.feature_from_proto(feature), numbers[finite])
    for number in numbers[~finite]:
        with pytest.raises(InvalidInputError, match="number 1 is not finite"):
            convert.feature_from_proto(
                convert.feature_to_proto(np.array([0, number, 1], dtype="<f2"))
            )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (spb.SearchOptions(k=0), "k"),
        (spb.SearchOptions(k=100_001), "k"),
        (spb.SearchOptions(k=10, max_pool=9), "max_pool"),
        (spb.SearchOptions(k=10, rank=7), "rank"),  # type: ignore[arg-type]
        (spb.SearchOptions(k=10, filter=spb.TagFilter(any=[""])), "filter.any[0]"),
        (spb.SearchOptions(k=10, filter=spb.TagFilter(none=["a"] * 65)), "filter.none"),
    ],
)
def test_impossible_options_are_refused(message: spb.SearchOptions, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        convert.options_from_proto(message)
    assert caught.value.field == field


@pytest.mark.parametrize("item_id", ["", "a" * 1025, "é" * 513, "a\nb", "a\x00", "\x7f"])
def test_bad_ids_are_refused(item_id: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        convert.item_from_proto(spb.Item(id=item_id, image=b"x"))
    assert caught.value.field == "id"


@pytest.mark.parametrize("name", ["", "A", "a" * 65, "../x", "-a", "a b", "a{b}", "é"])
def test_bad_collection_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        convert.check_collection_name(name)


def test_an_item_needs_content_and_a_bounded_payload() -> None:
    with pytest.raises(InvalidInputError) as caught:
        convert.item_from_proto(spb.Item(id="a"))
    assert caught.value.field == "content"
    with pytest.raises(InvalidInputError) as caught:
        convert.item_from_proto(spb.Item(id="a", image=b"x", payload=bytes(65_537)))
    assert caught.value.field == "payload"


def test_a_query_needs_a_kind() -> None:
    with pytest.raises(InvalidInputError):
        convert.query_from_proto(spb.Query())


@pytest.mark.parametrize("probability", [float("nan"), -0.5, 1.5, float("inf")])
def test_an_impossible_probability_is_refused(probability: float) -> None:
    prediction = spb.Prediction(class_index=0, probability=probability)
    for reply in (
        spb.SearchResponse(explanation=spb.ReplyExplanation(prediction=prediction)),
        spb.SearchResponse(hits=[spb.Hit(explanation=spb.Explanation(prediction=prediction))]),
    ):
        with pytest.raises(InvalidInputError) as caught:
            convert.result_from_proto(reply)
        assert caught.value.field == "prediction.probability"


@pytest.mark.parametrize("margin", [float("nan"), -0.1, 0.6])
def test_an_impossible_certainty_is_refused(margin: float) -> None:
    for reply in (
        spb.SearchResponse(explanation=spb.ReplyExplanation(certainty=[0.1, margin])),
        spb.SearchResponse(hits=[spb.Hit(explanation=spb.Explanation(certainty=[margin]))]),
    ):
        with pytest.raises(InvalidInputError) as caught:
            convert.result_from_proto(reply)
        assert caught.value.field == "certainty"
