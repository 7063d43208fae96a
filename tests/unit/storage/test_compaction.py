"""Compaction of one collection's files, past Redis."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import CancelledError, DataLossError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.snapshot import Snapshot
from search_service.storage import Record, failpoints, layout, manifest
from search_service.storage.compaction import Compacted, Pace, compact
from search_service.storage.local import LocalCollection
from tests.support.local_files import SPEC, delete, make, put
from tests.support.stores import Model, contents, make_record, make_records, on_disk, wait_until


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


@pytest.mark.parametrize("n_bits", [1, 100, 512])
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

    def is_seen(table_id: str) -> bool:
        return any(one.table_id == table_id and one.version in seen for one in list(snapshots))

    threads = [threading.Thread(target=write), threading.Thread(target=checkpoint)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            wait_until(lambda: local.n_dead_rows > 0, "there is something to compact")
            version = local.seq
            assert compact(local, pace()).erased_seq >= version
            table_id = local.snapshot.table_id
            wait_until(lambda t=table_id: is_seen(t), "somebody has looked at what is new")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert local.generation == 3
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


def assert_untouched(local: LocalCollection, directory: Path, before: set[str]) -> None:
    """The old generation serves, and nothing half-done is left."""
    assert names(directory) == before
    assert local.generation == 0
    assert local.erased_seq == 0
    assert local.snapshot.table_id.startswith("e/0/")


@pytest.mark.parametrize(
    ("place", "action", "first"),
    [
        ("compact.begin", "enospc", 1),
        ("compact.copy", "enospc", 1),
        ("compact.copy", "enospc", 4),
        ("append.features", "enospc", 2),
        ("append.commit", "eio", 3),
        ("seal.segment", "enospc", 2),
        ("compact.sync", "eio", 1),
        ("compact.sync", "eio", 5),
        ("compact.manifest", "enospc", 1),
        ("checkpoint.manifest", "enospc", 1),
        ("checkpoint.rename", "eio", 1),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_failure_leaves_the_old_files(
    tmp_path: Path, place: str, action: str, first: int
) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 8)
    local.checkpoint()
    before = names(tmp_path / "c")
    with (
        failpoints.arm(place, action, first),
        pytest.raises(OSError, match=f"failpoint {place}"),
    ):
        compact(local, pace())
    assert_untouched(local, tmp_path / "c", before)
    assert contents(local.snapshot) == model.items
    history(local, model, 1, seed=1)
    compact(local, pace())
    assert contents(local.snapshot) == model.items
    assert on_disk(tmp_path / "c") == (model.version, model.items)
    local.close()


def test_a_full_disk_while_the_rest_is_copied(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    local.checkpoint()
    before = names(tmp_path / "c")
    n_full = 0
    real = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        nonlocal n_full
        if "features-1" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            n_full += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            compact(local, pace())
    assert n_full > 0
    assert_untouched(local, tmp_path / "c", before)
    assert contents(local.snapshot) == model.items
    local.close()


def test_files_that_cannot_be_removed_are_not_gone(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    with failpoints.arm("compact.unlink", "eio"):
        done = compact(local, pace())
    assert done.n_rows_erased > 0
    assert not any(file.is_gone for file in done.files)
    assert generations(tmp_path / "c") == {0, 1}
    assert done.erased_seq == local.erased_seq == 0
    with failpoints.arm("compact.unlink", "eio"), pytest.raises(OSError, match="failpoint"):
        compact(local, pace())
    history(local, model, 1, seed=1)
    again = compact(local, pace())
    assert all(file.is_gone for file in (*done.files, *again.files))
    assert generations(tmp_path / "c") == {2}
    local.close()


def test_a_manifest_that_may_be_lost_keeps_both_generations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    real = manifest.replace_file

    def unsure(path: Path, data: bytes) -> None:
        real(path, data)
        raise OSError(errno.EIO, "the directory is not synced")

    monkeypatch.setattr(manifest, "replace_file", unsure)
    with pytest.raises(DataLossError, match="the directory is not synced"):
        compact(local, pace())
    monkeypatch.undo()
    assert generations(tmp_path / "c") == {0, 1}
    saved = dict(model.items)
    history(local, model, 1, seed=1)
    assert contents(local.snapshot) == model.items
    with pytest.raises(DataLossError, match="lost writes"):
        local.checkpoint()
    with pytest.raises(DataLossError, match="lost writes"):
        compact(local, pace())
    local.close()
    again = LocalCollection.load(tmp_path / "c")
    assert contents(again.snapshot) == saved
    assert generations(tmp_path / "c") == {1}
    again.close()


@pytest.mark.usefixtures("small_blocks")
def test_it_can_be_stopped_while_it_waits(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    before = names(tmp_path / "c")
    stop = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            # Weeks for the first block.
            compact(local, Pace(0.001, stop))
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: generations(tmp_path / "c") == {0, 1}, "it has begun")
    history(local, model, 1, seed=1)
    assert contents(local.snapshot) == model.items
    stop.set()
    thread.join(30)
    assert len(raised) == 1
    assert names(tmp_path / "c") - before <= {f"features-0.s0000{i}.f16" for i in range(9)}
    local.close()


def test_a_closed_collection_is_not_switched(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    local.checkpoint()
    local.close()
    with pytest.raises(CancelledError, match="closed"):
        compact(local, pace())
    assert generations(tmp_path / "c") == {0}
    assert contents(LocalCollection.load(tmp_path / "c").snapshot) == model.items


def test_what_is_gone_waits_for_those_who_read_it(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    held, items = local.snapshot, dict(model.items)
    done = compact(local, pace())
    assert {file.path.name for file in done.files} >= {"ids-0.bin", "payloads-0.bin", "rows-0.rec"}
    assert not any(file.path.exists() for file in done.files)
    # Nobody reads the tombstones' file.
    assert {file.path.name for file in done.files if file.is_gone} == {"dead-0.u64"}
    assert contents(held) == items
    del held
    assert all(file.is_gone for file in done.files)
    local.close()


def test_the_receipt_names_the_segments_that_held_dead_rows(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 200))
    delete(local, model, ["i70", "i199"])
    done = compact(local, pace())
    assert {file.path.name for file in done.files if file.path.name.startswith("features")} == {
        "features-0.s00001.f16",
        "features-0.s00003.f16",
    }
    local.close()


@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_feature_is_never_copied_as_good(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 200))
    delete(local, model, ["i1"])
    flip(tmp_path / "c" / "features-0.s00001.f16", 5 * layout.feature_bytes(SPEC))
    done = compact(local, pace())
    assert (done.n_damaged, local.n_missing_features) == (1, 1)
    row = local.snapshot.row_of("i69")
    assert row is not None
    assert local.snapshot.feature_of(row) is None
    found = contents(local.snapshot)
    assert found.pop("i69").feature == b""
    del model.items["i69"]
    assert found == model.items
    # Missing it stays, and is not damaged again.
    delete(local, model, ["i2"])
    assert compact(local, pace()).n_damaged == 0
    local.close()
    again = LocalCollection.load(tmp_path / "c")
    assert again.n_missing_features == 1
    again.close()


@pytest.mark.parametrize(
    "name", ["codes-0.w0.u64", "codes-0.w1.u64", "rows-0.rec", "ids-0.bin", "payloads-0.bin"]
)
def test_other_damage_is_found_and_not_copied(tmp_path: Path, name: str) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    local.checkpoint()
    flip(tmp_path / "c" / name, 40)
    before = names(tmp_path / "c")
    with pytest.raises(DataLossError, match=name):
        compact(local, pace())
    assert_untouched(local, tmp_path / "c", before)
    local.close()


def flip(path: Path, offset: int) -> None:
    """Damage one byte, as a disk would."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 64]))


def test_what_others_are_copying_is_not_gone(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    history(local, model, 3)
    lease = tmp_path / ".lease-1"
    lease.mkdir()
    (lease / "ids-0.bin").hardlink_to(tmp_path / "c" / "ids-0.bin")
    done = compact(local, pace())
    left = [file.path.name for file in done.files if not file.is_gone]
    assert left == ["ids-0.bin"]
    (lease / "ids-0.bin").unlink()
    assert all(file.is_gone for file in done.files)
    local.close()
