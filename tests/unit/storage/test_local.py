from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import DataLossError, DeadlineError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Record, layout, manifest
from search_service.storage.data_dir import clean, quarantine
from search_service.storage.local import LocalCollection
from tests.support.local_files import SPEC, apply, delete, make, put
from tests.support.stores import (
    Model,
    contents,
    log_record,
    make_record,
    make_records,
    on_disk,
    wait_until,
)


@pytest.mark.parametrize("n_bits", [1, 8, 63, 64, 65, 512])
@pytest.mark.parametrize(("dim", "dtype"), [(0, "f16"), (3, "f16"), (5, "f32")])
def test_items_survive_a_restart(tmp_path: Path, n_bits: int, dim: int, dtype: str) -> None:
    spec = CollectionSpec("c", "m", n_bits, dim, FeatureDtype(dtype), 1000)
    local, model = make(tmp_path, spec), Model()
    put(local, model, make_records(spec, 300))
    put(local, model, make_records(spec, 50, seed=1))
    delete(local, model, ["i7", "i299"])
    assert contents(local.snapshot) == model.items
    assert local.checkpoint() == model.version
    put(local, model, make_records(spec, 10, seed=2, prefix="lost"))
    local.close()
    again = LocalCollection.load(tmp_path / "c")
    assert (again.seq, again.spec, again.epoch, again.n_buckets) == (352, spec, "e", 8)
    saved = {i: r for i, r in model.items.items() if not i.startswith("lost")}
    assert contents(again.snapshot) == saved
    assert on_disk(tmp_path / "c") == (352, saved)
    again.close()


def test_an_old_snapshot_does_not_change(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    rng = np.random.default_rng(3)
    history = [(local.snapshot, {})]
    for step in range(60):
        ids = [f"i{n}" for n in rng.choice(40, size=rng.integers(1, 9))]
        put(local, model, [make_record(SPEC, item_id, rng) for item_id in ids])
        history.append((local.snapshot, dict(model.items)))
        if step % 3 == 0:
            doomed = [str(i) for i in rng.choice(sorted(model.items), size=3, replace=False)]
            delete(local, model, doomed)
            history.append((local.snapshot, dict(model.items)))
        if step % 20 == 0:
            local.checkpoint()
    local.remove()
    assert not list(tmp_path.iterdir())
    for snapshot, items in history:
        assert contents(snapshot) == items
        for item_id in {f"i{n}" for n in range(40)} - set(items):
            assert snapshot.row_of(item_id) is None
        for words in snapshot.words:
            assert not words.flags.writeable
        for segment in snapshot.features:
            assert not segment.flags.writeable
    # 64 rows each: the writes above need several, so the way across is covered.
    assert len(history[-1][0].features) > 3


def test_rows_are_in_the_order_of_the_writes(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 5))
    put(local, model, make_records(SPEC, 2, seed=1))
    snapshot = local.snapshot
    assert snapshot.ids_of(np.arange(7)) == ["i0", "i1", "i2", "i3", "i4", "i0", "i1"]
    assert snapshot.dead is not None
    assert snapshot.dead.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert (snapshot.row_of("i0"), snapshot.row_of("i2")) == (5, 2)
    assert local.n_dead_rows == 2
    local.close()


def test_one_batch_may_write_and_remove_the_same_id_again_and_again(tmp_path: Path) -> None:
    local = make(tmp_path)
    a, b, c = (make_records(SPEC, 1, seed=seed)[0] for seed in range(3))
    puts = [log_record(replace(r, id="i0")) for r in (a, b, c)]
    gone = layout.pack_delete(b"i0")
    apply(local, [puts[0], puts[1], gone, puts[2]])
    assert contents(local.snapshot) == {"i0": c}
    assert local.snapshot.rows == 3
    apply(local, [gone, puts[0], gone])
    assert contents(local.snapshot) == {}
    local.checkpoint()
    local.close()
    again = LocalCollection.load(tmp_path / "c")
    assert (contents(again.snapshot), again.seq, again.n_dead_rows) == ({}, 7, 4)
    again.close()


def test_a_checkpoint_may_be_made_while_writes_go_on(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    stop = threading.Event()
    made: list[int] = []

    def checkpoints() -> None:
        while not stop.is_set():
            made.append(local.checkpoint())

    thread = threading.Thread(target=checkpoints)
    thread.start()
    seen: dict[int, dict[str, Record]] = {0: {}}
    for step in range(150):
        put(local, model, make_records(SPEC, 7, seed=step))
        seen[model.version] = dict(model.items)
        if step % 40 == 39:
            # One that was not under way yet is over: however slow the disk, some are made.
            n = len(made)
            wait_until(lambda n=n: len(made) > n + 1, "a checkpoint is made")
    stop.set()
    thread.join()
    version, items = on_disk(tmp_path / "c")
    assert version == made[-1] == local.checkpoint_seq
    assert items == seen[version]
    assert len(set(made)) > 2
    local.close()


def test_a_checkpoint_writes_the_data_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 100))
    directory, log = tmp_path / "c", []

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(".json")[0]

    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fdatasync", lambda fd: log.append(f"sync {name_of(fd)}"))

    def fsync(descriptor: int) -> None:
        log.append(f"sync {name_of(descriptor)}")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> Path:
        log.append(f"rename {target.name}")
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    names = {path.name for path in directory.iterdir()} - {"MANIFEST.json"}
    local.checkpoint()
    written = {f"sync {name}" for name in names if on_disk_length(directory, name, 0)}
    assert len(written) == 8
    assert set(log[: len(written)]) == written
    # New names, the manifest's bytes, its name, and that the name is durable.
    assert log[len(written) :] == ["sync c", "sync MANIFEST", "rename MANIFEST.json", "sync c"]
    log.clear()
    delete(local, model, ["i1"])
    local.checkpoint()
    assert log == ["sync dead-0.u64", "sync MANIFEST", "rename MANIFEST.json", "sync c"]
    log.clear()
    local.checkpoint()
    assert log == []
    local.close()


