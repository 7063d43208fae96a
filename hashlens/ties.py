"""How good rankings are when equal distances have no order.

Short codes put many items at the same Hamming distance, and the order among them, and with it a
plain metric, is luck. These functions give the expectation over all orders of tied items: McSherry
and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of
Tied Scores", ECIR 2008. All they need is how large each group of tied items is and how many of it
are relevant (`TieGroups`), so a histogram of distances will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.evaluation import checked_pair, mean_precision


@dataclass(frozen=True, slots=True, eq=False)
class TieGroups:
    """Groups of items at the same distance from a query, ranked, for any number of queries.

    All arrays are int64, shape ``[n_groups]``, ordered by query, then by distance. Groups without
    a relevant item are left out: they matter only by the ranks they take.
    """

    n_queries: int
    n_ranks: int
    """Items that each query ranks."""
    query: NDArray[np.int64]
    size: NDArray[np.int64]
    """Items of the group."""
    hits: NDArray[np.int64]
    """Relevant ones among them, at least 1."""
    size_before: NDArray[np.int64]
    """Items of the query that come before the group."""
    hits_before: NDArray[np.int64]

    @classmethod
    def of_ranking(cls, keys: NDArray[Any], relevant: NDArray[np.bool_]) -> TieGroups:
        """Find the groups in ranked items.

        Parameters
        ----------
        keys
            What the items are ranked by: shape ``[n_queries, n_ranks]``, each row in order; tied
            items have the same.
        relevant
            bool, same shape.

        Raises
        ------
        ValueError
            The shapes differ or are not two-dimensional.
        """
        relevant = checked_pair(keys, relevant, None)
        n_queries, n_ranks = keys.shape
        if not keys.size:
            return cls._of_counts(n_queries, n_ranks, *[np.empty(0, np.int64)] * 4)
        begins = np.ones(keys.shape, dtype=np.bool_)
        np.not_equal(keys[:, 1:], keys[:, :-1], out=begins[:, 1:])
        starts = np.flatnonzero(begins)
        hits = np.add.reduceat(relevant.ravel(), starts, dtype=np.int64)
        size = np.diff(starts, append=keys.size)
        kept = hits > 0
        query, size_before = np.divmod(starts[kept], n_ranks)
        return cls._of_counts(n_queries, n_ranks, query, size[kept], hits[kept], size_before)

    @classmethod
    def of_histograms(
        cls, n_items: NDArray[np.integer[Any]], n_relevant: NDArray[np.integer[Any]]
    ) -> TieGroups:
        """Take the groups from histograms of distances.

        Parameters
        ----------
        n_items
            Items at each distance: shape ``[n_queries, n_distances]``, nearest first; each row has
            the same sum.
        n_relevant
            Relevant ones among them, same shape.

        Raises
        ------
        ValueError
            The histograms contradict each other.
        """
        totals = n_items.sum(axis=1)
        if n_items.shape != n_relevant.shape or (n_relevant > n_items).any():
            raise ValueError("more items are relevant than there are, or the shapes differ")
        if (totals != totals[:1]).any():
            raise ValueError("every query ranks the same number of items")
        query, level = np.nonzero(n_relevant)
        before = n_items.cumsum(axis=1) - n_items
        return cls._of_counts(
            n_items.shape[0],
            int(totals[0]) if len(totals) else 0,
            query,
            n_items[query, level].astype(np.int64),
            n_relevant[query, level].astype(np.int64),
            before[query, level].astype(np.int64),
        )

    @classmethod
    def _of_counts(
        cls,
        n_queries: int,
        n_ranks: int,
        query: NDArray[np.int64],
        size: NDArray[np.int64],
        hits: NDArray[np.int64],
        size_before: NDArray[np.int64],
    ) -> TieGroups:
        before = hits.cumsum() - hits
        by_query = np.bincount(query, weights=hits, minlength=n_queries).astype(np.int64)
        hits_before = before - (by_query.cumsum() - by_query)[query]
        return cls(n_queries, n_ranks, query, size, hits, size_before, hits_before)

    def precision_at(self, k: int) -> NDArray[np.float64]:
        """Compute the expected precision@k, see the function `precision_at`."""
        counted = np.clip(k - self.size_before, 0, self.size)
        expected = self.hits * (counted / self.size)
        return np.bincount(self.query, weights=expected, minlength=self.n_queries) / k

    def average_precision(
        self, k: int | None = None, n_relevant: NDArray[np.integer[Any]] | None = None
    ) -> NDArray[np.float64]:
        """Compute the expected average precision, see the function `average_precision`.

        Where rank `k` falls inside a group, chance decides not only which of its items are
        counted but also, without `n_relevant`, by how many found ones the sum is divided; the
        expectation is over that too.
        """
        depth = self.n_ranks if k is None else k
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, self.n_ranks + 1))])
        whole = self.size_before + self.size <= depth
        cut = (self.size_before < depth) & ~whole
        counted = np.where(whole, self.size, np.maximum(depth - self.size_before, 0))
        inverse_ranks = harmonic[self.size_before + counted] - harmonic[self.size_before]
        # The sum of place / rank over the group's counted ranks, places from 0.
        shares = counted - (self.size_before + 1) * inverse_ranks
        others = (self.hits - 1) / np.maximum(self.size - 1, 1)
        # Given a relevant item at a place, the others are spread evenly over the other places.
        expected = self.hits / self.size * ((self.hits_before + 1) * inverse_ranks)
        expected += self.hits / self.size * others * shares
        n_found = np.bincount(self.query, self.hits * whole, self.n_queries).astype(np.int64)
        if n_relevant is not None or not cut.any():
            total = np.bincount(self.query, weights=expected, minlength=self.n_queries)
            return mean_precision(total, n_found, depth, n_relevant)

        total = np.bincount(self.query, weights=expected * whole, minlength=self.n_queries)
        mean = mean_precision(total, n_found, depth, None)
        log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, self.n_ranks + 1)))])
        for group in np.flatnonzero(cut):  # at most one of each query
            query = self.query[group]
            size, hits, taken = self.size[group], self.hits[group], counted[group]
            drawn = np.arange(max(0, taken - (size - hits)), min(hits, taken) + 1)
            chance = _hypergeometric(log_factorial, size, hits, taken, drawn)
            spread = (drawn - 1) / max(taken - 1, 1) * shares[group]
            inside = drawn / taken * ((self.hits_before[group] + 1) * inverse_ranks[group] + spread)
            divisor = np.maximum(self.hits_before[group] + drawn, 1)
            mean[query] = float(chance @ ((total[query] + inside) / divisor))
        return mean


def tie_aware_average_precision(
    distances: NDArray[Any],
    relevant: NDArray[np.bool_],
    k: int | None = None,
    n_relevant: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.float64]:
    """Compute average precision where equal distances have no order.

    Parameters
    ----------
    distances
        Any real dtype, shape ``[n_queries, n_items]``, in any order; less is better.
    relevant
        bool, same shape.
    k, n_relevant
        As in `average_precision`.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries]``; 0 where nothing is relevant.

    Raises
    ------
    ValueError
        The shapes differ or are not two-dimensional, or as in `average_precision`.
    """
    return _ranked(distances, relevant, k).average_precision(k, n_relevant)


def tie_aware_precision_at(
    distances: NDArray[Any], relevant: NDArray[np.bool_], k: int
) -> NDArray[np.float64]:
    """Compute precision@k where equal distances have no order.

    Parameters and errors as in `tie_aware_average_precision`.

    Returns
    -------
    ndarray
        float64, shape ``[n_queries]``.
    """
    return _ranked(distances, relevant, k).precision_at(k)


def _ranked(distances: NDArray[Any], relevant: NDArray[np.bool_], k: int | None) -> TieGroups:
    relevant = checked_pair(distances, relevant, k)
    order = np.argsort(distances, axis=1, kind="stable")
    return TieGroups.of_ranking(
        np.take_along_axis(distances, order, axis=1), np.take_along_axis(relevant, order, axis=1)
    )


def _hypergeometric(
    log_factorial: NDArray[np.float64], size: int, hits: int, taken: int, drawn: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the chance that, of a group's `taken` items, `drawn` are among its `hits`."""

    def log_choose(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(log_factorial[n] - log_factorial[k] - log_factorial[n - k])

    log_chance = log_choose(hits, drawn) + log_choose(size - hits, taken - drawn)
    chance = np.exp(log_chance - log_chance.max())
    return np.asarray(chance / chance.sum())
