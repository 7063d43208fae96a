"""Retrieval metrics from their definitions, in exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, permutations


def precision_at(relevant: Sequence[bool], k: int) -> Fraction:
    return Fraction(sum(bool(r) for r in relevant[:k]), k)


def average_precision(
    relevant: Sequence[bool], k: int | None = None, n_relevant: int | None = None
) -> Fraction:
    k = len(relevant) if k is None else k
    total = Fraction(0)
    found = 0
    for i, is_relevant in enumerate(relevant[:k], start=1):
        if is_relevant:
            found += 1
            total += Fraction(found, i)
    divisor = found if n_relevant is None else min(n_relevant, k)
    return total / divisor if divisor else Fraction(0)


def tie_aware_average_precision(distances: Sequence[int], relevant: Sequence[bool]) -> Fraction:
    """Average over every order that is sorted by distance. For a handful of items."""
    orders = [
        order
        for order in permutations(range(len(distances)))
        if all(distances[a] <= distances[b] for a, b in pairwise(order))
    ]
    total = sum((average_precision([relevant[i] for i in order]) for order in orders), Fraction(0))
    return total / len(orders)
