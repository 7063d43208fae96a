"""kill -9 at each step of a backup and of a restore: what is left does not pass for whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hashlens.errors import HashlensError, NotFoundError, PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.backup import archive
from search_service.backup.put_back import RestoreConfig, put_back
from search_service.backup.take import BackupConfig, take
from search_service.storage import Store, StoreConfig, failpoints
from tests.support.backups import hashlens, quiet
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    make_records,
    on_disk,
    wait_until,
)

SPEC = CollectionSpec("saved", "m", 48, 16, FeatureDtype.F16, 1000)
N_ITEMS = 1500
"""More than one call to Redis takes."""


@pytest.fixture
def saved(server: RedisServer, tmp_path: Path) -> tuple[Path, Path, Model]:
    """A data directory, a backup of it, and what is in both; Redis is empty again."""
    config = StoreConfig(data_dir=tmp_path / "live", redis_url=server.url, segment_bytes=4096)
    model = Model()
    with Store.open(config) as store:
        collection = store.create(SPEC)
        records = make_records(SPEC, N_ITEMS)
        collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
        model.upsert(records)
        collection.delete(["i3", "i5"], request_id="", deadline_s=DEADLINE_S)
        model.delete(["i3", "i5"])
        collection.wait_for(model.version, DEADLINE_S)
    take(BackupConfig(data_dir=config.data_dir, output=tmp_path / "backup"), (), quiet)
    with server.client() as client:
        client.flushall()
    return config.data_dir, tmp_path / "backup", model


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """One kind is enough here: what differs between them is tested elsewhere."""
    with RedisServer(server_binaries()[0]) as running:
        yield running


@pytest.mark.parametrize("place", ["backup.file@5", "backup.finish", "checkpoint.rename"])
def test_a_killed_backup_is_none(
    place: str, saved: tuple[Path, Path, Model], tmp_path: Path
) -> None:
    live, _, model = saved
    name, _, first = place.partition("@")
    output = tmp_path / "killed"
    arguments = ("backup", "--data-dir", live, "--output", output)
    done = hashlens(*arguments, failpoint=f"{name}=kill@{first or 1}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert output.exists()
    with pytest.raises(NotFoundError, match="no backup"):
        archive.read(output)
    with pytest.raises(NotFoundError, match="no backup"):
        put_back(output, RestoreConfig(data_dir=tmp_path / "restored"), (), None, quiet)
    # It is not taken for an empty directory, either.
    with pytest.raises(PreconditionError, match="not empty"):
        take(BackupConfig(data_dir=live, output=output), (), quiet)
    take(BackupConfig(data_dir=live, output=tmp_path / "again"), (), quiet)
    assert on_disk(tmp_path / "again" / SPEC.name) == (model.version, model.items)


@pytest.mark.parametrize(
    ("place", "opened_between"),
    [
        ("restore.files", True),
        ("restore.redis@1", True),
        ("restore.redis@3", False),
        ("restore.rename", False),
        ("restore.rename", True),
        ("restore.activate", False),
        ("restore.activate", True),
    ],
)
def test_a_killed_restore_leaves_no_collection_and_is_repeated(
    place: str,
    opened_between: bool,
    server: RedisServer,
    saved: tuple[Path, Path, Model],
    tmp_path: Path,
) -> None:
    _, backup, model = saved
    target = RestoreConfig(data_dir=tmp_path / "restored", redis_url=server.url)
    config = StoreConfig(data_dir=target.data_dir, redis_url=server.url, segment_bytes=4096)
    name, _, first = place.partition("@")
    done = hashlens(
        *("restore", backup, "--data-dir", target.data_dir, "--redis-url", server.url),
        failpoint=f"{name}=kill@{first or 1}",
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    if opened_between:
        with Store.open(config) as store:
            if name != "restore.activate":
                with pytest.raises(NotFoundError):
                    store.get(SPEC.name)
                assert store.list() == []
            if name != "restore.files":
                # Nobody takes what is half there for a collection of that name.
                with pytest.raises(PreconditionError):
                    store.create(SPEC)
            if name == "restore.activate":
                info = store.get(SPEC.name)
                wait_until(lambda: "restore" in info.info().detail, "it says why")
                assert not info.info().writable
                with pytest.raises(HashlensError):
                    info.upsert(make_records(SPEC, 1), request_id="", deadline_s=DEADLINE_S)
    put_back(backup, target, (), None, quiet)
    with server.client() as client:
        assert_in_redis(client, SPEC.name, model)
        with Store.open(config) as store:
            collection = store.get(SPEC.name)
            wait_until(lambda: collection.info().writable, "it can be written")
            assert_holds(collection, model)
            records = make_records(SPEC, 10, seed=1)
            collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
            model.upsert(records)
            assert_holds(collection, model)
            assert_in_redis(client, SPEC.name, model)


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_failed_restore_cleans_up(
    action: str, server: RedisServer, saved: tuple[Path, Path, Model], tmp_path: Path
) -> None:
    _, backup, model = saved
    target = RestoreConfig(data_dir=tmp_path / "restored", redis_url=server.url)
    for place in ("restore.files", "restore.redis", "restore.rename"):
        with failpoints.arm(place, action), pytest.raises(HashlensError, match=place):
            put_back(backup, target, (), None, quiet)
        assert list((target.data_dir / "collections").iterdir()) == []
        with server.client() as client:
            assert client.keys("hl:{*") == []
    put_back(backup, target, (), None, quiet)
    assert on_disk(target.data_dir / "collections" / SPEC.name) == (model.version, model.items)


def test_a_restore_that_is_given_up_is_dropped_like_a_collection(
    server: RedisServer, saved: tuple[Path, Path, Model], tmp_path: Path
) -> None:
    _, backup, _ = saved
    arguments = ("restore", backup, "--data-dir", tmp_path / "r", "--redis-url", server.url)
    assert hashlens(*arguments, failpoint="restore.rename=kill").returncode == -signal.SIGKILL
    with Store.open(StoreConfig(data_dir=tmp_path / "r", redis_url=server.url)) as store:
        store.drop(SPEC.name)
        model = Model()
        collection = store.create(SPEC)
        records = make_records(SPEC, 10)
        collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
        model.upsert(records)
        assert_holds(collection, model)
        with server.client() as client:
            assert_in_redis(client, SPEC.name, model)
