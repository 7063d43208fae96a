"""Streamed balls against a scan by eye, in blocks of any size."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens import codes, convert
from hashlens.types import BallPart, Hit
from search_service import ball, ball_stream
from search_service.ball_stream import Ball, BallStreamer
from search_service.executor import Executor
from search_service.snapshot import Snapshot
from tests.reference.kernels import hamming


@pytest.fixture(scope="module")
def executor() -> object:
    with Executor(n_threads=2) as executor:
        yield executor


@dataclass
class Case:
    packed: np.ndarray
    n_bits: int
    dead: np.ndarray | None
    query: bytes
    radius_bits: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_bits = draw(st.sampled_from([1, 8, 9, 48, 64, 65, 130]))
    n = draw(st.sampled_from([0, 1, 63, 64, 65, 128, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    packed = codes.pack(rng.random((n, n_bits)) < draw(st.sampled_from([0.1, 0.5])))
    dead = rng.random(n) < draw(st.sampled_from([0.3, 1.0])) if draw(st.booleans()) else None
    query = codes.pack(rng.random(n_bits) < 0.3).tobytes()
    if n and draw(st.booleans()):
        query = packed[int(rng.integers(n))].tobytes()
    return Case(packed, n_bits, dead, query, draw(st.integers(0, n_bits)))


def parts_of(executor: Executor, wanted: Ball) -> list[BallPart]:
    async def collect() -> list[BallPart]:
        streamer = BallStreamer(executor, 1 << 20)
        messages = streamer.stream(wanted, ends_s=time.monotonic() + 60)
        return [convert.ball_part_from_proto(message) async for message in messages]

    return asyncio.run(collect())


@settings(max_examples=60)
@given(case=cases(), block=st.sampled_from([64, 128, 1 << 20]), per_message=st.integers(1, 70))
def test_a_ball_is_every_alive_row_within_the_radius_in_order(
    executor: Executor, case: Case, block: int, per_message: int
) -> None:
    snapshot = Snapshot.from_arrays(case.packed, n_bits=case.n_bits, dead=case.dead, version=7)
    wanted = Ball(snapshot, case.query, case.radius_bits, with_payload=True, with_code=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ball, "BLOCK_ROWS", block)
        patch.setattr(ball_stream, "MESSAGE_HITS", per_message)
        parts = parts_of(executor, wanted)

    expected = [
        Hit(id=str(row), hamming_bits=bits, distance=None, code=code.tobytes())
        for row, code in enumerate(case.packed)
        if case.dead is None or not case.dead[row]
        if (bits := hamming(code.tobytes(), case.query)) <= case.radius_bits
    ]
    assert [hit for part in parts for hit in part.hits] == expected
    assert all(len(part.hits) <= per_message for part in parts)
    assert [part.receipt is None for part in parts] == [True] * (len(parts) - 1) + [False]
    receipt = parts[-1].receipt
    assert receipt is not None
    assert receipt.pool_histogram == tuple(
        sum(hit.hamming_bits == bits for hit in expected) for bits in range(case.radius_bits + 1)
    )
    n_alive = len(case.packed) if case.dead is None else int((~case.dead).sum())
    assert receipt.rows_scanned == n_alive
    assert (receipt.pool_size, receipt.threshold_bits) == (len(expected), case.radius_bits)
    assert (receipt.version, receipt.exact, receipt.pool_truncated) == (7, True, False)
