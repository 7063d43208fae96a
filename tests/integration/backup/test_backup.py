"""Backups taken while a store writes, and what is restored from them, against a model."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hashlens.types import CollectionSpec
from search_service.backup import archive
from search_service.backup import take as take_module
from search_service.backup.files import Pace
from search_service.backup.put_back import RestoreConfig, put_back
from search_service.backup.take import BackupConfig, take
from search_service.storage import Store, StoreConfig
from tests.integration.backup.conftest import SEGMENT_BYTES
from tests.support.backups import CODES, FULL, History, exported, lose_feature, quiet
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    contents,
    in_redis,
    make_records,
    on_disk,
    wait_until,
)


def assert_restored(target: RestoreConfig, name: str, model: Model, server: RedisServer) -> None:
    """A store opened on what was restored serves the model, and goes on from there."""
    config = StoreConfig(
        data_dir=target.data_dir, redis_url=target.redis_url, segment_bytes=SEGMENT_BYTES
    )
    with server.client() as client:
        assert_in_redis(client, name, model)
        for n in range(2):
            with Store.open(config) as store:
                collection = store.get(name)
                wait_until(lambda c=collection: c.info().writable, "it can be written")
                assert_holds(collection, model)
                records = [*make_records(collection.spec, 20, seed=n), *model.items.values()][:40]
                collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
                model.upsert(records)
                doomed = sorted(model.items)[:5]
                collection.delete(doomed, request_id="", deadline_s=DEADLINE_S)
                model.delete(doomed)
                assert_holds(collection, model)
                assert_in_redis(client, name, model)
        assert on_disk(target.data_dir / "collections" / name) == (model.version, model.items)


@pytest.mark.parametrize("live", server_binaries(), indirect=True, ids=lambda path: path.name)
def test_a_backup_under_writes_restores_to_its_version(
    config: StoreConfig, target: RestoreConfig, empty: RedisServer, tmp_path: Path
) -> None:
    history, small = History(FULL), History(CODES)
    versions = []
    with Store.open(config) as store:
        history.write(store, 20)
        small.write(store, 20)
        store.get(FULL.name).checkpoint()
        stop = threading.Event()
        writer = threading.Thread(target=history.write, args=(store, 100_000, stop))
        writer.start()
        try:
            for number in range(4):
                newest = versions[-1] if versions else 0
                wait_until(
                    lambda newest=newest: store.get(FULL.name).snapshot().version > newest,
                    "it writes on",
                )
                # The last checkpoint is what is saved, also while the next one is made.
                before = store.get(FULL.name).checkpoint()
                output = tmp_path / f"backup-{number}"
                made = take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)
                versions.append(made.collections[FULL.name].seq)
                assert versions[-1] == before
                assert set(made.collections) == {FULL.name, CODES.name}
        finally:
            stop.set()
            writer.join()
    assert versions == sorted(set(versions))
    for number, version in enumerate(versions):
        output = tmp_path / f"backup-{number}"
        saved = archive.read(output).collections[FULL.name]
        model = history.at(version)
        assert (saved.seq, saved.items) == (version, len(model.items))
        assert on_disk(output / FULL.name) == (version, model.items)
        seq, items = exported(output / FULL.name / "catalog.bin", 13)
        name = f"restored-{number}"
        put_back(output, target, [FULL.name], name, quiet)
        with empty.client() as client:
            assert (seq, items) == (version, in_redis(client, name))
        assert_restored(target, name, model, empty)
    codes_version = archive.read(tmp_path / "backup-3").collections[CODES.name].seq
    put_back(tmp_path / "backup-3", target, [CODES.name], None, quiet)
    assert_restored(target, CODES.name, small.at(codes_version), empty)


def test_all_collections_are_restored_together_and_empty_ones_too(
    config: StoreConfig, target: RestoreConfig, empty: RedisServer, tmp_path: Path
) -> None:
    histories = [History(FULL), History(CODES)]
    with Store.open(config) as store:
        for history in histories:
            history.write(store, 10)
        store.create(CollectionSpec("nothing", "m", 64, 4))
    output = tmp_path / "backup"
    take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)
    put_back(output, target, (), None, quiet)
    models = {history.spec.name: history.at(len(history.steps)) for history in histories}
    models["nothing"] = Model()
    with Store.open(StoreConfig(data_dir=target.data_dir, redis_url=target.redis_url)) as store:
        for name, model in models.items():
            collection = store.get(name)
            wait_until(lambda c=collection: c.info().writable, "it can be written")
            assert_holds(collection, model)
            records = make_records(collection.spec, 9, seed=9)
            collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
            model.upsert(records)
            assert_holds(collection, model)
            with empty.client() as client:
                assert_in_redis(client, name, model)


def _fill(store: Store, n: int) -> None:
    """Write items, and wait until they are in the local files: closing does not."""
    collection = store.create(FULL)
    collection.upsert(make_records(FULL, n), request_id="", deadline_s=DEADLINE_S)
    collection.wait_for(n, DEADLINE_S)


def test_rows_without_a_feature_stay_so(
    config: StoreConfig, target: RestoreConfig, tmp_path: Path
) -> None:
    with Store.open(config) as store:
        _fill(store, 100)
    lose_feature(config.data_dir / "collections" / FULL.name, 70)
    with Store.open(config) as store:
        before = contents(store.get(FULL.name).snapshot())
    output = tmp_path / "backup"
    take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)
    put_back(output, target, (), None, quiet)
    with Store.open(StoreConfig(data_dir=target.data_dir, redis_url=target.redis_url)) as store:
        collection = store.get(FULL.name)
        assert collection.info().n_missing_features == 1
        assert contents(collection.snapshot()) == before


def test_full_segments_are_links_and_all_else_is_not(config: StoreConfig, tmp_path: Path) -> None:
    with Store.open(config) as store:
        _fill(store, 200)
    full_bytes = 32 * 66

    def links(output: Path) -> dict[str, int]:
        folder = output / FULL.name
        return {path.name: path.stat().st_nlink for path in folder.iterdir()}

    take(BackupConfig(data_dir=config.data_dir, output=tmp_path / "a"), (), quiet)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "a" / FULL.name).iterdir()}
    segments = {name for name in sizes if name.startswith("features") and sizes[name] == full_bytes}
    assert len(segments) > 3
    assert links(tmp_path / "a") == {name: 2 if name in segments else 1 for name in sizes}
    take(BackupConfig(data_dir=config.data_dir, output=tmp_path / "b", copy=True), (), quiet)
    assert set(links(tmp_path / "b").values()) == {1}
    again = BackupConfig(
        data_dir=config.data_dir, output=tmp_path / "c", copy=True, base=tmp_path / "b"
    )
    take(again, (), quiet)
    assert links(tmp_path / "c") == {name: 2 if name in segments else 1 for name in sizes}
    # One that has other rows under the same names is not linked to.
    held = archive.read(tmp_path / "b")
    saved = held.collections[FULL.name]
    files = {**saved.files, "rows-0.rec": replace(saved.files["rows-0.rec"], crc32=0)}
    other = replace(held, collections={FULL.name: replace(saved, files=files)})
    archive.write(tmp_path / "b", other)
    take(replace(again, output=tmp_path / "d"), (), quiet)
    assert set(links(tmp_path / "d").values()) == {1}
    archive.write(tmp_path / "b", held)
    # What the store does with its files does not reach the backup.
    with Store.open(config) as store:
        collection = store.get(FULL.name)
        wait_until(lambda: collection.info().writable, "it can be written")
        collection.upsert(make_records(FULL, 200, seed=5), request_id="", deadline_s=DEADLINE_S)
    for output in ("a", "b", "c"):
        saved = archive.read(tmp_path / output).collections[FULL.name]
        archive.check(tmp_path / output, FULL.name, saved, Pace(0, quiet))


def test_files_that_are_replaced_meanwhile_are_taken_anew(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(config) as store:
        history = History(FULL)
        history.write(store, 5)
        History(CODES).write(store, 5)
        store.get(FULL.name).checkpoint()
        store.get(CODES.name).checkpoint()
        copy, calls = take_module.copy, []

        def racing(*arguments: object) -> int:
            calls.append(arguments[0])
            # In the middle of either collection's files.
            if len(calls) == 2:
                store.drop(CODES.name)
            elif len(calls) == 5:
                store.drop(FULL.name)
                history.steps.clear()
                history.write(store, 8)
                store.get(FULL.name).wait_for(1, DEADLINE_S)
                store.get(FULL.name).checkpoint()
            return copy(*arguments)

        monkeypatch.setattr(take_module, "copy", racing)
        lines: list[str] = []
        output = tmp_path / "backup"
        made = take(BackupConfig(data_dir=config.data_dir, output=output), (), lines.append)
        assert set(made.collections) == {FULL.name}
        assert {path.name for path in output.iterdir()} == {FULL.name, archive.BACKUP}
        version = made.collections[FULL.name].seq
        assert on_disk(output / FULL.name) == (version, history.at(version).items)
        assert version
        assert any("dropped meanwhile" in line for line in lines)
        assert any("once more" in line for line in lines)


def test_a_rate_is_kept_and_progress_is_told() -> None:
    lines: list[str] = []
    pace = Pace(50e6, lines.append, report_every_s=0)
    began_s = time.monotonic()
    for _ in range(10):
        pace.spend(1_000_000)
    # At least, whatever else the machine is doing.
    assert time.monotonic() - began_s >= 0.15
    assert lines[-1] == "10 MB read so far"
