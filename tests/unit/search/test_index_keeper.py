from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from search_service import index_keeper
from search_service.index_keeper import IndexKeeper
from search_service.multi_index import MultiIndex, index_bytes
from search_service.snapshot import Snapshot

WAIT_S = 60.0
ROWS = 1000


def table(name: str, rows: int = ROWS) -> Snapshot:
    packed = np.random.default_rng(7).integers(0, 256, (rows, 4), dtype=np.uint8)
    return _named(Snapshot.from_arrays(packed, n_bits=32), name)


def _named(snapshot: Snapshot, name: str) -> Snapshot:
    object.__setattr__(snapshot, "table_id", name)
    return snapshot


@pytest.fixture
def keeper() -> Iterator[IndexKeeper]:
    made = IndexKeeper(1 << 30, min_rows=100)
    yield made
    made.close()
    assert "index" not in {thread.name for thread in threading.enumerate()}


def built(keeper: IndexKeeper, snapshot: Snapshot) -> MultiIndex | None:
    keeper.index_for(snapshot)
    assert keeper.wait_idle(WAIT_S)
    return keeper.index_for(snapshot)


def test_asking_makes_an_index_that_later_versions_use(keeper: IndexKeeper) -> None:
    first = table("a")
    assert keeper.index_for(first) is None
    assert keeper.wait_idle(WAIT_S)
    index = keeper.index_for(first)
    assert index is not None
    assert index.rows == ROWS
    assert keeper.nbytes == index.nbytes
    assert keeper.index_for(table("a", ROWS + 99)) is index
    grown = built(keeper, table("a", ROWS + 100))
    assert grown is not None
    assert grown.rows == ROWS + 100
    # An earlier version has not got all rows that are indexed now.
    assert keeper.index_for(first) is None


def test_small_and_unnamed_tables_are_left_alone(keeper: IndexKeeper) -> None:
    for snapshot in (table("a", 99), table("", ROWS)):
        assert built(keeper, snapshot) is None
    assert keeper.nbytes == 0
    assert IndexKeeper(0).index_for(table("a")) is None


def test_tables_do_not_mix(keeper: IndexKeeper) -> None:
    assert built(keeper, table("a")) is not built(keeper, table("b"))


def test_memory_is_bounded_and_the_idle_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = IndexKeeper(index_bytes(32, ROWS) * 3 // 2, min_rows=100)
    try:
        assert built(keeper, table("a")) is not None
        assert built(keeper, table("b")) is None
        monkeypatch.setattr(index_keeper, "_IDLE_S", 0.0)
        assert built(keeper, table("c")) is not None
        assert keeper.nbytes <= index_bytes(32, ROWS) * 3 // 2
    finally:
        keeper.close()


def test_closing_stops_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()
    ended: list[str] = []

    def extended(self: MultiIndex, snapshot: Snapshot, should_stop: Any) -> MultiIndex:
        began.set()
        while not should_stop():
            threading.Event().wait(0.001)
        ended.append("told")
        raise InterruptedError

    monkeypatch.setattr(MultiIndex, "extended", extended)
    keeper = IndexKeeper(1 << 30, min_rows=100)
    keeper.index_for(table("a"))
    assert began.wait(WAIT_S)
    keeper.close()
    assert ended == ["told"]
    assert keeper.index_for(table("a")) is None


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a defect")])
def test_a_failed_build_is_no_end(
    keeper: IndexKeeper, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried: list[str] = []

    def extended(self: MultiIndex, *_: Any) -> MultiIndex:
        tried.append("once")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MultiIndex, "extended", extended)
        assert built(keeper, table("a")) is None
        assert built(keeper, table("a")) is None
        assert tried == ["once"]  # not at every search
    assert built(keeper, table("b")) is not None
    monkeypatch.setattr(index_keeper, "_IDLE_S", 0.0)
    assert built(keeper, table("a")) is not None


def test_a_table_that_made_room_while_it_waited_is_indexed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extended = MultiIndex.extended
    began, go_on = threading.Event(), threading.Event()

    def slowly(self: MultiIndex, *args: Any) -> MultiIndex:
        began.set()
        assert go_on.wait(WAIT_S)
        return extended(self, *args)

    monkeypatch.setattr(MultiIndex, "extended", slowly)
    keeper = IndexKeeper(1 << 30, min_rows=100)
    try:
        keeper.index_for(table("a"))
        assert began.wait(WAIT_S)
        keeper.index_for(table("b"))
        del keeper._tables["b"]  # as `_make_room` does with who is idle
        go_on.set()
        assert keeper.wait_idle(WAIT_S)
        assert keeper.index_for(table("a")) is not None
        assert keeper.index_for(table("b")) is not None
    finally:
        go_on.set()
        keeper.close()
