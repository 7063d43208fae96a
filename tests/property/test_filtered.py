"""Filters against brute force: the same answer as if what does not pass were not there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens import codes, convert
from hashlens.errors import CancelledError, DeadlineError
from hashlens.types import Embedding, SearchOptions, SearchResult, TagFilter
from search_service import ball, coarse, filtered, scan, views
from search_service.ball_stream import Ball, BallStreamer
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.executor import Executor
from search_service.exhaustive import ExhaustiveScan
from search_service.filtered import restricted
from search_service.multi_index import MultiIndex
from search_service.one_query import Ask
from search_service.snapshot import Snapshot, Texts
from search_service.storage import layout
from search_service.storage.tag_index import TagIndex
from tests.property.test_engine_oracle import compare, options, tables, without_timings
from tests.reference import search as slow
from tests.reference.kernels import hamming

ENGINE = Engine()
WORDS = ["a", "b", "é", "\uffee", "\U0001f600", "a b", "x" * 255]


@st.composite
def filters(draw: st.DrawFn) -> TagFilter:
    chosen = st.lists(st.sampled_from([*WORDS, "nobody has it"]), max_size=4, unique=True)
    return TagFilter(any=tuple(draw(chosen)), all=tuple(draw(chosen)), none=tuple(draw(chosen)))


@settings(max_examples=150)
@given(
    tagged=st.lists(st.sets(st.sampled_from(WORDS), max_size=4), max_size=40),
    steps=st.lists(st.integers(1, 7), min_size=1, max_size=10),
    wanted=filters(),
    data=st.data(),
)
def test_an_index_knows_who_has_which_tags(
    tagged: list[set[str]], steps: list[int], wanted: TagFilter, data: st.DataObject
) -> None:
    """However it came to be, and for a version that is older than it is."""
    index = TagIndex()
    texts = Texts.of([layout.pack_tags(sorted(tags)) for tags in tagged])
    at = 0
    while not index.extend(texts, len(tagged), steps[at % len(steps)]):
        at += 1
    rows = data.draw(st.integers(0, len(tagged)))
    expected = [
        row
        for row in range(rows)
        if slow.passes(sorted(tagged[row]), wanted.any, wanted.all, wanted.none)
    ]
    assert index.passing(wanted, rows).tolist() == expected
    assert index.n_tags == len(set().union(*tagged))


def through(
    made: Any, data: st.DataObject
) -> tuple[slow.Table, Snapshot, Snapshot, Embedding, np.ndarray]:
    """A table, the snapshot and what a filter leaves of it, gathered or not; the rows that pass."""
    table, snapshot, query = made
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    passing = rng.random(snapshot.rows) < data.draw(st.sampled_from([0.0, 0.03, 0.3, 1.0]))
    few_share = data.draw(st.sampled_from([0, 16, 1 << 40]))
    view = restricted(snapshot, np.flatnonzero(passing), few_share=few_share)
    dead = np.zeros(snapshot.rows, bool) if table.dead is None else np.asarray(table.dead)
    return replace(table, dead=dead | ~passing), snapshot, view, query, passing


@settings(max_examples=150)
@given(st.data(), tables())
def test_same_answer_as_without_the_others(data: st.DataObject, made: Any) -> None:
    table, _, view, query, _ = through(made, data)
    chosen = data.draw(options(view.n_bits))
    compare((table, view, query), chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "_SERIAL_BYTES", 0)
        patch.setattr(scan, "_SCAN_ROWS", 64)
        compare((table, view, query), chosen)


@settings(max_examples=50)
@given(st.data(), tables())
def test_a_batch_through_a_filter(data: st.DataObject, made: Any) -> None:
    _, _, view, query, _ = through(made, data)
    asks = [
        Ask(query=query, options=data.draw(options(view.n_bits)))
        for _ in range(data.draw(st.integers(2, 5)))
    ]
    got: dict[int, Any] = {}
    ENGINE.search_batch(view, asks, got.__setitem__)
    for number, ask in enumerate(asks):
        want = ENGINE.search(view, query, ask.options)
        answer = got[number]
        assert isinstance(answer, SearchResult)
        assert tuple(answer.hits) == tuple(want.hits)
        assert without_timings(answer.receipt) == without_timings(want.receipt)


@settings(max_examples=60)
@given(st.data(), tables())
def test_the_exhaustive_answer_counts_the_same_rows(data: st.DataObject, made: Any) -> None:
    table, _, view, query, _ = through(made, data)
    if view.dim == 0:
        return
    k = data.draw(st.sampled_from([1, 5, 200]))
    exhaustive = ExhaustiveScan(view, query, k)
    for first_row in exhaustive.blocks:
        exhaustive.scan(first_row, Cancel())
    nearest = exhaustive.nearest()
    found = zip(nearest.ids, nearest.hamming_bits.tolist(), nearest.distances.tolist(), strict=True)
    assert list(found) == slow.exhaustive(table, query.code, query.feature, k)


@settings(max_examples=40)
@given(st.data(), tables())
def test_an_index_of_codes_serves_filtered_searches(data: st.DataObject, made: Any) -> None:
    table, snapshot, view, query, _ = through(made, data)
    if snapshot.rows == 0:
        return
    index = MultiIndex().extended(snapshot)
    radius_bits = data.draw(st.integers(0, min(3, view.n_bits)))
    packed = np.frombuffer(query.code, np.uint8)[np.newaxis]
    near = index.find(view, codes.as_words(packed)[:, 0], radius_bits)
    expected = [
        row
        for row, code in enumerate(table.codes)
        if not table.dead[row] and hamming(code, query.code) <= radius_bits
    ]
    assert near.rows.tolist() == expected


@pytest.fixture(scope="module")
def executor() -> Any:
    with Executor(n_threads=2) as executor:
        yield executor


@settings(max_examples=40)
@given(st.data(), tables())
def test_a_ball_has_those_that_pass(executor: Executor, data: st.DataObject, made: Any) -> None:
    table, _, view, query, _ = through(made, data)
    radius_bits = data.draw(st.integers(0, view.n_bits))
    wanted = Ball(view, query.code, radius_bits, with_payload=False, with_code=False)

    async def collect() -> list[Any]:
        messages = BallStreamer(executor, 1 << 20).stream(wanted, ends_s=time.monotonic() + 60)
        return [convert.ball_part_from_proto(message) async for message in messages]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ball, "BLOCK_ROWS", data.draw(st.sampled_from([64, 1 << 20])))
        parts = asyncio.run(collect())
    expected = [
        (table.ids[row], bits)
        for row, code in enumerate(table.codes)
        if not table.dead[row] and (bits := hamming(code, query.code)) <= radius_bits
    ]
    assert [(hit.id, hit.hamming_bits) for part in parts for hit in part.hits] == expected
    receipt = parts[-1].receipt
    assert (receipt.rows_scanned, receipt.pool_size) == (view.n_alive, len(expected))


def test_nobody_has_a_tag_in_arrays_of_ones_own() -> None:
    snapshot = Snapshot.from_arrays(np.zeros((3, 1), np.uint8), n_bits=8)
    query = Embedding(code=b"\0", n_bits=8, model_id="")
    none = SearchOptions(filter=TagFilter(none=("a",)))
    some = SearchOptions(filter=TagFilter(any=("a",)))
    assert len(ENGINE.search(snapshot, query, none).hits) == 3
    assert len(ENGINE.search(snapshot, query, some).hits) == 0
    assert ENGINE.search(snapshot, query, some).receipt.rows_scanned == 0


class Unready:
    """Ids of a table whose tags are never indexed."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids
        self.n_asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ids, name)

    def index_tags(self) -> bool:
        self.n_asked += 1
        return False


