"""Every kind of damage to every kind of file, at once: no wrong answer, and all comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import DeadlineError, HashlensError, LimitError, UnavailableError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, SearchOptions
from search_service.engine import Engine
from search_service.storage import Collection, Store, StoreConfig
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import DEADLINE_S, Model, assert_holds, contents, make_records, wait_until

SPEC = CollectionSpec("c", "m", 100, 4, FeatureDtype.F16, 1000)
KINDS = {
    "manifest": "MANIFEST.json",
    "codes": "codes-0.w1.u64",
    "rows": "rows-0.rec",
    "ids": "ids-0.bin",
    "payloads": "payloads-0.bin",
    "tags": "tags-0.bin",
    "dead": "dead-0.u64",
    "sealed": "features-0.s00000.f16",
    "growing": "features-0.s00002.f16",
}
DAMAGE = ("cut", "zeroed", "flipped", "garbage", "missing", "extended")
SPARES_THE_REST = {"zeroed", "flipped", "garbage"}
"""Of features: what these do to a segment costs its rows their features and nothing else."""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """One kind is enough: what is damaged here is ours."""
    with RedisServer(server_binaries()[0]) as running:
        yield running


@pytest.fixture
def config(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    # What is lost, is lost: a log that could not be trimmed in time would have it still.
    monkeypatch.setattr("search_service.storage.upkeep._TRIM_S", 60.0)
    return StoreConfig(
        data_dir=tmp_path / "data",
        redis_url=server.url,
        segment_bytes=512,  # 64 rows
        discovery_interval_s=0.1,
        resync_patience_s=0.1,
        scrub_mb_per_s=0,
    )


def damage(path: Path, how: str) -> None:
    """Do it in place: who has mapped the file sees it."""
    if how == "missing":
        path.unlink()
        return
    with path.open("r+b") as file:
        data = bytearray(file.read())
        if how == "cut":
            file.truncate(10)
            return
        if how == "zeroed":
            data[:4096] = bytes(min(len(data), 4096))
        elif how == "flipped":
            data[300] ^= 1  # Files are longer than what counts of them.
        elif how == "garbage":
            data = bytearray(np.random.default_rng(1).bytes(len(data)))
        else:
            data += b"more" * 1000
        file.seek(0)
        file.write(data)


def fill(store: Store, name: str) -> Model:
    """Write, replace and delete."""
    collection, model = store.create(replace(SPEC, name=name), deadline_s=DEADLINE_S), Model()
    for seed, n in ((0, 150), (1, 20)):
        records = make_records(SPEC, n, seed)
        collection.upsert(records, request_id=f"r{seed}", deadline_s=DEADLINE_S)
        model.upsert(records)
    collection.delete(["i3", "i30"], request_id="d", deadline_s=DEADLINE_S)
    model.delete(["i3", "i30"])
    assert_holds(collection, model)
    return model


def assert_true(collection: Collection, model: Model) -> int:
    """All is as it was written, but for features that are missing; return how many are."""
    snapshot = collection.snapshot()
    assert snapshot.version == model.version
    found = contents(snapshot)
    missing = {item_id for item_id, record in found.items() if not record.feature}
    assert {i: replace(r, feature=b"") for i, r in found.items()} == {
        i: replace(r, feature=b"") for i, r in model.items.items()
    }
    for item_id, record in found.items():
        assert item_id in missing or record.feature == model.items[item_id].feature
    assert collection.info().n_missing_features == len(missing)
    first = model.items["i100"]
    feature = np.frombuffer(first.feature, dtype=np.float16)
    query = Embedding(first.code, SPEC.n_bits, "m", feature)
    answer = Engine().search(snapshot, query, SearchOptions(k=1000, max_hamming_bits=SPEC.n_bits))
    assert {hit.id for hit in answer.hits} == set(model.items) - missing
    assert answer.receipt.rows_without_feature == len(missing)
    assert answer.receipt.exact == (not missing)
    for hit in answer.hits:
        other = np.frombuffer(model.items[hit.id].feature, dtype=np.float16)
        expected = np.linalg.norm(other.astype(np.float32) - feature.astype(np.float32))
        assert hit.distance == pytest.approx(expected, rel=1e-5)
    return len(missing)


def names() -> list[tuple[str, str, str]]:
    return [(f"{kind}-{how}", kind, how) for kind in KINDS for how in DAMAGE]


def quarantined(config: StoreConfig) -> set[str]:
    folder = config.data_dir / "quarantine"
    if not folder.exists():
        return set()
    return {"-".join(path.name.split("-")[:2]) for path in folder.iterdir()}


def assert_all_came_back(store: Store, models: dict[str, Model]) -> None:
    for name, kind, how in names():
        wait_until(lambda n=name: is_back(store, n, models[n]), f"{name} is back")
        n_missing = assert_true(store.get(name), models[name])
        if kind == "sealed" and how in SPARES_THE_REST | {"cut", "missing"}:
            assert n_missing > 0
        elif kind not in ("sealed", "growing", "rows", "ids", "codes", "manifest"):
            # Features are found again in the files that were put aside.
            assert n_missing == 0


def is_back(store: Store, name: str, model: Model) -> bool:
    try:
        info = store.get(name).info()
        return info.writable and info.version == model.version
    except HashlensError:
        return False


def test_whatever_was_damaged_while_nobody_looked(config: StoreConfig) -> None:
    models = {}
    with Store.open(config) as store:
        for name, _, _ in names():
            models[name] = fill(store, name)
        models["whole"] = fill(store, "whole")
    for name, kind, how in names():
        damage(config.data_dir / "collections" / name / KINDS[kind], how)
    for _ in range(2):  # And it stays mended: no second quarantine.
        with Store.open(config) as store:
            assert contents(store.get("whole").snapshot()) == models["whole"].items
            assert_all_came_back(store, models)
            aside = [
                name
                for name, kind, how in names()
                if how != "extended"
                and not (kind in ("sealed", "growing") and how in SPARES_THE_REST)
            ]
            # A longer manifest is a damaged one; of other files only the beginning counts.
            assert quarantined(config) == {*aside, "manifest-extended"}
            assert store.counters.n_quarantined in (0, len(aside) + 1)
    assert len(list((config.data_dir / "quarantine").iterdir())) == len(aside) + 1


def test_whatever_is_damaged_under_a_running_process(config: StoreConfig) -> None:
    scrubbing = replace(config, scrub_mb_per_s=500, scrub_interval_s=0.5)
    # What was cut must not be touched before the watcher comes by; see test_feature_check.py.
    cases = [(n, kind, how) for n, kind, how in names() if how in (*SPARES_THE_REST, "missing")]
    models = {}
    with Store.open(scrubbing) as store:
        for name, _, _ in cases:
            models[name] = fill(store, name)
        models["whole"] = fill(store, "whole")
        for name, _, _ in cases:
            store.get(name).checkpoint()
        for name, kind, how in cases:
            damage(config.data_dir / "collections" / name / KINDS[kind], how)
        expected = {
            name
            for name, kind, how in cases
            if not (kind in ("sealed", "growing") and how in SPARES_THE_REST)
        }
        wait_until(lambda: quarantined(config) == expected, "all are put aside", within_s=90)
        for name, kind, _ in cases:
            wait_until(lambda n=name: is_back(store, n, models[n]), f"{name} is back")
            if kind in ("sealed", "growing") and name not in expected:
                wait_until(
                    lambda n=name: store.get(n).info().n_missing_features > 0, "it is scrubbed"
                )
            assert_true(store.get(name), models[name])
        assert_holds(store.get("whole"), models["whole"])


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own, which is really full when it is full."""
    path.mkdir()
    mount = shutil.which("mount")
    done = (
        subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True
        )
        if mount
        else None
    )
    if done is None or done.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)  # Mappings may be in use still.


