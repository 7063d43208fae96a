"""Audits beside other work: turns, limits, callers that leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hashlens import codes
from hashlens.errors import DeadlineError, OverloadedError, PreconditionError
from hashlens.types import CollectionSpec, Query, SearchOptions
from search_service import exhaustive
from search_service.answers import Answerer, together
from search_service.audit import Auditor, check_auditable
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.executor import Executor
from search_service.exhaustive import ExhaustiveScan
from search_service.one_query import embedding_of
from search_service.snapshot import Snapshot

N = 640
N_BITS = 16
BLOCK = 64


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(n_threads=2, max_queue=8) as executor:
        yield executor


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "_BLOCK_ROWS", BLOCK)


def table(features: np.ndarray | None = None, has_feature: np.ndarray | None = None) -> Snapshot:
    rng = np.random.default_rng(3)
    packed = codes.pack(rng.random((N, N_BITS)) < 0.5)
    if features is None:
        features = rng.standard_normal((N, 8)).astype(np.float32)
    return Snapshot.from_arrays(packed, n_bits=N_BITS, features=features, has_feature=has_feature)


def answerer(executor: Executor, snapshot: Snapshot, *, allowed_s: float = 30) -> Answerer:
    spec = CollectionSpec(name="c", model_id="", n_bits=N_BITS, dim=snapshot.dim)
    collection: Any = SimpleNamespace(spec=spec, is_lost=False)
    images: Any = None  # No query here is one.
    return Answerer(
        together=together(Engine()),
        is_alone=True,
        executor=executor,
        images=images,
        collection=collection,
        snapshot=snapshot,
        options=SearchOptions(k=10, min_pool=20),
        ends_s=time.monotonic() + allowed_s,
    )


def watched(monkeypatch: pytest.MonkeyPatch, before: Callable[[int, Cancel], None]) -> list[int]:
    """Have `before` called ahead of each block's scan; return the blocks that were scanned."""
    scanned: list[int] = []
    original = ExhaustiveScan.scan

    def scan(self: ExhaustiveScan, first_row: int, cancel: Cancel) -> None:
        before(first_row, cancel)
        original(self, first_row, cancel)
        scanned.append(first_row)

    monkeypatch.setattr(ExhaustiveScan, "scan", scan)
    return scanned


