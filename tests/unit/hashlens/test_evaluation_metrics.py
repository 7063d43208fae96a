"""Metrics against cases worked by hand, against scikit-learn, and where they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from hashlens import evaluation, ties

RANKED = np.array([[True, False, True, False]])


def test_by_hand() -> None:
    assert evaluation.precision_at(RANKED, 2).tolist() == [0.5]
    assert evaluation.precision_curve(RANKED, (1, 2, 3, 8)).tolist() == [[1, 0.5, 2 / 3, 0.25]]
    assert evaluation.average_precision(RANKED).tolist() == [pytest.approx((1 + 2 / 3) / 2)]
    # Two relevant items, the second beyond the cut: the author's mean is over the one found.
    assert evaluation.average_precision(RANKED, 2).tolist() == [1.0]
    assert evaluation.average_precision(RANKED, 2, np.array([2])).tolist() == [0.5]
    assert evaluation.precision_at_recall(RANKED, np.array([0, 0.5, 0.51, 1])).tolist() == [
        [1, 1, pytest.approx(2 / 3), pytest.approx(2 / 3)]
    ]


def test_an_empty_ball_counts_as_nothing_found() -> None:
    distances = np.array([[3, 4, 9], [2, 2, 3]])
    relevant = np.array([[True, True, True], [True, False, True]])
    assert evaluation.precision_within(distances, relevant, 2).tolist() == [0.0, 0.5]


def test_ties_by_hand() -> None:
    # One of two tied items is relevant: it is first or second, so the mean of 1 and 1/2.
    distances, relevant = np.array([[7, 7]]), np.array([[True, False]])
    assert ties.tie_aware_average_precision(distances, relevant).tolist() == [0.75]
    assert ties.tie_aware_precision_at(distances, relevant, 1).tolist() == [0.5]
    # Cut at 1: found and right, or nothing found; over what could be found, the same.
    assert ties.tie_aware_average_precision(distances, relevant, 1).tolist() == [0.5]
    # Both relevant and cut at 1: certain; over the two there are, the same, as only one can be had.
    both = np.array([[True, True]])
    assert ties.tie_aware_average_precision(distances, both, 1).tolist() == [1.0]
    assert ties.tie_aware_average_precision(distances, both, 1, np.array([2])).tolist() == [1.0]


def test_a_large_group_cut_in_the_middle() -> None:
    """Sampled orders agree with the closed form where no list of all orders would end."""
    rng = np.random.default_rng(0)
    distances = np.sort(rng.integers(0, 4, 200))
    relevant = rng.random(200) < 0.3
    found, over_all = [], []
    n_relevant = np.array([relevant.sum()])
    for _ in range(4000):
        order = np.lexsort((rng.random(200), distances))
        one = relevant[np.newaxis, order]
        found.append(evaluation.average_precision(one, 70)[0])
        over_all.append(evaluation.average_precision(one, 70, n_relevant)[0])
    assert 0 < (distances < distances[69]).sum() < 69 < (distances <= distances[69]).sum() - 5
    both = distances[np.newaxis], relevant[np.newaxis], 70
    got = (
        ties.tie_aware_average_precision(*both)[0],
        ties.tie_aware_average_precision(*both, n_relevant)[0],
    )
    for expected, sampled in zip(got, (found, over_all), strict=True):
        error = 4 * np.std(sampled) / np.sqrt(len(sampled))
        assert expected == pytest.approx(np.mean(sampled), abs=error)


def test_full_average_precision_is_scikit_learns() -> None:
    """Where nothing is tied: scikit-learn counts a tied group as one step instead."""
    rng = np.random.default_rng(1)
    distances = rng.permuted(np.tile(np.arange(500.0), (20, 1)), axis=1)
    relevant = rng.random((20, 500)) < rng.uniform(0.01, 0.6, (20, 1))
    relevant[:, 0] = True
    want = [average_precision_score(r, -d) for r, d in zip(relevant, distances, strict=True)]
    ranked = np.take_along_axis(relevant, np.argsort(distances, axis=1), axis=1)
    assert evaluation.average_precision(ranked) == pytest.approx(want)
    assert ties.tie_aware_average_precision(distances, relevant) == pytest.approx(want)


def test_relevance() -> None:
    one = evaluation.shares_label(np.array([1, 2]), np.array([2, 1, 1]))
    assert one.tolist() == [[False, True, True], [True, False, False]]
    several = evaluation.shares_label(
        np.array([[1, 1, 0], [0, 0, 0]], bool), np.array([[0, 1, 1], [0, 0, 1]], bool)
    )
    assert several.tolist() == [[True, False], [False, False]]


def test_nothing_relevant_is_zero_and_no_warning() -> None:
    nothing = np.zeros((2, 5), bool)
    distances = np.zeros((2, 5), int)
    assert not evaluation.average_precision(nothing).any()
    assert not evaluation.precision_at_recall(nothing, np.array([0.5])).any()
    assert not ties.tie_aware_average_precision(distances, nothing, 3).any()
    assert not ties.tie_aware_precision_at(distances, nothing, 3).any()


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    values = rng.beta(2, 1, (60, 150))  # 150 samples of 60 queries, of mean 2/3
    low, high = evaluation.bootstrap_interval(values, rng, n_resamples=400)
    assert low.shape == high.shape == (150,)
    assert 0.88 < ((low < 2 / 3) & (high > 2 / 3)).mean() < 0.99
    narrow = evaluation.bootstrap_interval(values[:, 0], rng, level=0.5)
    assert low[0] < narrow[0] < values[:, 0].mean() < narrow[1] < high[0]


def test_the_interval_is_the_generators() -> None:
    values = np.random.default_rng(0).random(50)
    once, again = (
        evaluation.bootstrap_interval(values, np.random.default_rng(3), n_resamples=50)
        for _ in range(2)
    )
    assert once == again


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluation.precision_at(np.ones(3, dtype=bool), 1),
        lambda: evaluation.precision_at(np.ones((1, 3), dtype=bool), 0),
        lambda: evaluation.precision_curve(np.ones((1, 3), dtype=bool), (1, 0)),
        lambda: evaluation.precision_within(np.ones((1, 2)), np.ones((1, 3), dtype=bool), 2),
        lambda: evaluation.average_precision(np.ones((1, 3), dtype=bool), None, np.array([2])),
        lambda: evaluation.shares_label(np.ones(3, int), np.ones((3, 2), bool)),
        lambda: evaluation.shares_label(np.ones((3, 4), bool), np.ones((3, 2), bool)),
        lambda: evaluation.bootstrap_interval(np.empty(0), np.random.default_rng(0)),
        lambda: evaluation.bootstrap_interval(np.ones(3), np.random.default_rng(0), level=1.0),
        lambda: ties.tie_aware_average_precision(np.zeros((1, 2)), np.ones((1, 3), dtype=bool)),
        lambda: ties.tie_aware_precision_at(np.zeros((1, 3)), np.ones((1, 3), dtype=bool), 0),
        lambda: ties.tie_aware_average_precision(
            np.zeros((1, 3)), np.ones((1, 3), dtype=bool), 3, np.array([2])
        ),
        lambda: ties.TieGroups.of_histograms(np.array([[1, 2]]), np.array([[2, 0]])),
        lambda: ties.TieGroups.of_histograms(np.array([[1], [2]]), np.array([[0], [0]])),
    ],
)
def test_wrong_shapes_and_counts_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=r"\w"):
        call()