def test_a_disk_that_is_really_full(server: RedisServer, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        config = StoreConfig(data_dir=disk / "data", redis_url=server.url, segment_bytes=1 << 16)
        ballast = disk / "ballast"
        with Store.open(config) as store:
            model = fill(store, "c")
            collection = store.get("c")
            collection.checkpoint()
            with ballast.open("wb") as file:
                free = shutil.disk_usage(disk).free
                os.posix_fallocate(file.fileno(), 0, max(free - 4096, 1))
            number = 0
            refused = ""
            while not refused:
                assert number < 200
                records = make_records(SPEC, 100, seed=number, prefix=f"n{number}-")
                try:
                    collection.upsert(records, request_id=f"n{number}", deadline_s=DEADLINE_S)
                except LimitError as error:
                    refused = error.message
                else:
                    model.upsert(records)
                    number += 1
                    # Until it is applied; the one that is too much never is.
                    with suppress(DeadlineError):
                        collection.wait_for(model.version, 0.5)
            assert "No space left" in refused
            assert not collection.info().writable
            assert contents(collection.snapshot()).keys() >= {"i0", "i149"}
            with pytest.raises(LimitError):
                store.create(replace(SPEC, name="another"), deadline_s=DEADLINE_S)
            ballast.unlink()

            def written() -> bool:
                try:
                    collection.upsert(records, request_id=f"n{number}", deadline_s=DEADLINE_S)
                except (LimitError, UnavailableError):
                    return False
                return True

            wait_until(written, "there is room again", within_s=60)
            model.upsert(records)
            assert_holds(collection, model)
            collection.checkpoint()
            assert collection.info().writable
        with Store.open(config) as store:
            assert_holds(store.get("c"), model)
