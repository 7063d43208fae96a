"""Code health from its definitions, row by row; shares no code with `hashlens.codehealth`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from tests.reference.kernels import hamming


def bits_of(code: bytes, n_bits: int) -> list[int]:
    return [code[i // 8] >> (i % 8) & 1 for i in range(n_bits)]


def fire_rates(codes: Sequence[bytes], n_bits: int) -> list[Fraction]:
    rows = [bits_of(code, n_bits) for code in codes]
    return [Fraction(sum(row[i] for row in rows), len(rows)) for i in range(n_bits)]


def entropy(shares: Sequence[Fraction]) -> float:
    """In bits."""
    return sum(float(share) * -math.log2(share) for share in shares if share > 0)


def correlation(a: Sequence[int], b: Sequence[int]) -> float:
    """Pearson's r; 0 where one of them never changes."""
    n = len(a)
    mean_a, mean_b = Fraction(sum(a), n), Fraction(sum(b), n)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread_a = sum((x - mean_a) ** 2 for x in a)
    spread_b = sum((y - mean_b) ** 2 for y in b)
    if spread_a == 0 or spread_b == 0:
        return 0.0
    return float(covariance) / math.sqrt(float(spread_a * spread_b))


def buckets(codes: Sequence[bytes]) -> list[int]:
    return sorted(Counter(codes).values(), reverse=True)


def pool_sizes(codes: Sequence[bytes], query: bytes, n_bits: int) -> list[int]:
    distances = [hamming(code, query) for code in codes]
    return [sum(d <= t for d in distances) for t in range(n_bits + 1)]


def automatic_pool(pools: Sequence[int], wanted: int) -> int:
    return next(size for size in pools if size >= wanted)


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