def test_waiting_for_a_version(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    with pytest.raises(DeadlineError, match="Version 3 of c"):
        local.wait_for(3, 0.01)
    waiting = threading.Thread(target=lambda: results.append(local.wait_for(3, 30).version))
    results: list[int] = []
    waiting.start()
    put(local, model, make_records(SPEC, 2))
    put(local, model, make_records(SPEC, 2))
    waiting.join()
    assert results == [4]
    assert local.wait_for(4, 0).version == 4
    local.close()


FILES = [
    "MANIFEST.json",
    "codes-0.w0.u64",
    "codes-0.w1.u64",
    "rows-0.rec",
    "ids-0.bin",
    "payloads-0.bin",
    "dead-0.u64",
    "features-0.s00001.f16",
]


# Features are checked by row, which the start leaves out; their lengths are compared.
DAMAGES = [
    (name, damage)
    for name in FILES
    for damage in ("missing", "cut", "flipped", "zeroed")
    if not (name.startswith("features") and damage in ("flipped", "zeroed"))
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damaged_files_are_refused_unchanged(tmp_path: Path, name: str, damage: str) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 130))
    delete(local, model, ["i3"])
    local.checkpoint()
    local.close()
    path = tmp_path / "c" / name
    data = path.read_bytes()
    used = on_disk_length(tmp_path / "c", name, len(data))
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, used - 1)
    elif damage == "flipped":
        path.write_bytes(data[: used // 2] + bytes([data[used // 2] ^ 64]) + data[used // 2 + 1 :])
    else:
        path.write_bytes(bytes(len(data)))
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    with pytest.raises(DataLossError):
        LocalCollection.load(tmp_path / "c")
    after = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    assert after.keys() == before.keys()
    assert after.get(name) == before.get(name)


def on_disk_length(directory: Path, name: str, default: int) -> int:
    """How many bytes of a file count."""
    files = manifest.read(directory).files
    return files[name].length if name in files else default


def test_a_directory_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    make(tmp_path).close()
    (tmp_path / "c").rename(tmp_path / "d")
    with pytest.raises(DataLossError, match="holds the collection c"):
        LocalCollection.load(tmp_path / "d")


def test_files_of_a_crash_are_cut_and_removed(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    put(local, model, make_records(SPEC, 60))
    local.checkpoint()
    saved = dict(model.items)
    put(local, model, make_records(SPEC, 200, seed=1, prefix="later"))
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert "features-0.s00003.f16" in names
    local.close()
    (tmp_path / "c" / "MANIFEST.json.0123.partial").write_bytes(b"half")
    again, model = LocalCollection.load(tmp_path / "c"), Model(saved, 60)
    kept = {path.name for path in (tmp_path / "c").iterdir()}
    assert names - kept == {f"features-0.s0000{i}.f16" for i in (1, 2, 3, 4)}
    assert kept < names
    put(again, model, make_records(SPEC, 200, seed=2, prefix="other"))
    assert contents(again.snapshot) == model.items
    again.checkpoint()
    again.close()
    assert on_disk(tmp_path / "c") == (260, model.items)


def test_unfinished_directories_are_cleaned_and_quarantine_keeps_everything(tmp_path: Path) -> None:
    parent = tmp_path / "collections"
    parent.mkdir()
    make(parent).close()
    (parent / ".new-1").mkdir()
    (parent / ".trash-1" / "x").mkdir(parents=True)
    clean(parent)
    assert list(parent.iterdir()) == [parent / "c"]
    names = sorted(path.name for path in (parent / "c").iterdir())
    aside = quarantine(parent / "c", tmp_path / "quarantine")
    assert not list(parent.iterdir())
    assert sorted(path.name for path in aside.iterdir()) == names
    assert aside.parent == tmp_path / "quarantine"
    assert aside.name.startswith("c-")


def test_descriptors_do_not_grow_with_the_segments(tmp_path: Path) -> None:
    local, model = make(tmp_path), Model()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for batch in range(10):
        put(local, model, make_records(SPEC, 640, seed=batch, prefix=f"{batch}-"))
        local.checkpoint()
    # A hundred segments: each mapping keeps one, our own are given back.
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 130
    assert contents(local.snapshot) == model.items
    local.remove()
