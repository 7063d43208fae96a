"""How good rankings are: precision and average precision of ranked relevance.

Every function takes whole batches, returns one number per query, and leaves the mean to the caller
(mAP is ``average_precision(...).mean()``), so that a mean by label costs nothing extra. Numbers of
different definitions are not comparable: always say which one, over how many ranks, against how
many stored images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def precision_at(relevant: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """Compute precision@k, the relevant share of the first `k` ranks.

    Parameters
    ----------
    relevant
        bool, shape ``[n_queries, n_ranks]``, best rank first.
    k
        Ranks counted. Where a ranking is shorter, the ranks it lacks count as not relevant.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries]``.

    Raises
    ------
    ValueError
        `relevant` is not two-dimensional or `k` is less than 1.
    """
    relevant = _checked(relevant, k)
    return np.asarray(relevant[:, :k].sum(axis=1) / k, dtype=np.float64)


def average_precision(
    relevant: NDArray[np.bool_],
    k: int | None = None,
    n_relevant: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.float64]:
    """Compute average precision, over the first `k` ranks or over all.

    The mean of precision@i over the ranks i that hold a relevant item; 0 where there is none.

    By default the mean is over the relevant items *found* in the first `k` ranks. So does the
    evaluation script of Lin et al. 2015, whose mAP has ``k = 1000``. It does not punish what a
    ranking misses. With `n_relevant` it is over those it *could have found*, the definition of
    information retrieval, which is never larger.

    Parameters
    ----------
    relevant
        bool, shape ``[n_queries, n_ranks]``, best rank first. For full mAP, a rank for each stored
        item and no `k`; the two definitions then agree.
    k
        Ranks counted; None for all.
    n_relevant
        Stored items relevant to each query, shape ``[n_queries]``; those beyond `k` are not held
        against the ranking.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries]``.

    Raises
    ------
    ValueError
        `relevant` is not two-dimensional, `k` is less than 1, or more is found than `n_relevant`.
    """
    relevant = _checked(relevant, k)[:, :k]
    n_ranks = relevant.shape[1]
    found = relevant.cumsum(axis=1)
    precision = found / np.arange(1, n_ranks + 1)
    total = (precision * relevant).sum(axis=1)
    n_found = relevant.sum(axis=1)
    if n_relevant is None:
        divisor = n_found
    else:
        divisor = np.minimum(n_relevant, n_ranks if k is None else k)
        if (n_found > divisor).any():
            raise ValueError("more relevant items were found than n_relevant says there are")
    return np.asarray(total / np.maximum(divisor, 1), dtype=np.float64)


def tie_aware_average_precision(
    distances: NDArray[Any], relevant: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Compute average precision where equal distances have no order.

    Short codes put many items at the same Hamming distance, and the order among them, and with it
    plain average precision, is luck. This is the expectation over all orders of tied items.

    Source: McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently
    in the Presence of Tied Scores", ECIR 2008.

    Parameters
    ----------
    distances
        Any real dtype, shape ``[n_queries, n_items]``, in any order; less is better.
    relevant
        bool, same shape.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries]``; 0 where nothing is relevant.

    Raises
    ------
    ValueError
        The shapes differ or are not two-dimensional.
    """
    relevant = _checked(relevant, None)
    if distances.shape != relevant.shape:
        raise ValueError(f"distances {distances.shape} and relevant {relevant.shape} differ")
    return np.array(
        [_expected_precision(*pair) for pair in zip(distances, relevant, strict=True)],
        dtype=np.float64,
    )


def _expected_precision(distances: NDArray[Any], relevant: NDArray[np.bool_]) -> float:
    """Return one query's expected average precision."""
    if not relevant.any():
        return 0.0
    _, group = np.unique(distances, return_inverse=True)
    sizes = np.bincount(group)
    hits = np.bincount(group, weights=relevant)
    ranks_before = np.cumsum(sizes) - sizes
    hits_before = np.cumsum(hits) - hits

    # By rank: which group it falls in, and its place there, from 0.
    of_rank = np.repeat(np.arange(sizes.shape[0]), sizes)
    place = np.arange(relevant.shape[0]) - ranks_before[of_rank]
    # Given a relevant item at a place, the others of its group are spread evenly over the rest.
    others = np.where(sizes > 1, (hits - 1) / np.maximum(sizes - 1, 1), 0.0)
    expected_hits = hits_before[of_rank] + 1 + place * others[of_rank]
    chance = (hits / sizes)[of_rank]
    precision = expected_hits / np.arange(1, relevant.shape[0] + 1)
    return float((chance * precision).sum() / hits.sum())


def _checked(relevant: NDArray[np.bool_], k: int | None) -> NDArray[np.bool_]:
    if relevant.ndim != 2:
        raise ValueError(f"relevant is [n_queries, n_ranks], not {relevant.shape}")
    if k is not None and k < 1:
        raise ValueError(f"k is {k}; it is at least 1")
    return relevant.astype(np.bool_, copy=False)
