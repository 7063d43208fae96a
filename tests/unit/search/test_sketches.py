from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from hashlens.errors import InvalidInputError
from hashlens.types import Embedding, SearchOptions
from search_service import sketch, sketches
from search_service.cancel import Cancel
from search_service.config import SearchConfig
from search_service.engine import Engine
from search_service.sketches import Sketches
from search_service.snapshot import Snapshot

DIM = 64


def snapshot_of(n: int, table_id: str, *, dim: int = DIM) -> Snapshot:
    """The first `n` rows of always the same table."""
    features = np.random.default_rng(5).standard_normal((1000, dim)).astype(np.float32)[:n]
    packed = np.zeros((n, 1), dtype=np.uint8)
    features = features if dim else None
    return replace(
        Snapshot.from_arrays(packed, n_bits=8, features=features, rows_per_segment=128),
        table_id=table_id,
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, made 10 at a time."""
    monkeypatch.setattr(sketch, "_BLOCK_BYTES", 64 * sketch.row_bytes(DIM))
    monkeypatch.setattr(sketch, "_STEP_BYTES", 10 * 4 * DIM)


@pytest.fixture
def keeper() -> Iterator[Callable[[int], Sketches]]:
    """Makes keepers with memory for so many blocks, and closes them."""
    made = []

    def make(blocks: int) -> Sketches:
        made.append(Sketches(blocks * 64 * sketch.row_bytes(DIM)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wait_for(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_s, "it does not come about"
        time.sleep(0.002)


def rows_of(keeper: Sketches, snapshot: Snapshot) -> int:
    found = keeper.of(snapshot)
    return 0 if found is None else found.rows


def test_the_first_search_begins_it_and_later_ones_extend_it(keeper) -> None:
    kept = keeper(100)
    first, later = snapshot_of(100, "a"), snapshot_of(230, "a")
    assert kept.of(first) is None
    wait_for(lambda: rows_of(kept, first) == 100)
    before = kept.of(first)
    wait_for(lambda: rows_of(kept, later) == 230)
    assert before.rows == 100
    query = np.ones(DIM, dtype=np.float32)
    rows = np.arange(100)
    after = kept.of(later).bounds(rows, query, Cancel())
    assert before.bounds(rows, query, Cancel())[1].tobytes() == after[1].tobytes()
    assert kept.nbytes == kept.of(later).nbytes == 4 * 64 * sketch.row_bytes(DIM)


def test_an_older_snapshot_does_not_shrink_it(keeper) -> None:
    kept = keeper(100)
    newer = snapshot_of(200, "a")
    wait_for(lambda: rows_of(kept, newer) == 200)
    assert rows_of(kept, snapshot_of(50, "a")) == 200


def test_what_is_no_table_has_none(keeper) -> None:
    kept = keeper(100)
    assert kept.of(snapshot_of(100, "")) is None
    assert kept.of(snapshot_of(100, "codes only", dim=0)) is None
    time.sleep(0.02)
    assert kept.nbytes == 0


def test_memory_is_bounded_and_an_idle_table_makes_room(
    keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keeper(3)
    a, b = snapshot_of(1000, "a"), snapshot_of(100, "b")
    wait_for(lambda: rows_of(kept, a) == 192)  # what three blocks hold
    assert kept.of(b) is None
    time.sleep(0.05)
    assert kept.of(b) is None  # the other one is in use
    assert kept.nbytes == 3 * 64 * sketch.row_bytes(DIM)
    kept.close()

    monkeypatch.setattr(sketches, "_IDLE_S", 0.0)
    kept = keeper(3)
    wait_for(lambda: rows_of(kept, a) == 192)
    wait_for(lambda: rows_of(kept, b) == 100)
    assert kept.nbytes <= 3 * 64 * sketch.row_bytes(DIM)


def test_a_table_that_cannot_be_read_is_left_alone(
    keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keeper(100)
    real = sketch.Sketch.extended

    def fails(self, snapshot, max_bytes):
        if snapshot.table_id == "bad":
            raise OSError("no such luck")
        return real(self, snapshot, max_bytes)

    monkeypatch.setattr(sketch.Sketch, "extended", fails)
    assert kept.of(snapshot_of(100, "bad")) is None
    wait_for(lambda: "bad is not extended any further" in caplog.text)
    good = snapshot_of(100, "good")
    wait_for(lambda: rows_of(kept, good) == 100)
    assert kept.of(snapshot_of(100, "bad")) is None


def test_closing_ends_it(keeper) -> None:
    kept = keeper(100)
    snapshot = snapshot_of(1000, "a")
    kept.of(snapshot)
    kept.close()
    assert kept.of(snapshot) is None
    assert kept.nbytes == 0
    kept.close()


def test_the_engine_answers_the_same_with_and_without(keeper) -> None:
    kept = keeper(100)
    snapshot = snapshot_of(900, "a")
    wait_for(lambda: rows_of(kept, snapshot) == 900)
    plain, sketching = Engine(), Engine(sketches=kept)
    sketching.warm_up()
    looked: list[int] = []
    bounds = sketch.Sketch.bounds

    def counted(self, rows, query, cancel):
        looked.append(len(rows))
        return bounds(self, rows, query, cancel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch.Sketch, "bounds", counted)
        for row in (0, 500, 899):
            query = Embedding(code=b"\0", n_bits=8, model_id="", feature=snapshot.feature_of(row))
            options = SearchOptions(k=7, max_hamming_bits=8)
            want, got = (engine.search(snapshot, query, options) for engine in (plain, sketching))
            assert got.hits == want.hits
            assert got.hits[0].id == str(row)
            assert got.receipt.pool_size == want.receipt.pool_size == 900
            assert got.receipt.exact
    assert looked == [900] * 3


def test_the_setting_is_checked() -> None:
    with pytest.raises(InvalidInputError, match="sketch_memory_mb"):
        SearchConfig(sketch_memory_mb=-1)
