"""Rankings against their slow twins, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder_service.evaluation import baselines, rankings
from encoder_service.evaluation.encodings import Encodings, n_distinct
from encoder_service.evaluation.evaluate import evaluate_encodings
from encoder_service.evaluation.local import flat, quick_map
from encoder_service.evaluation.rankings import RANKINGS, Task, score, soft_weights
from hashlens import codes, evaluation, ties
from hashlens.errors import InvalidInputError
from hashlens.types import Embedding, SearchOptions
from search_service.engine import Engine
from search_service.snapshot import Snapshot
from tests.reference import evaluation as slow

CLASSES = ("a", "b", "c")


def make_encodings(
    n: int, *, n_bits: int = 12, dim: int = 3, seed: int = 0, several: bool = False
) -> Encodings:
    """Make codes and features of few values, so that much is tied; labels that both follow."""
    rng = np.random.default_rng(seed)
    labels: NDArray[Any] = rng.integers(0, 3, n)
    centres = np.random.default_rng(99)
    bits = centres.random((3, n_bits))[labels] + rng.normal(0, 0.3, (n, n_bits)) > 0.5
    features = centres.integers(0, 4, (3, dim))[labels] + rng.integers(0, 3, (n, dim))
    activations = np.clip(bits * 0.5 + rng.random((n, n_bits)).round(1) / 2, 0, 1)
    if several:
        labels = (labels[:, np.newaxis] == np.arange(3)) | (rng.random((n, 3)) < 0.2)
    return Encodings(
        codes.pack(bits),
        n_bits,
        features.astype(np.float16),
        labels,
        activations.astype(np.float32),
        None if several else rng.integers(0, 3, n),
    )


def parts_of(encodings: Encodings, row: int) -> tuple[list[bool], list[float], list[float]]:
    assert encodings.activations is not None
    return (
        codes.unpack(encodings.codes[row], encodings.n_bits).tolist(),
        encodings.activations[row].astype(float).tolist(),
        encodings.features[row].astype(float).tolist(),
    )


@pytest.mark.parametrize("n_bits", [12, 70])
@pytest.mark.parametrize("own", [True, False], ids=["among themselves", "two sets"])
def test_every_ranking_is_its_slow_twins(
    n_bits: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rankings, "MIN_POOL", 9)
    monkeypatch.setattr(rankings, "_BLOCK_KEYS", 150)  # several blocks
    database = make_encodings(47, n_bits=n_bits)
    queries = database if own else make_encodings(11, n_bits=n_bits, seed=5)
    own_rows = np.arange(47) if own else None
    found = score(Task(database, queries, own_rows), n_nearest=47)
    assert list(found) == ["coarse", "coarse_soft", "two_stage", "exhaustive"]
    rows = [parts_of(database, row)[::2] for row in range(47)]
    for name, scores in found.items():
        want = [
            slow.ranking(name, parts_of(queries, q), rows, q if own else None, 9)
            for q in range(len(queries))
        ]
        assert scores.nearest.tolist() == want, name


def test_the_scores_are_those_of_the_ranking() -> None:
    database, queries = make_encodings(1500), make_encodings(20, seed=3)
    task, _ = Task(database, queries).with_floors(np.random.default_rng(0))
    found = score(task, n_nearest=1500)
    assert list(found) == list(RANKINGS)
    words, asked = codes.as_words(database.codes), codes.as_words(queries.codes)
    hamming = np.bitwise_count(words[0] ^ asked[0][:, np.newaxis]).astype(int)
    relevant = queries.labels[:, np.newaxis] == database.labels
    for name, scores in found.items():
        ranked = np.take_along_axis(relevant, scores.nearest[:, :1000].astype(np.int64), axis=1)
        assert scores.ap_at_1000 == pytest.approx(evaluation.average_precision(ranked, 1000)), name
        assert scores.precision[:, 3] == pytest.approx(evaluation.precision_at(ranked, 10)), name
        n_relevant = relevant.sum(axis=1)
        assert scores.n_relevant.tolist() == n_relevant.tolist()
        over_all = evaluation.average_precision(ranked, 1000, n_relevant)
        assert scores.ap_at_1000_over_all == pytest.approx(over_all), name
    coarse = found["coarse"]
    full = ties.tie_aware_average_precision(hamming, relevant)
    assert coarse.tie_aware_ap_full == pytest.approx(full)
    cut = ties.tie_aware_average_precision(hamming, relevant, 1000)
    assert coarse.tie_aware_ap_at_1000 == pytest.approx(cut)
    at_10 = ties.tie_aware_precision_at(hamming, relevant, 10)
    assert coarse.tie_aware_precision_at_10 == pytest.approx(at_10)
    within = evaluation.precision_within(hamming, relevant, 2)
    assert coarse.precision_radius_2 == pytest.approx(within)
    assert found["two_stage"].precision_radius_2 == pytest.approx(within)
    assert np.isnan(found["exhaustive"].precision_radius_2).all()


def test_soft_weights_are_whole_numbers_from_0_to_255() -> None:
    given = np.array([0, 0.25, 0.5, 0.5 + 1 / 510, 1], np.float32)
    assert soft_weights(given).tolist() == [255, 128, 0, 1, 255]


def test_several_labels() -> None:
    database = make_encodings(60, several=True)
    result = evaluate_encodings(database, protocol="split", classes=CLASSES)
    relevant = (database.labels[:, np.newaxis] & database.labels).any(axis=2)
    np.fill_diagonal(relevant, False)
    nearest = result.nearest["two_stage"].astype(np.int64)
    want = np.take_along_axis(relevant, nearest[:, :10], axis=1).mean()
    assert result.rankings["two_stage"].precision_at_10 == pytest.approx(want)
    assert result.accuracy is None
    assert result.confusion is None
    by_class = {name: one.n_queries for name, one in result.by_class.items()}
    assert by_class == dict(zip(CLASSES, database.labels.sum(axis=0).tolist(), strict=True))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("n", [2, 300])
def test_quick_map_is_the_full_tie_aware_one(several: bool, n: int) -> None:
    database = make_encodings(n, several=several)
    got = quick_map(database.codes, database.labels, database.n_bits)
    full = score(Task(database, database, np.arange(n)), ["coarse"])["coarse"].tie_aware_ap_full
    assert got == pytest.approx(full.mean())


def test_quick_map_needs_two_images() -> None:
    with pytest.raises(InvalidInputError, match="2 images or more"):
        quick_map(np.zeros((1, 2), np.uint8), np.zeros(1, np.int64), 12)


def clustered(n: int, dim: int, rng: np.random.Generator) -> tuple[Encodings, NDArray[np.int64]]:
    labels = rng.integers(0, 3, n)
    features = np.maximum(rng.normal(0, 3, (3, dim))[labels] + rng.normal(0, 1, (n, dim)), 0)
    packed = codes.pack(rng.random((n, 24)) > 0.5)
    return Encodings(packed, 24, features.astype(np.float16), labels), labels


def test_the_floors_find_clusters_that_random_codes_do_not() -> None:
    database, _ = clustered(400, 40, np.random.default_rng(4))
    result = evaluate_encodings(database, protocol="split", classes=CLASSES)
    found = {name: one.map_full for name, one in result.rankings.items()}
    assert list(found) == ["coarse", "two_stage", "exhaustive", "lsh", "itq"]  # no activations
    assert found["coarse"] < 0.4 < 0.6 < found["lsh"] < 1
    assert found["itq"] > found["lsh"] - 0.05
    assert not result.notes[1:]  # only that there are fewer than 1000 images


def test_itq_quantises_better_than_unrotated_directions() -> None:
    rng = np.random.default_rng(5)
    features = rng.normal(0, 1, (2000, 6)) * np.array([9, 5, 3, 2, 1, 0.5])
    learned = baselines.itq(features, 6, rng)
    assert learned.n_filled == 0
    projected = (features - learned.centre) @ learned.normals
    # A rotation keeps all of the variance, and shares it among the bits.
    total = features.var(axis=0).sum()
    assert projected.var(axis=0).sum() == pytest.approx(total, rel=1e-3)
    assert projected.var(axis=0).max() < 0.6 * total < features.var(axis=0).max()
    assert n_distinct(learned.encode(features)) > 20


@pytest.mark.parametrize(("dim", "n", "n_filled"), [(3, 100, 9), (40, 5, 8), (20, 1, 12)])
def test_itq_fills_up_where_there_are_no_directions(dim: int, n: int, n_filled: int) -> None:
    rng = np.random.default_rng(6)
    features = rng.random((n, dim)).astype(np.float16)
    learned = baselines.itq(features, 12, rng)
    assert learned.normals.shape == (dim, 12)
    assert learned.n_filled == n_filled
    assert learned.encode(features).shape == (n, 2)


def test_a_note_says_which_itq_bits_are_random() -> None:
    result = evaluate_encodings(make_encodings(50), protocol="split", classes=CLASSES)
    assert any("9 of the 12 ITQ bits are random" in note for note in result.notes)


def test_what_the_json_holds() -> None:
    database, queries = make_encodings(1200), make_encodings(100, seed=1)
    result = evaluate_encodings(
        database, queries, protocol="lin2015", classes=CLASSES, checkpoint={"n_bits": 12}
    )
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (plain["protocol"], plain["n_queries"], plain["n_database"]) == ("lin2015", 100, 1200)
    assert plain["distinct_codes"] == len(np.unique(database.codes, axis=0))
    assert plain["accuracy"] == pytest.approx((queries.predicted == queries.labels).mean())
    for name in RANKINGS:
        one = plain[name]
        for metric in ("map_full", "map_at_1000", "precision_at_10"):
            low, high = one["ci95"][metric]
            assert low < one[metric] < high
        assert set(one["precision_curve"]) == {str(k) for k in rankings.DEPTHS}
        assert one["precision_curve"]["10"] == one["precision_at_10"]
        assert one["map_at_1000_over_all"] <= one["map_at_1000"] + 1e-12
        assert (one["precision_radius_2"] is None) == (name == "exhaustive")
    assert plain["coarse"]["tie_aware_map_full"] != plain["coarse"]["map_full"]
    assert np.array(plain["confusion_at_10"]).sum() == 1000
    assert sum(one["n_queries"] for one in plain["by_class"].values()) == 100
    found = flat(result)
    assert found["lin2015_two_stage_precision_at_10"] == plain["two_stage"]["precision_at_10"]


def test_the_seed_decides_everything() -> None:
    database = make_encodings(60, dim=20)
    first, again, other = (
        evaluate_encodings(database, protocol="split", classes=CLASSES, seed=seed).to_json()
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first["lsh"]["map_full"] != other["lsh"]["map_full"]
    assert first["coarse"]["map_full"] == other["coarse"]["map_full"]
    assert first["coarse"]["ci95"] != other["coarse"]["ci95"]


def test_some_of_the_images_ask() -> None:
    database = make_encodings(60)
    rows = np.array([3, 17, 40])
    some = evaluate_encodings(database, protocol="split", classes=CLASSES, query_rows=rows)
    every = evaluate_encodings(database, protocol="split", classes=CLASSES)
    assert some.n_queries == 3
    for name in ("coarse", "two_stage"):
        assert some.nearest[name].tolist() == every.nearest[name][rows].tolist()
        assert not (some.nearest[name] == rows[:, np.newaxis]).any()


def test_depths_beyond_the_database_are_left_out() -> None:
    result = evaluate_encodings(make_encodings(9), protocol="split", classes=CLASSES)
    coarse = result.rankings["coarse"]
    assert (coarse.precision_at_10, coarse.map_at_1000) == (None, None)
    assert set(coarse.precision_curve) == {1, 2, 5}
    assert any("Each query ranks only 8 images" in note for note in result.notes)
    assert not any("at_1000" in name or "at_10" in name for name in flat(result))


def test_what_was_served_decides_the_first_ranks() -> None:
    database = make_encodings(60)
    local = evaluate_encodings(database, protocol="split", classes=CLASSES)
    every = score(Task(database, database, np.arange(60)), n_nearest=59)["coarse"].nearest
    same = evaluate_encodings(database, protocol="split", classes=CLASSES, served={"coarse": every})
    assert same.served_agreement == {"coarse": 1.0}
    assert same.rankings["coarse"].precision_curve == pytest.approx(
        local.rankings["coarse"].precision_curve
    )
    worst = evaluate_encodings(
        database, protocol="split", classes=CLASSES, served={"coarse": every[:, ::-1]}
    )
    assert worst.served_agreement["coarse"] < 0.2
    at_10 = worst.rankings["coarse"].precision_at_10
    assert at_10 is not None
    assert at_10 < (local.rankings["coarse"].precision_at_10 or 0) - 0.2
    assert worst.rankings["coarse"].map_full == local.rankings["coarse"].map_full


def test_a_query_without_a_relevant_image_is_told() -> None:
    database = make_encodings(30)
    database.labels[0] = 1
    lonely = replace(database, labels=np.r_[2, np.zeros(29, np.int64)])
    result = evaluate_encodings(lonely, protocol="split", classes=CLASSES)
    assert any("counts as 0: 1." in note for note in result.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": np.zeros((30, 1), np.uint8)}, "2.* bytes"),
        ({"features": np.zeros((29, 3), np.float16)}, "29 features"),
        ({"activations": np.zeros((30, 11), np.float32)}, r"\[30, 12\]"),
        ({"features": np.full((30, 3), np.inf, np.float16)}, "float16"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        replace(make_encodings(30), **change)


def test_sets_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="same model"):
        evaluate_encodings(
            make_encodings(30), make_encodings(30, dim=4), protocol="lin2015", classes=CLASSES
        )
    with pytest.raises(InvalidInputError, match="2 of each"):
        evaluate_encodings(make_encodings(1), protocol="split", classes=CLASSES)


@pytest.mark.parametrize("dim", [1, 32, 100])
def test_near_ties_are_ordered_as_the_service_rounds(dim: int) -> None:
    rng = np.random.default_rng(8)
    features = rng.random((200, dim)).astype(np.float16)
    features[100:] = features[:100][:, rng.permutation(dim)]  # the same squares, added otherwise
    query = np.full((1, dim), 0.3, np.float16)
    database = Encodings(np.zeros((200, 1), np.uint8), 8, features, np.arange(200) % 3)
    asked = Encodings(np.zeros((1, 1), np.uint8), 8, query, np.zeros(1, np.int64))
    found = score(Task(database, asked), ["two_stage"], n_nearest=200)["two_stage"].nearest[0]
    snapshot = Snapshot.from_arrays(database.codes, n_bits=8, features=features)
    hits = (
        Engine()
        .search(
            snapshot,
            Embedding(code=b"\0", n_bits=8, model_id="", feature=query[0]),
            SearchOptions(k=200),
        )
        .hits
    )
    ids = [f"{row}" for row in found]
    # Ids order as text there: so where distances are equal, only the sets are.
    by_distance: dict[float | None, tuple[set[str], set[str]]] = {}
    for hit, ours in zip(hits, ids, strict=True):
        theirs, own = by_distance.setdefault(hit.distance, (set(), set()))
        theirs.add(hit.id)
        own.add(ours)
    assert all(theirs == own for theirs, own in by_distance.values())
    assert len(by_distance) < 200
    if dim == 100:
        assert len(by_distance) > 110  # many of the pairs are near, not tied