def test_who_waits_for_the_index_helps_until_the_deadline() -> None:
    snapshot = Snapshot.from_arrays(np.zeros((3, 1), np.uint8), n_bits=8)
    unready = Unready(snapshot.ids)
    snapshot = replace(snapshot, ids=unready)
    wanted = TagFilter(none=("a",))
    with pytest.MonkeyPatch.context() as patch:
        # A second an attempt.
        patch.setattr(filtered, "time", SimpleNamespace(monotonic=lambda: float(unready.n_asked)))
        with pytest.raises(DeadlineError):
            asyncio.run(filtered.reached(snapshot, wanted, 3.0))
    assert unready.n_asked == 3
    with pytest.raises(DeadlineError):
        filtered.filtered(snapshot, wanted, Cancel(0.1))
    left = Cancel()
    left.set()
    with pytest.raises(CancelledError):
        filtered.filtered(snapshot, wanted, left)
    assert asyncio.run(filtered.reached(snapshot, None, 0)) is snapshot


def test_views_make_room_for_those_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_MAX_BYTES", 250)
    snapshot = Snapshot.from_arrays(np.zeros((3, 1), np.uint8), n_bits=8)
    one, two, three = (TagFilter(any=(tag,)) for tag in "abc")
    kept = views.Views()
    for wanted in (one, two):
        kept.put(wanted, snapshot, 100)
    assert kept.get(one) is snapshot
    kept.put(three, snapshot, 100)
    assert [kept.get(wanted) for wanted in (one, two, three)] == [snapshot, None, snapshot]
    kept.put(two, snapshot, 1000)  # larger than all the room: kept, and alone
    assert [kept.get(wanted) for wanted in (one, two, three)] == [None, snapshot, None]
    kept.put(one, snapshot, 100)
    assert [kept.get(wanted) for wanted in (one, two)] == [snapshot, None]