@pytest.mark.usefixtures("small_blocks")
def test_others_get_their_turn_between_blocks(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, go_on = threading.Event(), threading.Event()

    def hold_the_first(first_row: int, cancel: Cancel) -> None:
        if first_row == 0:
            first.set()
            go_on.wait(10)

    scanned = watched(monkeypatch, hold_the_first)

    async def both() -> list[int]:
        auditing = asyncio.ensure_future(
            Auditor(max_audits=1).audit(answerer(executor, table()), Query(id="5"), field="query")
        )
        assert await asyncio.to_thread(first.wait, 10)
        other = asyncio.ensure_future(executor.run(lambda cancel: list(scanned)))
        await asyncio.sleep(0)  # It waits now, behind the first block alone.
        go_on.set()
        seen = (await other).value
        await auditing
        return seen

    assert asyncio.run(both()) == [0]
    assert scanned == list(range(0, N, BLOCK))


@pytest.mark.usefixtures("small_blocks")
def test_a_caller_that_leaves_ends_the_work_and_frees_the_place(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, left = threading.Event(), threading.Event()

    def endless(first_row: int, cancel: Cancel) -> None:
        entered.set()
        ends_s = time.monotonic() + 10
        while not cancel.is_set and time.monotonic() < ends_s:
            time.sleep(0.001)
        if cancel.is_set:
            left.set()

    async def leave() -> None:
        auditor = Auditor(max_audits=1)
        with pytest.MonkeyPatch.context() as patch:
            scanned = watched(patch, endless)
            auditing = asyncio.ensure_future(
                auditor.audit(answerer(executor, table()), Query(id="5"), field="query")
            )
            assert await asyncio.to_thread(entered.wait, 10)
            auditing.cancel()
            with suppress(asyncio.CancelledError):
                await auditing
            assert await asyncio.to_thread(left.wait, 10)
            await executor.run(lambda cancel: None, deadline_s=20)
            assert scanned == []  # The block noticed, and none came after it.
        result = await auditor.audit(answerer(executor, table()), Query(id="5"), field="query")
        assert result.exhaustive_hits[0].id == "5"

    asyncio.run(leave())


@pytest.mark.usefixtures("small_blocks")
def test_the_deadline_holds_between_blocks(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = watched(monkeypatch, lambda first_row, cancel: time.sleep(0.2))
    auditing = Auditor(max_audits=1).audit(
        answerer(executor, table(), allowed_s=0.5), Query(id="5"), field="query"
    )
    with pytest.raises(DeadlineError):
        asyncio.run(auditing)
    assert len(scanned) < N // BLOCK


def test_one_more_than_may_is_told_when_to_come_back(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold(first_row: int, cancel: Cancel) -> None:
        entered.set()
        go_on.wait(10)

    watched(monkeypatch, hold)

    async def crowd() -> None:
        auditor = Auditor(max_audits=2)

        def audit() -> Any:
            return auditor.audit(answerer(executor, table()), Query(id="5"), field="query")

        running = [asyncio.ensure_future(audit()) for _ in range(2)]
        try:
            assert await asyncio.to_thread(entered.wait, 10)
            with pytest.raises(OverloadedError) as caught:
                await audit()
            assert caught.value.retry_after_s >= 0.1
        finally:
            go_on.set()
            await asyncio.gather(*running)
        assert (await audit()).recall > 0

    asyncio.run(crowd())


def test_however_many_are_alike_few_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "_BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(exhaustive, "_ROOM", 20)
    rng = np.random.default_rng(1)
    packed = np.zeros((N, 2), dtype=np.uint8)
    ids = [f"{number:03}" for number in rng.permutation(N)]
    snapshot = Snapshot.from_arrays(
        packed, n_bits=N_BITS, features=np.zeros((N, 8), np.float32), ids=ids
    )
    most = 0
    ids_of = Snapshot.ids_of

    def counted(self: Snapshot, rows: np.ndarray) -> list[str]:
        nonlocal most
        most = max(most, rows.shape[0])
        return ids_of(self, rows)

    # All are tied, so all that are held are asked for their ids.
    monkeypatch.setattr(Snapshot, "ids_of", counted)
    scan = ExhaustiveScan(snapshot, embedding_of(snapshot, "007"), 10)
    for first_row in scan.blocks:
        scan.scan(first_row, Cancel())
    assert scan.nearest().ids == [f"{i:03}" for i in range(10)]
    assert 0 < most <= 20 + BLOCK


def test_rows_without_a_feature_are_neither_found_nor_asked_by(executor: Executor) -> None:
    has_feature = np.ones(N, dtype=np.uint8)
    has_feature[[5, 7]] = 0
    features = np.zeros((N, 8), dtype=np.float32)
    features[:, 0] = np.arange(N)
    snapshot = table(features, has_feature)
    auditor = Auditor(max_audits=1)
    result = asyncio.run(auditor.audit(answerer(executor, snapshot), Query(id="6"), field="query"))
    found = [hit.id for hit in result.exhaustive_hits]
    assert found[:3] == ["6", "4", "8"] or found[:3] == ["6", "8", "4"]
    assert not {"5", "7"} & set(found)
    asked = auditor.audit(answerer(executor, snapshot), Query(id="5"), field="search.query")
    with pytest.raises(PreconditionError) as caught:
        asyncio.run(asked)
    assert caught.value.field == "search.query.id"


def test_codes_alone_cannot_be_audited() -> None:
    spec = CollectionSpec(name="c", model_id="", n_bits=N_BITS, dim=0)
    with pytest.raises(PreconditionError, match="codes only") as caught:
        check_auditable(spec, field="search.collection")
    assert caught.value.field == "search.collection"
