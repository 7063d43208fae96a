"""Compaction of one collection's files, past Redis."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.snapshot import Snapshot
from search_service.storage import Record, layout, manifest
from search_service.storage.compaction import Compacted, Pace, compact
from search_service.storage.local import LocalCollection
from tests.support.local_files import SPEC, delete, make, put
from tests.support.stores import Model, contents, make_record, make_records, on_disk


def pace(bytes_per_s: float = 0) -> Pace:
    return Pace(bytes_per_s, threading.Event())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few rows need several."""
    monkeypatch.setattr("search_service.storage.generation_reader._BLOCK_ROWS", 16)
    monkeypatch.setattr("search_service.storage.generation_reader._BLOCK_BYTES", 600)


def history(local: LocalCollection, model: Model, n: int, seed: int = 0) -> None:
    """Updates and deletes at random."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        ids = [f"i{i}" for i in rng.choice(300, size=40, replace=False)]
        put(local, model, [make_record(local.spec, item_id, rng) for item_id in ids])
        doomed = rng.choice(sorted(model.items), size=10, replace=False)
        delete(local, model, [str(item_id) for item_id in doomed])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def generations(directory: Path) -> set[int | None]:
    return {layout.generation_of(name) for name in names(directory)} - {None}


@pytest.mark.parametrize("n_bits", [1, 64, 100, 512])
@pytest.mark.parametrize(("dim", "dtype"), [(0, "f16"), (3, "f16"), (5, "f32")])
@pytest.mark.usefixtures("small_blocks")
def test_what_is_alive_stays_in_its_order(
    tmp_path: Path, n_bits: int, dim: int, dtype: str
) -> None:
    spec = CollectionSpec("c", "m", n_bits, dim, FeatureDtype(dtype), 1000)
    local, model = make(tmp_path, spec), Model()
    history(local, model, 8)
    before = local.snapshot
    assert before.dead is not None
    alive = np.flatnonzero(before.dead == 0)
    ids, version = before.ids_of(alive), before.version
    done = compact(local, pace())
    after = local.snapshot
    assert (after.version, after.rows, after.n_alive) == (version, len(alive), len(alive))
    assert (after.dead, local.n_dead_rows) == (None, 0)
    assert after.table_id != before.table_id
    assert after.ids_of(np.arange(after.rows)) == ids
    assert contents(after) == contents(before) == model.items
    assert (done.erased_seq, done.n_rows_erased) == (version, before.rows - len(alive))
    assert done.n_damaged == 0
    assert local.erased_seq == local.checkpoint_seq == version
    assert on_disk(tmp_path / "c") == (version, model.items)
    assert generations(tmp_path / "c") == {1}
    history(local, model, 3, seed=1)
    assert contents(local.snapshot) == model.items
    compact(local, pace())
    local.checkpoint()
    local.close()
    again = LocalCollection.load(tmp_path / "c")
    assert contents(again.snapshot) == model.items
    assert (again.seq, again.erased_seq, again.generation) == (model.version, model.version, 2)
    again.close()


def test_without_dead_rows_nothing_is_written(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 20))
    local.checkpoint()
    done = compact(local, pace())
    assert done == Compacted(20, 0, 0, ())
    assert manifest.read(tmp_path / "c").erased_seq == 20
    assert generations(tmp_path / "c") == {0}
    local.close()


@pytest.mark.usefixtures("small_blocks")
def test_writing_and_reading_go_on(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 4)
    stop = threading.Event()
    seen: dict[int, dict[str, Record]] = {model.version: dict(model.items)}
    snapshots: list[Snapshot] = []

    def write() -> None:
        seed = 100
        while not stop.is_set():
            history(local, model, 1, seed=seed)
            seen[model.version] = dict(model.items)
            seed += 1

    def checkpoint() -> None:
        while not stop.wait(0.005):
            local.checkpoint()
            snapshots.append(local.snapshot)

    threads = [threading.Thread(target=write), threading.Thread(target=checkpoint)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            version = local.seq
            assert compact(local, pace()).erased_seq >= version
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert local.generation == 5
    assert contents(local.snapshot) == model.items
    checked = [snapshot for snapshot in snapshots if snapshot.version in seen]
    assert len({snapshot.table_id for snapshot in checked}) > 1
    for snapshot in checked:
        assert contents(snapshot) == seen[snapshot.version]
    local.checkpoint()
    local.close()
    again = LocalCollection.load(tmp_path / "c")
    assert contents(again.snapshot) == model.items
    again.close()
