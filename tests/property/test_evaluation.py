from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import evaluation, ties
from tests.reference import evaluation as slow

rankings = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)
depths = st.integers(1, 15)
tied = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6)


@given(rankings, depths)
def test_precision(ranked: list[list[bool]], k: int) -> None:
    got = evaluation.precision_at(np.array(ranked), k)
    assert got == pytest.approx([float(slow.precision_at(one, k)) for one in ranked])


@given(rankings, st.lists(depths, min_size=1, max_size=4))
def test_precision_curve(ranked: list[list[bool]], ks: list[int]) -> None:
    got = evaluation.precision_curve(np.array(ranked), ks)
    want = [[float(slow.precision_at(one, k)) for k in ks] for one in ranked]
    assert got == pytest.approx(np.array(want))


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


@given(rankings)
def test_precision_at_recall(ranked: list[list[bool]]) -> None:
    levels = [Fraction(i, 20) for i in range(21)]
    got = evaluation.precision_at_recall(np.array(ranked), np.linspace(0, 1, 21))
    want = [[float(slow.precision_at_recall(one, level)) for level in levels] for one in ranked]
    assert got == pytest.approx(np.array(want))


@given(tied, st.integers(0, 2))
def test_precision_within(items: list[tuple[int, bool]], radius: int) -> None:
    distances, relevant = ([item[i] for item in items] for i in (0, 1))
    got = evaluation.precision_within(np.array([distances]), np.array([relevant]), radius)
    assert got == pytest.approx([float(slow.precision_within(distances, relevant, radius))])


@given(tied, st.none() | st.integers(1, 7), st.none() | st.integers(0, 2))
def test_tie_aware_equals_the_mean_over_all_orders(
    items: list[tuple[int, bool]], k: int | None, n_missed: int | None
) -> None:
    distances, relevant = ([item[i] for item in items] for i in (0, 1))
    n_relevant = None if n_missed is None else sum(relevant) + n_missed
    got = ties.tie_aware_average_precision(
        np.array([distances]),
        np.array([relevant]),
        k,
        None if n_relevant is None else np.array([n_relevant]),
    )
    want = slow.tie_aware_average_precision(distances, relevant, k, n_relevant)
    assert got == pytest.approx([float(want)])


@given(tied, st.integers(1, 7))
def test_tie_aware_precision_equals_the_mean_over_all_orders(
    items: list[tuple[int, bool]], k: int
) -> None:
    distances, relevant = ([item[i] for item in items] for i in (0, 1))
    got = ties.tie_aware_precision_at(np.array([distances]), np.array([relevant]), k)
    assert got == pytest.approx([float(slow.tie_aware_precision_at(distances, relevant, k))])


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    st.none() | st.integers(1, 10),
)
def test_histograms_say_as_much_as_distances(
    queries: list[list[tuple[int, bool]]], k: int | None
) -> None:
    distances = np.array([[d for d, _ in one] for one in queries])
    relevant = np.array([[r for _, r in one] for one in queries])
    levels = np.arange(5)
    counts = (distances[:, :, np.newaxis] == levels).sum(axis=1)
    hits = ((distances[:, :, np.newaxis] == levels) & relevant[:, :, np.newaxis]).sum(axis=1)
    groups = ties.TieGroups.of_histograms(counts, hits)
    want = ties.tie_aware_average_precision(distances, relevant, k)
    assert groups.average_precision(k) == pytest.approx(want)
    assert groups.precision_at(k or 3) == pytest.approx(
        ties.tie_aware_precision_at(distances, relevant, k or 3)
    )


@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.none() | st.integers(1, 50),
    st.randoms(use_true_random=False),
)
def test_tie_aware_without_ties_is_plain(
    relevant: list[bool], k: int | None, random: np.random.Generator
) -> None:
    by_rank = list(range(len(relevant)))
    random.shuffle(by_rank)  # item i has rank by_rank[i]
    shuffled = [relevant[rank] for rank in by_rank]
    got = ties.tie_aware_average_precision(np.array([by_rank]), np.array([shuffled]), k)
    assert got == pytest.approx(evaluation.average_precision(np.array([relevant]), k))
