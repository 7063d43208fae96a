"""Exhaustive search against brute force, and what an audit says of a two-stage answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens.types import Embedding, Hit, SearchOptions
from search_service import exhaustive
from search_service.audit import compared
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.exhaustive import ExhaustiveScan
from search_service.snapshot import Snapshot
from tests.property.test_engine_oracle import options, tables
from tests.reference import search as slow

ENGINE = Engine()


def scanned(snapshot: Snapshot, query: Embedding, k: int) -> list[tuple[str, int, float]]:
    scan = ExhaustiveScan(snapshot, query, k)
    for first_row in scan.blocks:
        scan.scan(first_row, Cancel())
    nearest = scan.nearest()
    assert snapshot.ids_of(nearest.rows) == nearest.ids
    return list(
        zip(nearest.ids, nearest.hamming_bits.tolist(), nearest.distances.tolist(), strict=True)
    )


@settings(max_examples=80)
@given(
    made=tables().filter(lambda made: made[1].dim > 0),
    k=st.sampled_from([1, 2, 10, 100, 1000]),
    block=st.sampled_from([1, 7, 64, 1000]),
    room=st.sampled_from([1, 30, 4096]),
)
def test_the_nearest_of_all_rows_whatever_the_blocks(
    made: Any, k: int, block: int, room: int
) -> None:
    table, snapshot, query = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exhaustive, "_BLOCK_ROWS", block)
        patch.setattr(exhaustive, "_ROOM", room)
        assert scanned(snapshot, query, k) == slow.exhaustive(table, query.code, query.feature, k)


@settings(max_examples=60)
@given(st.data(), tables().filter(lambda made: made[1].dim > 0))
def test_an_audit_says_what_the_answer_missed(data: st.DataObject, made: Any) -> None:
    table, snapshot, query = made
    chosen: SearchOptions = data.draw(options(snapshot.n_bits))
    answer = ENGINE.search(snapshot, query, chosen)
    want = slow.exhaustive(table, query.code, query.feature, chosen.k)
    result = compared(answer, tuple(Hit(*hit) for hit in want))
    answered = {hit.id for hit in answer.hits}
    found = [item_id in answered for item_id, _, _ in want]
    assert result.recall == (sum(found) / len(found) if found else 1)
    assert result.first_miss == (found.index(False) if False in found else None)
    if answer.receipt.pool_size == snapshot.n_alive and answer.receipt.timings.fine_ns:
        assert (result.recall, result.first_miss) == (1, None)
