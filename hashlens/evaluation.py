"""How good rankings are: precision and average precision of ranked relevance.

Every function takes whole batches, returns one number per query, and leaves the mean to the caller
(mAP is ``average_precision(...).mean()``), so that a mean by label costs nothing extra. Numbers of
different definitions are not comparable: always say which one, over how many ranks, against how
many stored images.

Where items are tied, these take the order they are given; `hashlens.ties` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def shares_label(queries: NDArray[Any], database: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which items are relevant to which queries: those that share a label.

    Parameters
    ----------
    queries, database
        Both with an integer per item, shapes ``[n_queries]`` and ``[n_items]``; or both bool, for
        items of several labels, shapes ``[n_queries, n_labels]`` and ``[n_items, n_labels]``.

    Returns
    -------
    ndarray
        bool, shape ``[n_queries, n_items]``.

    Raises
    ------
    ValueError
        One is of one kind and one of the other, or their numbers of labels differ.
    """
    if queries.ndim != database.ndim or queries.shape[1:] != database.shape[1:]:
        raise ValueError(f"labels {queries.shape} and {database.shape} do not compare")
    if queries.ndim == 1:
        return np.asarray(queries[:, np.newaxis] == database)
    # How many labels they share, as float32: matrix products of integers are slow.
    return np.asarray(queries.astype(np.float32) @ database.T.astype(np.float32) > 0)


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
    relevant = checked(relevant, k)
    return np.asarray(relevant[:, :k].sum(axis=1) / k, dtype=np.float64)


def precision_curve(relevant: NDArray[np.bool_], depths: Sequence[int]) -> NDArray[np.float64]:
    """Compute precision@k for several k in one pass; see `precision_at`.

    Parameters
    ----------
    relevant
        bool, shape ``[n_queries, n_ranks]``, best rank first.
    depths
        The values of k, at least one.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries, len(depths)]``.
    """
    relevant = checked(relevant, min(depths))
    found = relevant[:, : max(depths)].cumsum(axis=1)
    padded = np.concatenate([np.zeros((len(found), 1), found.dtype), found], axis=1)
    k = np.asarray(depths)
    return np.asarray(padded[:, np.minimum(k, found.shape[1])] / k, dtype=np.float64)


def precision_within(
    distances: NDArray[Any], relevant: NDArray[np.bool_], radius: float
) -> NDArray[np.float64]:
    """Compute the relevant share of the ball of a radius around each query.

    An empty ball counts as 0, as in the literature on hashing: a query that finds nothing has
    failed.

    Parameters
    ----------
    distances
        Any real dtype, shape ``[n_queries, n_items]``.
    relevant
        bool, same shape and order.
    radius
        In the unit of `distances`; items at exactly this distance are inside.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries]``.

    Raises
    ------
    ValueError
        The shapes differ or are not two-dimensional.
    """
    relevant = checked_pair(distances, relevant, None)
    inside = distances <= radius
    n_inside = inside.sum(axis=1)
    n_relevant = (inside & relevant).sum(axis=1)
    return np.asarray(n_relevant / np.maximum(n_inside, 1), dtype=np.float64)


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
    relevant = checked(relevant, k)[:, :k]
    n_queries, n_ranks = relevant.shape
    # Only ranks that hold a relevant item count, usually few.
    query, rank = np.nonzero(relevant)
    n_found = np.bincount(query, minlength=n_queries)
    found_before_query = n_found.cumsum() - n_found
    found = np.arange(1, query.shape[0] + 1) - found_before_query[query]
    total = np.bincount(query, weights=found / (rank + 1), minlength=n_queries)
    return mean_precision(total, n_found, n_ranks if k is None else k, n_relevant)


def precision_at_recall(
    relevant: NDArray[np.bool_], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute the precision at which a share of all relevant items has been found.

    Parameters
    ----------
    relevant
        bool, shape ``[n_queries, n_ranks]``, best rank first, with a rank for each stored item.
    levels
        Recall, each in 0..1: precision is taken at the first rank that reaches it, and at the
        first relevant item for 0.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries, len(levels)]``; 0 where nothing is relevant.
    """
    relevant = checked(relevant, None)
    query, rank = np.nonzero(relevant)
    n_relevant = np.bincount(query, minlength=relevant.shape[0])
    if not query.shape[0]:
        return np.zeros((relevant.shape[0], len(levels)))
    # A hair less, so that 0.1 of 10 items is 1 item whatever the product rounds to.
    wanted = np.ceil(n_relevant[:, np.newaxis] * levels - 1e-9).astype(np.int64)
    wanted = np.clip(wanted, 1, np.maximum(n_relevant, 1)[:, np.newaxis])
    first = (n_relevant.cumsum() - n_relevant)[:, np.newaxis]
    ranks = rank[np.minimum(first + wanted - 1, query.shape[0] - 1)]
    precision = wanted / (ranks + 1)
    return np.where(n_relevant[:, np.newaxis] > 0, precision, 0.0)


def bootstrap_interval(
    values: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate how far the mean over queries might be off: percentile bootstrap.

    Draws as many queries as there are, with replacement, again and again, and returns the range
    that holds the middle of the means. It covers the choice of queries, not that of the database
    or the training run.

    Parameters
    ----------
    values
        A number per query: float64, shape ``[n_queries]``; or several, ``[n_queries, n_metrics]``,
        which are then resampled together.
    rng
        Decides which queries are drawn.
    level
        Share of the means inside.
    n_resamples
        Means to draw.

    Returns
    -------
    low, high
        float64, shape ``[n_metrics]``, or scalars' shape ``[]``.

    Raises
    ------
    ValueError
        There are no queries, or `level` is not between 0 and 1.
    """
    n = values.shape[0]
    if n < 1 or not 0 < level < 1:
        raise ValueError("a bootstrap needs queries, and a level between 0 and 1")
    means = []
    for _ in range(n_resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        means.append(times @ values / n)
    edges = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile(np.asarray(means), edges, axis=0)
    return low, high


def mean_precision(
    total: NDArray[Any],
    n_found: NDArray[np.int64],
    depth: int,
    n_relevant: NDArray[np.integer[Any]] | None,
) -> NDArray[np.float64]:
    """Divide sums of precision by what was found, or by what could have been found.

    Raises
    ------
    ValueError
        More was found than `n_relevant`.
    """
    if n_relevant is None:
        divisor = n_found
    else:
        divisor = np.minimum(n_relevant, depth)
        if (n_found > divisor).any():
            raise ValueError("more relevant items were found than n_relevant says there are")
    return np.asarray(total / np.maximum(divisor, 1), dtype=np.float64)


def checked(relevant: NDArray[np.bool_], k: int | None) -> NDArray[np.bool_]:
    """Return relevance as bool; ValueError unless it has two axes and `k` is at least 1."""
    if relevant.ndim != 2:
        raise ValueError(f"relevant is [n_queries, n_ranks], not {relevant.shape}")
    if k is not None and k < 1:
        raise ValueError(f"k is {k}; it is at least 1")
    return relevant.astype(np.bool_, copy=False)


def checked_pair(
    distances: NDArray[Any], relevant: NDArray[np.bool_], k: int | None
) -> NDArray[np.bool_]:
    """Return relevance as `checked` does; ValueError unless `distances` has the same shape."""
    relevant = checked(relevant, k)
    if distances.shape != relevant.shape:
        raise ValueError(f"distances {distances.shape} and relevant {relevant.shape} differ")
    return relevant
