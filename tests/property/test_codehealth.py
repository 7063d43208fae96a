from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import codes
from hashlens.codehealth import MARGIN_BINS, UNSURE_MARGIN, health_of, summary, verdict
from tests.reference import codehealth as naive


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """Bits of a few rows, bool [n, n_bits]: random, with repeated rows and repeated columns."""
    n_bits = draw(st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 130]))
    n = draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = rng.random((n, n_bits)) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    if draw(st.booleans()):
        bits = bits[rng.integers(0, n, n)]
    if draw(st.booleans()):
        bits = bits[:, rng.integers(0, n_bits, n_bits)]
    return bits


@given(bits=tables(), wanted_rows=st.integers(1, 30))
def test_everything_is_as_defined(bits: np.ndarray, wanted_rows: int) -> None:
    n, n_bits = bits.shape
    packed = codes.pack(bits)
    rows = [row.tobytes() for row in packed]
    health = health_of(packed, n_bits, random=np.random.default_rng(0), wanted_rows=wanted_rows)

    rates = naive.fire_rates(rows, n_bits)
    assert health.fire_rates.tolist() == [float(rate) for rate in rates]
    for rate, found in zip(rates, health.entropies, strict=True):
        assert found == pytest.approx(naive.entropy([rate, 1 - rate]))
    dead = [i for i, rate in enumerate(rates) if min(rate, 1 - rate) < Fraction(1, 100)]
    assert list(health.dead_bits) == dead

    columns = bits.T.astype(int).tolist()
    pairs = [(i, j) for i in range(n_bits) for j in range(i + 1, n_bits)]
    r = {(i, j): naive.correlation(columns[i], columns[j]) for i, j in pairs[:400]}
    for (i, j), expected in r.items():
        assert health.correlations[i, j] == pytest.approx(expected, abs=1e-12)
        assert health.correlations[j, i] == health.correlations[i, j]
        assert ((i, j) in health.copied_bits) == (abs(expected) > 0.95)
    assert (health.correlations.diagonal() == 1).all()
    if len(pairs) == len(r):
        values = [abs(value) for value in r.values()] or [0.0]
        assert health.max_correlation == pytest.approx(max(values), abs=1e-12)
        assert health.mean_correlation == pytest.approx(sum(values) / len(values), abs=1e-12)

    sizes = naive.buckets(rows)
    assert health.bucket_sizes.tolist() == sizes
    assert (health.distinct_codes, health.largest_bucket) == (len(sizes), sizes[0])
    same = sum(a == b for i, a in enumerate(rows) for b in rows[:i])
    assert health.collision_share == pytest.approx(same / max(n * (n - 1) // 2, 1))
    spread = naive.entropy([Fraction(size, n) for size in sizes])
    assert math.log2(health.effective_codes) == pytest.approx(spread)

    # With fewer rows than n_queries each row is a query, so nothing is left to chance.
    pools = [naive.pool_sizes(rows, row, n_bits) for row in rows]
    assert health.n_queries == n
    for t, sizes_at in enumerate(zip(*pools, strict=True)):
        assert health.pool_mean[t] == pytest.approx(sum(sizes_at) / n)
        assert health.pool_median[t] == naive.percentile(sizes_at, 50)
        assert health.pool_p95[t] == pytest.approx(naive.percentile(sizes_at, 95))
    wanted = min(wanted_rows, n)
    automatic = sorted(naive.automatic_pool(pool, wanted) for pool in pools)
    assert health.automatic_pools.tolist() == automatic
    medians = health.pool_median.tolist()
    assert health.threshold_bits == next(t for t, size in enumerate(medians) if size >= wanted)

    assert all(math.isfinite(value) for value in summary(health).values())
    assert verdict(health).level in ("healthy", "crowded", "collapsed")


@given(
    n=st.integers(1, 12),
    n_bits=st.sampled_from([1, 8, 13]),
    seed=st.integers(0, 2**32 - 1),
)
def test_margins_are_as_defined(n: int, n_bits: int, seed: int) -> None:
    # Halves of 40ths: no margin lies on the edge of a bin, where rounding would decide.
    grid = np.random.default_rng(seed).integers(0, 40, (n, n_bits)) + 0.5
    activations = (grid / 40).astype(np.float32)
    packed = codes.pack(activations > 0.5)
    health = health_of(packed, n_bits, activations, random=np.random.default_rng(0))
    margins = health.margins
    assert margins is not None
    expected = [[abs(value - 0.5) for value in row] for row in activations.tolist()]
    flat = [value for row in expected for value in row]
    assert margins.mean == pytest.approx(sum(flat) / len(flat))
    assert margins.unsure_share == sum(m < UNSURE_MARGIN for m in flat) / len(flat)
    assert margins.mean_by_bit.tolist() == pytest.approx(
        [sum(column) / n for column in zip(*expected, strict=True)]
    )
    bins = [0] * MARGIN_BINS
    for margin in flat:
        bins[int(margin * 2 * MARGIN_BINS)] += 1
    assert margins.histogram.tolist() == bins


@given(seed=st.integers(0, 2**32 - 1))
def test_a_sample_of_queries_is_drawn_by_the_generator_alone(seed: int) -> None:
    packed = np.random.default_rng(5).integers(0, 256, (40, 2), dtype=np.uint8)
    first, second = (
        health_of(packed, 16, random=np.random.default_rng(seed), n_queries=7) for _ in range(2)
    )
    assert first.n_queries == 7
    assert first.to_json() == second.to_json()
    # The draws differ in what they find, but all of them find themselves.
    assert (first.automatic_pools >= 1).all()
    assert first.pool_median[-1] == 40
