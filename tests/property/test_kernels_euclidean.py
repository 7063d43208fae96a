from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_service.kernels import euclidean
from tests.reference import kernels as slow


def distances(features: np.ndarray, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """All rows in one segment."""
    out = np.full(rows.shape[0], -1, dtype=np.float32)
    address = np.array([features.__array_interface__["data"][0]], dtype=np.int64)
    euclidean.distances(address, 62, features.dtype == np.float16, rows, query, out)
    return out


def same_bits(a: np.ndarray, b: list[np.float32]) -> bool:
    return a.tobytes() == np.array(b, dtype=np.float32).tobytes()


dims = st.one_of(st.sampled_from([1, 31, 32, 33, 64, 65]), st.integers(1, 200))
dtypes = st.sampled_from([np.float32, np.float16])


@given(dims, dtypes, st.integers(0, 20), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), st.integers(0))
def test_bits_equal_the_twins(
    dim: int, dtype: type[np.floating], n: int, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((n + 1, dim)) * scale).astype(dtype)
    query = (rng.standard_normal(dim) * scale).astype(np.float32)
    if seed % 3 == 0:
        query = features[0].astype(np.float32)
    rows = np.sort(rng.integers(0, n + 1, n))
    want = [slow.euclidean(features[row], query) for row in rows]
    assert same_bits(distances(features, rows, query), want)


numbers = st.floats(width=16, allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(numbers, st.floats(width=32)), min_size=1, max_size=70), dtypes)
def test_bits_equal_the_twins_for_any_numbers(
    pairs: list[tuple[float, float]], dtype: type[np.floating]
) -> None:
    features = np.array([[row for row, _ in pairs]], dtype=dtype)
    query = np.array([number for _, number in pairs], dtype=np.float32)
    got = distances(features, np.zeros(1, dtype=np.int64), query)
    assert same_bits(got, [slow.euclidean(features[0], query)])
    assert not np.isnan(got).any()


def test_every_half_is_widened_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        want = np.abs(halves.astype(np.float64)).astype(np.float32)
    want[np.isnan(want)] = np.inf
    got = distances(halves[:, None], np.arange(2**16), np.zeros(1, dtype=np.float32))
    # sqrt(x * x) is |x| again where the square neither overflows nor is subnormal.
    assert got.tobytes() == want.tobytes()


def test_overflow_is_infinite_and_the_greatest() -> None:
    features = np.array([[3e38], [1.0]], dtype=np.float32)
    got = distances(features, np.arange(2), np.array([-3e38], dtype=np.float32))
    assert got[0] == np.inf
    assert got[1] == np.inf  # (3e38)**2 is beyond float32 as well
    near = distances(features, np.arange(2), np.array([2.0], dtype=np.float32))
    assert near.tolist() == [np.inf, 1.0]


@given(st.integers(0, 6), st.integers(1, 90), dtypes, st.integers(0))
def test_rows_are_found_across_segments(
    segment_bits: int, n: int, dtype: type[np.floating], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    per_segment = 1 << segment_bits
    features = rng.standard_normal((n, 5)).astype(dtype)
    segments = [features[lo : lo + per_segment].copy() for lo in range(0, n, per_segment)]
    addresses = np.array([s.__array_interface__["data"][0] for s in segments], dtype=np.int64)
    query = rng.standard_normal(5).astype(np.float32)
    out = np.empty(n, dtype=np.float32)
    euclidean.distances(addresses, segment_bits, dtype == np.float16, np.arange(n), query, out)
    assert same_bits(out, [slow.euclidean(row, query) for row in features])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_symmetric_zero_on_itself_and_close_to_the_real_distance(
    dtype: type[np.floating],
) -> None:
    rng = np.random.default_rng(7)
    a = rng.standard_normal((2, 4096)).astype(dtype)
    first, second = a.astype(np.float32)
    row = np.arange(2)
    assert distances(a, row, first)[0] == 0
    assert distances(a, row, second)[1] == 0
    assert distances(a, row, first)[1] == distances(a, row, second)[0]
    real = np.linalg.norm(a[0].astype(np.float64) - a[1].astype(np.float64))
    # 128 additions in a lane, 5 across: the error is far below dim roundings.
    assert abs(distances(a, row, first)[1] - real) < 140 * np.finfo(np.float32).eps * real


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(8)
    features = rng.standard_normal((999, 100)).astype(np.float32)
    before = numba.get_num_threads()
    try:
        got = []
        for n_threads in (1, 2):
            numba.set_num_threads(n_threads)
            got.append(distances(features, np.arange(999), features[3]).tobytes())
    finally:
        numba.set_num_threads(before)
    assert got[0] == got[1]
