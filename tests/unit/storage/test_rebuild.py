"""Files made anew from Redis: what a replica that followed the log has, while writes go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from hashlens.errors import (
    CancelledError,
    DataLossError,
    PreconditionError,
    UnavailableError,
)
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Store, StoreConfig
from search_service.storage.data_dir import clean
from search_service.storage.failpoints import VARIABLE, arm
from search_service.storage.local import LocalCollection
from search_service.storage.rebuild import Rebuilt, install
from tests.support.around import Around
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import Model, contents, make_record, make_records

on_one_kind = pytest.mark.parametrize("server", server_binaries()[:1], indirect=True)
"""For what has nothing to do with the kind of server."""


def rows_in_order(local: LocalCollection) -> list[str]:
    """Ids of the alive rows, by age."""
    snapshot = local.snapshot
    dead = np.zeros(snapshot.rows, np.uint8) if snapshot.dead is None else snapshot.dead
    return snapshot.ids_of(np.flatnonzero(dead == 0))


def test_codes_tags_and_payloads_come_back_in_the_order_of_their_writes(
    around: Callable[..., Around],
) -> None:
    here = around(dim=0)
    records = make_records(here.meta.spec, 3000)
    here.upsert(records)
    here.delete([f"i{i}" for i in range(0, 300, 7)])
    here.upsert(make_records(here.meta.spec, 500, seed=1))
    here.settle()
    made = here.rebuild()
    assert made.n_missing_features == 0
    assert made.rows == len(here.model.items)
    local = here.installed(made)
    assert local.seq == made.seq == here.model.version
    assert local.log_crc32 != 0
    assert contents(local.snapshot) == here.model.items
    ours = here.collection.snapshot()
    alive = np.flatnonzero(ours.dead == 0)
    assert rows_in_order(local) == ours.ids_of(alive)
    local.close()


def test_features_come_from_the_log(around: Callable[..., Around]) -> None:
    here = around()
    here.upsert(make_records(here.meta.spec, 700))
    here.delete(["i3", "i4"])
    local = here.installed(here.rebuild())
    assert contents(local.snapshot) == here.model.items
    local.close()


@pytest.mark.parametrize("dim", [0, 8])
def test_writes_meanwhile_are_in_it_up_to_one_version(
    around: Callable[..., Around], dim: int
) -> None:
    here = around(dim=dim, expected_rows=20_000)
    rng = np.random.default_rng(1)
    history = [Model()]

    def write(n: int) -> None:
        ids = [f"i{i}" for i in rng.integers(0, 2500, size=n)]
        if rng.random() < 0.3:
            here.delete(ids)
        else:
            here.upsert([make_record(here.meta.spec, item_id, rng) for item_id in ids])
        history.append(Model(dict(here.model.items), here.model.version))

    for _ in range(10):
        write(300)
    here.settle()
    began = here.model.version

    class Meanwhile(threading.Event):
        """Something is written whenever the rebuild asks whether to stop."""

        def is_set(self) -> bool:
            write(60)
            return super().is_set()

    old = here.files if dim else None
    made = here.rebuild(old, stop=Meanwhile())
    assert made.seq > began
    expected = {model.version: model.items for model in history}[made.seq]
    local = here.installed(made)
    assert contents(local.snapshot) == expected
    assert local.n_missing_features == 0
    local.close()


def test_features_come_from_old_files_where_they_are_whole(around: Callable[..., Around]) -> None:
    here = around(dim=32)
    here.upsert(make_records(here.meta.spec, 600))
    here.upsert(make_records(here.meta.spec, 100, seed=1))
    here.delete(["i5"])
    here.settle()
    files = sorted(here.files.glob("features-*"))
    assert len(files) > 2, "several segments"

    made = here.rebuild(here.files)
    assert made.n_missing_features == 0
    local = here.installed(made)
    assert contents(local.snapshot) == here.model.items
    local.close()

    # Row 300 is of i300, row 650 of the newer i50.
    for row in (300, 650):
        with files[row // 64].open("r+b") as file:
            file.seek(row % 64 * 64 + 5)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes((byte ^ 1,)))
    made = here.rebuild(here.files, generation=1)
    assert made.n_missing_features == 2
    local = LocalCollection.load(_into(here, made))
    snapshot = local.snapshot
    expected = dict(here.model.items)
    for item_id in ("i300", "i50"):
        row = snapshot.row_of(item_id)
        assert row is not None
        assert snapshot.feature_of(row) is None
        expected[item_id] = replace(expected[item_id], feature=b"")
    assert contents(snapshot) == expected
    local.close()


def _into(here: Around, made: Rebuilt) -> Path:
    """Put files beside those of an earlier rebuild."""
    directory = here.at / here.meta.spec.name
    install(made, directory)
    return directory


@on_one_kind
@pytest.mark.parametrize("damage", ["manifest", "rows", "cut", "gone", "epoch"])
def test_old_files_are_believed_only_what_they_prove(
    around: Callable[..., Around], damage: str
) -> None:
    here = around(dim=32)
    here.upsert(make_records(here.meta.spec, 200))
    here.settle()
    # The last write is in the log.
    expected_missing = {"manifest": 0, "rows": 99, "cut": 135, "gone": 199, "epoch": 199}
    if damage == "manifest":
        path = here.files / "MANIFEST.json"
        path.write_bytes(path.read_bytes().replace(b'"rows": 200', b'"rows": 201'))
    elif damage == "rows":
        with (here.files / "rows-0.rec").open("r+b") as file:
            file.seek(100 * 48)
            file.write(bytes(100 * 48))
    elif damage == "cut":
        os.truncate(here.files / "features-0.s00001.f16", 0)
        (here.files / "features-0.s00002.f16").unlink()
    elif damage == "gone":
        (here.files / "MANIFEST.json").unlink()
    else:
        path = here.files / "MANIFEST.json"
        path.write_bytes(path.read_bytes().replace(here.meta.epoch.encode(), b"0" * 36))
    made = here.rebuild(here.files)
    assert made.n_missing_features == expected_missing[damage]
    local = here.installed(made)
    found = contents(local.snapshot)
    assert list(found) == list(here.model.items)
    for item_id, record in found.items():
        assert record.feature in (b"", here.model.items[item_id].feature)
    local.close()


def test_without_old_files_features_are_missing(around: Callable[..., Around]) -> None:
    here = around()
    here.upsert(make_records(here.meta.spec, 50))
    here.settle()
    here.upsert(make_records(here.meta.spec, 5, prefix="new"))
    made = here.rebuild()
    # The log still has the write of the last checkpoint and what came behind it.
    assert made.n_missing_features == 49
    local = here.installed(made)
    assert set(contents(local.snapshot)) == set(here.model.items)
    local.close()


def test_an_empty_collection(around: Callable[..., Around]) -> None:
    here = around()
    local = here.installed(here.rebuild())
    assert (local.seq, local.snapshot.rows) == (0, 0)
    local.close()


def test_buckets_that_outgrew_a_list(around: Callable[..., Around]) -> None:
    here = around(dim=0, expected_rows=100)
    here.upsert(make_records(here.meta.spec, 3000))
    here.settle()
    local = here.installed(here.rebuild())
    assert contents(local.snapshot) == here.model.items
    local.close()


@on_one_kind
@pytest.mark.parametrize("place", ["rebuild.scan", "rebuild.write", "append.commit"])
def test_a_full_disk_leaves_nothing(around: Callable[..., Around], place: str) -> None:
    here = around()
    here.upsert(make_records(here.meta.spec, 50))
    here.settle()
    with arm(place, "enospc"), pytest.raises(OSError, match="No space"):
        here.rebuild()
    assert list(here.at.iterdir()) == []


@on_one_kind
def test_it_can_be_stopped(around: Callable[..., Around]) -> None:
    here = around()
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        here.rebuild(stop=stop)
    assert list(here.at.iterdir()) == []


def test_another_collection_of_the_name(around: Callable[..., Around]) -> None:
    here = around()
    here.store.drop(here.meta.spec.name)
    with pytest.raises(PreconditionError):
        here.rebuild()
    here.store.create(here.meta.spec)
    with pytest.raises(PreconditionError):
        here.rebuild()
    assert list(here.at.iterdir()) == []


def test_what_is_no_item_in_redis(around: Callable[..., Around], client: redis.Redis) -> None:
    here = around(dim=0)
    here.upsert(make_records(here.meta.spec, 3))
    here.settle()
    key = f"hl:{{{here.meta.spec.name}}}:b:0"
    for value in (b"short", (1).to_bytes(8, "little") + bytes(13), bytes(8 + 13)):
        client.hset(key, "stranger", value)
        with pytest.raises(DataLossError):
            here.rebuild()
    # 100 bits leave four behind the end.
    client.hset(key, "stranger", (3).to_bytes(8, "little") + b"\xff" * 13)
    with pytest.raises(DataLossError):
        here.rebuild()
    assert list(here.at.iterdir()) == []


_DIES = """
import json, sys
from pathlib import Path
from search_service.storage.catalog import Catalog
from search_service.storage.rebuild import install, rebuild
order = json.load(sys.stdin)
meta = Catalog(order["url"], 5.0).meta(order["name"], 10.0)
files = Path(order["files"])
made = rebuild(files.parent, meta, url=order["url"], replica_id="r", timeout_s=5.0,
               segment_bytes=4096, old=files, generation=1)
