"""Multi-index hashing: whatever it answers, a scan would have answered, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import codes
from search_service import coarse, multi_index
from search_service.cancel import Cancel
from search_service.multi_index import MultiIndex
from search_service.scan import Scratch
from search_service.snapshot import Snapshot
from tests.reference.kernels import hamming


def make(rng: np.random.Generator, n: int, n_bits: int, n_centres: int, deaths: float) -> Snapshot:
    centres = rng.random((n_centres, n_bits)) < 0.5
    bits = centres[rng.integers(0, n_centres, n)] ^ (rng.random((n, n_bits)) < 0.03)
    return Snapshot.from_arrays(
        codes.pack(bits), n_bits=n_bits, dead=rng.random(n) < deaths if deaths else None
    )


def first_rows(snapshot: Snapshot, n: int) -> Snapshot:
    """An earlier version of the same table."""
    dead = None if snapshot.dead is None else snapshot.dead[:n]
    return Snapshot.from_arrays(snapshot.codes_of(np.arange(n)), n_bits=snapshot.n_bits, dead=dead)


@st.composite
def questions(draw: st.DrawFn) -> tuple[Snapshot, MultiIndex, np.ndarray]:
    """A table, an index of its first rows in a few pieces, and a query."""
    n_bits = draw(st.one_of(st.sampled_from([1, 8, 48, 64, 65, 128]), st.integers(1, 512)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 300))
    n_centres = draw(st.sampled_from([1, 4, 100]))
    snapshot = make(rng, n, n_bits, n_centres, draw(st.sampled_from([0.0, 0.4])))
    index = MultiIndex()
    for share in draw(st.sampled_from([[1.0], [0.5], [0.6, 0.9], [0.3, 0.35, 1.0]])):
        rows = max(int(share * n), 1)
        if rows > index.rows:
            index = index.extended(first_rows(snapshot, rows))
    near = codes.unpack(snapshot.codes_of(np.array([rng.integers(0, n)])), n_bits)[0]
    flipped = near ^ (rng.random(n_bits) < draw(st.sampled_from([0.0, 0.02, 0.5])))
    return snapshot, index, codes.as_words(codes.pack(flipped)[None])[:, 0]


@given(questions(), st.integers(0, 12))
def test_a_ball_equals_brute_force(
    question: tuple[Snapshot, MultiIndex, np.ndarray], radius: int
) -> None:
    snapshot, index, query = question
    radius = min(radius, snapshot.n_bits)
    if math.isinf(index.cost_ns(query, radius)):
        return
    near = index.find(snapshot, query, radius)
    packed = snapshot.codes_of(np.arange(index.rows))
    asked = codes.from_words(query[:, None], snapshot.n_bits)[0].tobytes()
    want = [
        (row, bits)
        for row in range(index.rows)
        if (bits := hamming(packed[row].tobytes(), asked)) <= radius
        and not (snapshot.dead is not None and snapshot.dead[row])
    ]
    assert list(zip(near.rows.tolist(), near.hamming_bits.tolist(), strict=True)) == want
    assert near.counts.tolist() == [
        sum(bits == distance for _, bits in want) for distance in range(radius + 1)
    ]
    assert near.n_compared >= len(want)


@given(questions(), st.none() | st.integers(0, 12), st.sampled_from([1, 5, 50]))
def test_a_pool_by_the_index_equals_the_scan_s(
    question: tuple[Snapshot, MultiIndex, np.ndarray], radius: int | None, n_rows: int
) -> None:
    snapshot, index, query = question
    wanted = [
        coarse.Wanted(
            query=query,
            radius_bits=None if radius is None else min(radius, snapshot.n_bits),
            n_rows=n_rows,
            max_rows=max_rows,
        )
        for max_rows in (None, 3)
    ]
    scratch, cancel = Scratch(), Cancel()
    by_scan = coarse.find_pools(snapshot, wanted, scratch=scratch, cancel=cancel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "SPARE_ROWS", 2)
        patch.setattr(coarse, "INDEX_SHARE", math.inf)
        patch.setattr(coarse, "_TRIAL_SHARE", 1e6)  # cheap enough to be tried at any size
        by_index = coarse.find_pools(snapshot, wanted, scratch=scratch, cancel=cancel, index=index)
    for one, other in zip(by_scan, by_index, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.hamming_bits.tolist() == other.hamming_bits.tolist()
        assert one.threshold_bits == other.threshold_bits
        assert one.histogram.tolist() == other.histogram.tolist()
        assert one.truncated == other.truncated


def test_the_index_is_asked_where_it_is_cheaper_and_only_there() -> None:
    rng = np.random.default_rng(1)
    spread = Snapshot.from_arrays(
        np.frombuffer(rng.bytes(8 * 200_000), dtype=np.uint8).reshape(-1, 8), n_bits=64
    )
    crowded = make(rng, 200_000, 64, 1, 0.0)
    for snapshot, radius, is_cheaper in (
        (spread, 2, True),
        (spread, 40, False),
        (crowded, 2, False),
    ):
        index = MultiIndex().extended(snapshot)
        query = np.array([snapshot.words[0][7]])
        wanted = [coarse.Wanted(query=query, radius_bits=radius, n_rows=0)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coarse, "INDEX_SHARE", 2.0)  # a table this small is scanned at once
            patch.setattr(coarse, "_SERIAL_BYTES", 0)
            (pool,) = coarse.find_pools(
                snapshot, wanted, scratch=Scratch(), cancel=Cancel(), index=index
            )
        assert (pool.n_compared < snapshot.rows) == is_cheaper
        assert 7 in pool.rows


def test_pieces_stay_few_and_cover_all() -> None:
    rng = np.random.default_rng(2)
    snapshot = make(rng, 64 * 40, 32, 100, 0.0)
    index, sizes = MultiIndex(), []
    for rows in range(64, snapshot.rows + 1, 64):
        index = index.extended(first_rows(snapshot, rows))
        assert index.rows == rows
        sizes.append(len(index._pieces))
    assert max(sizes) <= math.log2(40) + 1
    assert index.nbytes == sum(piece.nbytes for piece in index._pieces)
    for before, after in zip(index._pieces[:-1], index._pieces[1:], strict=True):
        assert before.stop == after.start


@pytest.mark.parametrize(("n_bits", "rows"), [(64, 10**8), (48, 2_500_000), (512, 10**6), (1, 9)])
def test_substrings_cover_the_code(n_bits: int, rows: int) -> None:
    first_bits, widths = multi_index.substrings(n_bits, rows)
    assert first_bits[0] == 0
    assert (first_bits[1:] == np.cumsum(widths)[:-1]).all()
    assert widths.sum() == n_bits
    assert widths.max() - widths.min() <= 1
    assert widths.max() <= 26


def test_building_stops_when_told() -> None:
    snapshot = make(np.random.default_rng(3), 100, 32, 10, 0.0)
    with pytest.raises(InterruptedError):
        MultiIndex().extended(snapshot, lambda: True)


def test_memory_is_as_announced() -> None:
    snapshot = make(np.random.default_rng(4), 5000, 48, 100, 0.0)
    assert MultiIndex().extended(snapshot).nbytes == multi_index.index_bytes(48, 5000)
