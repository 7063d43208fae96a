"""Pools against brute force: alone, in batches, guessed well or badly, with room or without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import codes
from search_service import coarse, scan
from search_service.cancel import Cancel
from search_service.scan import Scratch
from search_service.snapshot import Snapshot
from tests.reference.kernels import hamming


@st.composite
def questions(draw: st.DrawFn) -> tuple[Snapshot, list[coarse.Wanted]]:
    n_bits = draw(st.one_of(st.sampled_from([8, 48, 64, 100, 512]), st.integers(1, 512)))
    n = draw(st.one_of(st.sampled_from([0, 1, 64, 65]), st.integers(0, 400)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    distinct = rng.random((draw(st.sampled_from([1, 3, 400])), n_bits)) < 0.5
    # Sorted codes are what a sample of evenly spread blocks knows least about.
    chosen = np.sort(rng.integers(0, len(distinct), n))
    snapshot = Snapshot.from_arrays(
        codes.pack(distinct[chosen] ^ (rng.random((n, n_bits)) < 0.02)),
        n_bits=n_bits,
        dead=rng.random(n) < 0.3 if draw(st.booleans()) else None,
    )
    wanted = []
    for _ in range(draw(st.integers(1, 4))):
        near = distinct[rng.integers(0, len(distinct))] ^ (rng.random(n_bits) < 0.05)
        wanted.append(
            coarse.Wanted(
                query=codes.as_words(codes.pack(near)[None])[:, 0],
                radius_bits=draw(st.none() | st.integers(0, n_bits)),
                n_rows=draw(st.sampled_from([0, 1, 10, 100, 1000])),
                max_rows=draw(st.none() | st.sampled_from([1, 5, 50])),
            )
        )
    return snapshot, wanted


def assert_right(pool: coarse.Pool, snapshot: Snapshot, wanted: coarse.Wanted) -> None:
    packed = snapshot.codes_of(np.arange(snapshot.rows))
    query = codes.from_words(wanted.query[:, None], snapshot.n_bits)[0].tobytes()
    alive = sorted(
        (hamming(packed[row].tobytes(), query), row)
        for row in range(snapshot.rows)
        if snapshot.dead is None or not snapshot.dead[row]
    )
    threshold = wanted.radius_bits
    if threshold is None:
        n = min(wanted.n_rows, len(alive))
        threshold = alive[n - 1][0] if n else 0
    ball = [pair for pair in alive if pair[0] <= threshold]
    kept = sorted(row for _, row in ball[: wanted.max_rows])
    assert pool.threshold_bits == threshold
    assert pool.rows.tolist() == kept
    distance_of = {row: bits for bits, row in ball}
    assert pool.hamming_bits.tolist() == [distance_of[row] for row in kept]
    counts = [sum(bits == d for bits, _ in ball) for d in range(threshold + 1)]
    assert pool.histogram.tolist() == counts
    assert pool.truncated == (len(kept) < len(ball))


def find(snapshot: Snapshot, wanted: list[coarse.Wanted]) -> list[coarse.Pool]:
    return coarse.find_pools(snapshot, wanted, scratch=Scratch(), cancel=Cancel())


@given(questions(), st.sampled_from([0, 1 << 21]))
def test_pools_equal_brute_force(
    question: tuple[Snapshot, list[coarse.Wanted]], serial_bytes: int
) -> None:
    snapshot, wanted = question
    with pytest.MonkeyPatch.context() as patch:
        # Small tables are searched in one call unless that is turned off.
        patch.setattr(coarse, "_SERIAL_BYTES", serial_bytes)
        pools = find(snapshot, wanted)
    assert len(pools) == len(wanted)
    for pool, one in zip(pools, wanted, strict=True):
        assert_right(pool, snapshot, one)


@given(
    questions(),
    st.sampled_from([0, 1, 20]),
    st.sampled_from([0, 50, 1000]),
    st.sampled_from([0, 1 << 21]),
)
def test_bad_guesses_and_little_room_change_nothing(
    question: tuple[Snapshot, list[coarse.Wanted]],
    spare_rows: int,
    max_listed: int,
    serial_bytes: int,
) -> None:
    snapshot, wanted = question
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SPARE_ROWS", spare_rows)
        patch.setattr(coarse, "_MAX_LISTED", max_listed)
        patch.setattr(scan, "_SAMPLE_ROWS", (16, 16))
        patch.setattr(scan, "_SCAN_ROWS", 64)
        patch.setattr(coarse, "_SERIAL_BYTES", serial_bytes)
        patch.setattr(coarse, "_SERIAL_ROOM", spare_rows)
        pools = find(snapshot, wanted)
    for pool, one in zip(pools, wanted, strict=True):
        assert_right(pool, snapshot, one)


def test_a_pool_stays_as_it_is_when_the_scratch_is_used_again() -> None:
    packed = np.random.default_rng(1).integers(0, 256, (500, 8), dtype=np.uint8)
    snapshot, scratch = Snapshot.from_arrays(packed, n_bits=64), Scratch()
    wanted = [
        coarse.Wanted(query=codes.as_words(packed[row : row + 1])[:, 0], radius_bits=30, n_rows=0)
        for row in (1, 2)
    ]
    for serial_bytes in (0, 1 << 21):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coarse, "_SERIAL_BYTES", serial_bytes)
            first, _ = (
                coarse.find_pools(snapshot, [one], scratch=scratch, cancel=Cancel())[0]
                for one in wanted
            )
        assert_right(first, snapshot, wanted[0])


def test_no_queries_no_pools() -> None:
    snapshot = Snapshot.from_arrays(np.zeros((3, 1), dtype=np.uint8), n_bits=8)
    assert find(snapshot, []) == []
