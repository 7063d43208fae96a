"""Retrieval metrics and rankings from their definitions, slow and in exact fractions."""

from __future__ import annotations

import math
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


def precision_at_recall(relevant: Sequence[bool], level: Fraction) -> Fraction:
    """Walk down the ranking until the recall is reached; at least to the first relevant item."""
    n_relevant = sum(relevant)
    found = 0
    for rank, is_relevant in enumerate(relevant, start=1):
        found += is_relevant
        if found and Fraction(found, n_relevant) >= level:
            return Fraction(found, rank)
    return Fraction(0)


def precision_within(
    distances: Sequence[float], relevant: Sequence[bool], radius: float
) -> Fraction:
    inside = [r for d, r in zip(distances, relevant, strict=True) if d <= radius]
    return Fraction(sum(inside), len(inside)) if inside else Fraction(0)


def orders(distances: Sequence[int]) -> list[tuple[int, ...]]:
    """Return every order that is sorted by distance. For a handful of items."""
    return [
        order
        for order in permutations(range(len(distances)))
        if all(distances[a] <= distances[b] for a, b in pairwise(order))
    ]


def tie_aware_average_precision(
    distances: Sequence[int],
    relevant: Sequence[bool],
    k: int | None = None,
    n_relevant: int | None = None,
) -> Fraction:
    every = orders(distances)
    values = [average_precision([relevant[i] for i in order], k, n_relevant) for order in every]
    return sum(values, Fraction(0)) / len(every)


def tie_aware_precision_at(distances: Sequence[int], relevant: Sequence[bool], k: int) -> Fraction:
    every = orders(distances)
    values = [precision_at([relevant[i] for i in order], k) for order in every]
    return sum(values, Fraction(0)) / len(every)


def hamming(a: Sequence[bool], b: Sequence[bool]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def asymmetric(query: Sequence[bool], activations: Sequence[float], row: Sequence[bool]) -> int:
    """Add the weights of the bits that differ; Python rounds halves to even, too."""
    return sum(
        round(abs(h - 0.5) * 2 * 255)
        for q, h, r in zip(query, activations, row, strict=True)
        if q != r
    )


def ranking(
    name: str,
    query: tuple[Sequence[bool], Sequence[float], Sequence[float]],
    rows: Sequence[tuple[Sequence[bool], Sequence[float]]],
    own_row: int | None,
    min_pool: int,
) -> list[int]:
    """Return the rows best first, by sorting tuples.

    `query` is its bits, activations and feature; a row is its bits and feature.
    """
    bits, activations, feature = query
    others = [row for row in range(len(rows)) if row != own_row]
    far = {row: hamming(bits, rows[row][0]) for row in others}
    fine = {row: math.dist(feature, rows[row][1]) for row in others}
    if name == "coarse":
        return sorted(others, key=lambda row: (far[row], row))
    if name == "coarse_soft":
        return sorted(
            others, key=lambda row: (far[row], asymmetric(bits, activations, rows[row][0]), row)
        )
    if name == "exhaustive":
        return sorted(others, key=lambda row: (fine[row], row))
    assert name == "two_stage"
    threshold = sorted(far.values())[min(min_pool, len(others)) - 1]
    pool = [row for row in others if far[row] <= threshold]
    outside = [row for row in others if far[row] > threshold]
    return [
        *sorted(pool, key=lambda row: (fine[row], far[row], row)),
        *sorted(outside, key=lambda row: (far[row], row)),
    ]
