"""Two-stage search by brute force, row by row, sharing no code with the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.reference.kernels import asymmetric, euclidean, hamming


@dataclass
class Table:
    """Rows as a test made them."""

    codes: list[bytes]
    n_bits: int
    ids: list[str]
    features: np.ndarray | None = None
    dead: Sequence[bool] | None = None
    has_feature: Sequence[bool] | None = None


def passes(
    tags: Sequence[str], some: Sequence[str], every: Sequence[str], none: Sequence[str]
) -> bool:
    """Whether an item with `tags` passes a filter any, all, none."""
    has_some = not some or any(tag in tags for tag in some)
    return has_some and all(tag in tags for tag in every) and not any(tag in tags for tag in none)


@dataclass
class Answer:
    """Hits are (id, hamming_bits, distance or None)."""

    hits: list[tuple[str, int, float | None]]
    threshold_bits: int
    histogram: list[int]
    pool_size: int
    truncated: bool
    rows_without_feature: int


def bit_weights(activations: np.ndarray) -> list[int]:
    """510 |H - 0.5| by exact arithmetic; `round` takes halves to even."""
    return [round(510 * abs(Fraction(float(h)) - Fraction(1, 2))) for h in activations]


def search(
    table: Table,
    code: bytes,
    feature: np.ndarray | None,
    *,
    k: int,
    radius_bits: int | None,
    min_pool: int,
    max_pool: int | None,
    by_feature: bool,
    activations: np.ndarray | None = None,
) -> Answer:
    weights = [0] * table.n_bits if activations is None else bit_weights(activations)
    alive = [
        (hamming(stored, code), asymmetric(stored, code, weights), row)
        for row, stored in enumerate(table.codes)
        if table.dead is None or not table.dead[row]
    ]
    threshold = 0 if radius_bits is None else radius_bits
    if radius_bits is None:
        wanted = min(max(k, min_pool), len(alive))
        while sum(bits <= threshold for bits, _, _ in alive) < wanted:
            threshold += 1
    ball = sorted(entry for entry in alive if entry[0] <= threshold)
    pool = ball[:max_pool] if by_feature and max_pool is not None else ball

    ranked = []
    for bits, weight, row in pool:
        item_id = table.ids[row]
        if not by_feature:
            ranked.append((0.0, bits, weight, item_id.encode(), item_id))
        elif table.has_feature is None or table.has_feature[row]:
            distance = float(euclidean(table.features[row], feature))
            ranked.append((distance, bits, 0, item_id.encode(), item_id))
    ranked.sort()
    return Answer(
        hits=[
            (item_id, bits, distance if by_feature else None)
            for distance, bits, _, _, item_id in ranked[:k]
        ],
        threshold_bits=threshold,
        histogram=[sum(b == bits for b, _, _ in ball) for bits in range(threshold + 1)],
        pool_size=len(pool),
        truncated=len(pool) < len(ball),
        rows_without_feature=len(pool) - len(ranked),
    )


def exhaustive(
    table: Table, code: bytes, feature: np.ndarray, k: int
) -> list[tuple[str, int, float]]:
    """The k nearest of all rows that are alive and have a feature: (id, hamming_bits, distance)."""
    ranked = [
        (
            float(euclidean(table.features[row], feature)),
            hamming(stored, code),
            table.ids[row].encode(),
            table.ids[row],
        )
        for row, stored in enumerate(table.codes)
        if (table.dead is None or not table.dead[row])
        and (table.has_feature is None or table.has_feature[row])
    ]
    return [(item_id, bits, distance) for distance, bits, _, item_id in sorted(ranked)[:k]]
