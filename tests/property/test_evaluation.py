from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import evaluation
from tests.reference import evaluation as slow

rankings = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)
depths = st.integers(1, 15)


@given(rankings, depths)
def test_precision(ranked: list[list[bool]], k: int) -> None:
    got = evaluation.precision_at(np.array(ranked), k)
    assert got == pytest.approx([float(slow.precision_at(one, k)) for one in ranked])


@given(rankings, st.none() | depths)
def test_average_precision_over_what_was_found(ranked: list[list[bool]], k: int | None) -> None:
    got = evaluation.average_precision(np.array(ranked), k)
    assert got == pytest.approx([float(slow.average_precision(one, k)) for one in ranked])


@given(rankings, depths, st.integers(0, 5))
def test_average_precision_over_what_could_be_found(
    ranked: list[list[bool]], k: int, n_missed: int
) -> None:
    n_relevant = np.array([sum(one) + n_missed for one in ranked])
    got = evaluation.average_precision(np.array(ranked), k, n_relevant)
    want = [
        float(slow.average_precision(one, k, n)) for one, n in zip(ranked, n_relevant, strict=True)
    ]
    assert got == pytest.approx(want)
    assert (got <= evaluation.average_precision(np.array(ranked), k) + 1e-12).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_tie_aware_equals_the_mean_over_all_orders(items: list[tuple[int, bool]]) -> None:
    distances = [distance for distance, _ in items]
    relevant = [is_relevant for _, is_relevant in items]
    got = evaluation.tie_aware_average_precision(np.array([distances]), np.array([relevant]))
    want = float(slow.tie_aware_average_precision(distances, relevant))
    assert got == pytest.approx([want])


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_tie_aware_without_ties_is_full_average_precision(
    relevant: list[bool], random: np.random.Generator
) -> None:
    by_rank = list(range(len(relevant)))
    random.shuffle(by_rank)  # item i has rank by_rank[i]
    shuffled = [relevant[rank] for rank in by_rank]
    got = evaluation.tie_aware_average_precision(np.array([by_rank]), np.array([shuffled]))
    assert got == pytest.approx(evaluation.average_precision(np.array([relevant])))


def test_known_values() -> None:
    ranked = np.array([[True, False, True, False]])
    assert evaluation.precision_at(ranked, 2).tolist() == [0.5]
    assert evaluation.average_precision(ranked).tolist() == [pytest.approx((1 + 2 / 3) / 2)]
    assert evaluation.average_precision(ranked, 2).tolist() == [1.0]
    assert evaluation.average_precision(ranked, 2, np.array([2])).tolist() == [0.5]


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluation.precision_at(np.ones(3, dtype=bool), 1),
        lambda: evaluation.precision_at(np.ones((1, 3), dtype=bool), 0),
        lambda: evaluation.average_precision(np.ones((1, 3), dtype=bool), None, np.array([2])),
        lambda: evaluation.tie_aware_average_precision(
            np.zeros((1, 2)), np.ones((1, 3), dtype=bool)
        ),
    ],
)
def test_wrong_shapes_and_counts_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        call()