install(made, files)
print("done")
"""


@on_one_kind
@pytest.mark.parametrize(
    "place",
    [
        "rebuild.scan=kill",
        "rebuild.write=kill",
        "rebuild.rename=kill",
        "rebuild.rename=kill@2",
        "",
    ],
)
def test_killed_anywhere_the_old_files_or_the_new_are_there(
    around: Callable[..., Around], place: str, tmp_path: Path
) -> None:
    here = around()
    here.upsert(make_records(here.meta.spec, 300))
    here.upsert(make_records(here.meta.spec, 100, seed=2))
    here.settle()
    copied = tmp_path / "copied" / here.meta.spec.name
    copied.mkdir(parents=True)
    for path in here.files.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    order = {"url": here.url, "name": here.meta.spec.name, "files": str(copied)}
    done = subprocess.run(
        [sys.executable, "-c", _DIES],
        input=json.dumps(order),
        env=os.environ | {VARIABLE: place},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if place:
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert done.stdout == "done\n", done.stderr
    clean(copied.parent)
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    local = LocalCollection.load(copied)
    assert contents(local.snapshot) == here.model.items
    generations = {path.name.partition("-")[2][:1] for path in copied.glob("*-*")}
    assert generations == ({"0"} if place else {"1"})
    local.close()


def test_redis_dies_meanwhile(server: RedisServer, tmp_path: Path) -> None:
    with RedisServer(server.binary) as mortal:
        config = StoreConfig(data_dir=tmp_path / "mortal" / "data", redis_url=mortal.url)
        with Store.open(config) as other:
            spec = CollectionSpec("mortal", "m", 100, 8, FeatureDtype.F16, 100_000)
            here = Around(mortal, other, spec, tmp_path / "mortal")
            here.upsert(make_records(spec, 100))

            class Dies(threading.Event):
                def is_set(self) -> bool:
                    mortal.kill()
                    return super().is_set()

            with pytest.raises(UnavailableError):
                here.rebuild(stop=Dies(), timeout_s=0.5)
            assert list(here.at.iterdir()) == []
