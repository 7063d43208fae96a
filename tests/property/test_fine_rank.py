"""The fine stage with a sketch answers what it answers without one, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_service import fine, readahead
from search_service import sketch as sketches
from search_service.cancel import Cancel
from search_service.kernels import sketch as kernels
from search_service.sketch import Sketch
from search_service.snapshot import Snapshot
from tests.reference import kernels as slow

DTYPES = st.sampled_from([np.float32, np.float16])


def snapshot_of(features: np.ndarray, *, rows_per_segment: int = 16, missing: bool = False):
    n = len(features)
    has_feature = np.arange(n) % 5 != 3 if missing else None
    return Snapshot.from_arrays(
        np.zeros((n, 1), dtype=np.uint8),
        n_bits=8,
        features=features,
        has_feature=has_feature,
        rows_per_segment=rows_per_segment,
    )


def sketch_of(snapshot: Snapshot, rows: int | None = None) -> Sketch:
    """Of the first `rows` rows."""
    sketch = Sketch(snapshot.dim)
    wanted = snapshot.rows if rows is None else rows
    while sketch.rows < wanted:
        larger = sketch.extended(snapshot, max_bytes=1 << 30)
        assert larger is not sketch
        sketch = larger
    return sketch


@st.composite
def features(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rows and a query: crowded, far apart, constant, tiny, huge, infinite, in turn or mixed."""
    dim = draw(st.sampled_from([1, 2, 3, 31, 32, 33, 64, 65, 130]))
    n = draw(st.integers(1, 120))
    dtype = draw(DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = {
        "normal": lambda shape: rng.standard_normal(shape),
        "like F7": lambda shape: np.maximum(rng.standard_normal(shape), 0),
        "few levels": lambda shape: rng.integers(0, 2, shape).astype(float),
        "constant": lambda shape: np.full(shape, 3.7),
        "one outlier": lambda shape: np.where(rng.random(shape) < 0.02, 1e4, rng.random(shape)),
        "near each other": lambda shape: 1 + rng.standard_normal(shape) * 1e-3,
        "far from 0": lambda shape: 3e4 + rng.standard_normal(shape),
    }
    if dtype is np.float32:
        kinds |= {
            "squares vanish": lambda shape: rng.standard_normal(shape) * 1e-23,
            "subnormal": lambda shape: rng.standard_normal(shape) * 1e-40,
            "squares overflow": lambda shape: rng.standard_normal(shape) * 1e19,
            "greatest": lambda shape: np.where(rng.random(shape) < 0.5, 3.4e38, -3.4e38),
        }
    else:
        kinds["subnormal halves"] = lambda shape: rng.standard_normal(shape) * 1e-6
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=2))
    table = np.concatenate([kinds[name]((n, dim)) for name in names])[rng.permutation(n)]
    table = table.astype(dtype)
    if draw(st.booleans()):  # duplicates: ties
        table = table[rng.integers(0, max(1, n // 4), n)]
    if draw(st.booleans()):
        table[rng.random(n) < 0.1, rng.integers(0, dim)] = draw(
            st.sampled_from([np.inf, -np.inf, np.nan])
        )
    query = kinds[draw(st.sampled_from(names))]((1, dim))[0].astype(np.float32)
    if draw(st.booleans()) and np.isfinite(table[0]).all():
        query = table[0].astype(np.float32)
    return table, query


@settings(max_examples=200)
@given(features(), st.data())
def test_same_nearest_with_the_same_bits(made: tuple[np.ndarray, np.ndarray], data: st.DataObject):
    table, query = made
    missing = data.draw(st.booleans())
    snapshot = snapshot_of(table, missing=missing)
    rows = np.flatnonzero(np.ones(len(table)) if not missing else snapshot.has_feature)
    rows = rows[data.draw(st.integers(0, 3)) :]
    k = data.draw(st.integers(1, 1 + len(rows) // 2))
    sketch = sketch_of(snapshot, data.draw(st.integers(0, len(table))))
    bits = (rows % 7).astype(np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine, "_is_worth_it", lambda snapshot, place, rows, k: len(rows) >= k)
        got = fine.rank(snapshot, rows, bits, query, k, Cancel(), sketch)

    exact = np.array([slow.euclidean(table[row], query) for row in rows], dtype=np.float32)
    edge = np.inf if k > len(rows) else np.sort(exact)[k - 1]
    needed = exact <= edge  # the k nearest and all that tie with the last of them
    assert set(rows[needed].tolist()) <= set(got[0].tolist())
    assert (np.diff(got[0]) > 0).all()
    places = np.searchsorted(rows, got[0])
    assert got[1].tobytes() == bits[places].tobytes()
    assert got[2].tobytes() == exact[places].tobytes()


@settings(max_examples=60)
@given(features())
def test_the_bound_is_below_what_is_computed(made: tuple[np.ndarray, np.ndarray]) -> None:
    table, query = made
    rows = np.arange(len(table))
    near, least = sketch_of(snapshot_of(table)).bounds(rows, query, Cancel())
    assert not np.isnan(near).any()
    for row in rows.tolist():
        assert least[row] <= slow.euclidean(table[row], query)


@given(features(), st.integers(0, 2**32 - 1))
def test_the_kernel_equals_its_twin(made: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    table, query = made
    sketch = sketch_of(snapshot_of(table))
    rows = np.sort(np.random.default_rng(seed).integers(0, len(table), 20))
    near, _ = sketch.bounds(rows, query, Cancel())
    for row, estimate in zip(rows.tolist(), near.tolist(), strict=True):
        exact = [Fraction(float(x)) for x in table[row]] if np.isfinite(table[row]).all() else None
        if exact is None:
            assert estimate == math.inf
            continue
        # A step of the row's codes and of the query's is the most that each number is off.
        step = (max(exact) - min(exact)) / 255 / 2
        step += max(abs(Fraction(float(q))) for q in query) / kernels.query_levels(len(query))
        real = math.sqrt(
            sum((x - Fraction(float(q))) ** 2 for x, q in zip(exact, query, strict=True))
        )
        far = float(max(abs(x) for x in exact)) + float(np.abs(query).max())
        assert abs(estimate - real) <= (float(step) + 1e-6 * far) * math.sqrt(len(query)) * 1.001


def test_few_rows_are_read_twice() -> None:
    rng = np.random.default_rng(3)
    # A cloud of few dimensions, as features are, seen from a place within.
    table = (rng.standard_normal((4000, 8)) @ rng.standard_normal((8, 256))).astype(np.float32)
    snapshot = snapshot_of(table, rows_per_segment=1024)
    bits = np.zeros(4000, dtype=np.uint16)
    rows, _, distances = fine.rank(
        snapshot, np.arange(4000), bits, table[17], 10, Cancel(), sketch_of(snapshot)
    )
    assert 10 <= len(rows) < 40
    assert distances.min() == 0


def test_a_sketch_grows_by_blocks_and_never_beyond_its_memory() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketches, "_BLOCK_BYTES", 4096)
        patch.setattr(sketches, "_STEP_BYTES", 4 * 64 * 10)
        table = np.random.default_rng(1).random((100, 64)).astype(np.float32)
        snapshot = snapshot_of(table)
        first = Sketch(64).extended(snapshot, max_bytes=1 << 20)
        assert first.rows == 10
        assert first.nbytes == 32 * sketches.row_bytes(64) == 3072
        full = sketch_of(snapshot)
        assert (full.rows, full.nbytes) == (100, 4 * 3072)
        assert full.extended(snapshot, max_bytes=1 << 20) is full
        cut = first
        for _ in range(20):
            cut = cut.extended(snapshot, max_bytes=2 * 3072 + 100)
        assert (cut.rows, cut.nbytes) == (64, 2 * 3072)
        rows = np.arange(10)
        again = full.bounds(rows, table[50], Cancel())
        assert first.bounds(rows, table[50], Cancel())[1].tobytes() == again[1].tobytes()


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 30), st.integers(1, 5000))
def test_what_is_asked_for_covers_the_rows_and_nothing_twice(
    seed: int, segment_bits: int, n: int, row_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(100, n, replace=False))
    per_segment = 1 << segment_bits
    segment_bytes = -(-per_segment * row_bytes // 4096) * 4096
    bases = 4096 * 10 + np.arange(100) * segment_bytes
    place = readahead.Place(bases, segment_bits, row_bytes)
    pages = set()
    for start, end in zip(*readahead._ranges(place, rows), strict=True):
        assert start % 4096 == 0
        new = set(range(start // 4096, -(-end // 4096)))
        assert not new & pages
        pages |= new
    wanted = set()
    for row in rows.tolist():
        begin = 4096 * 10 + row // per_segment * segment_bytes + row % per_segment * row_bytes
        wanted |= set(range(begin // 4096, (begin + row_bytes - 1) // 4096 + 1))
    assert pages == wanted
