"""What is damaged, in the way, or not there at all is refused, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hashlens.errors import (
    AlreadyExistsError,
    DataLossError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
)
from search_service.backup import archive
from search_service.backup.put_back import RestoreConfig, put_back
from search_service.backup.take import BackupConfig, take
from search_service.storage import Store, StoreConfig
from tests.support.backups import CODES, FULL, History, quiet
from tests.support.redis_server import RedisServer


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [flip, cut, lengthen, Path.unlink])
def test_a_damaged_backup_is_refused_before_anything_is_written(
    damage: Callable[[Path], None],
    config: StoreConfig,
    target: RestoreConfig,
    empty: RedisServer,
    tmp_path: Path,
) -> None:
    output = tmp_path / "backup"
    with Store.open(config) as store:
        History(FULL).write(store, 20)
    take(BackupConfig(data_dir=config.data_dir, output=output, copy=True), (), quiet)
    files = [path for path in output.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        damage(path)
        # Without the file that is written last, it is no backup at all.
        is_none = path.name == archive.BACKUP and damage is Path.unlink
        with pytest.raises(NotFoundError if is_none else DataLossError, match=path.name):
            put_back(output, target, (), None, quiet)
        path.write_bytes(data)
    assert not target.data_dir.exists()
    with empty.client() as client:
        assert client.dbsize() == 0
    put_back(output, target, (), None, quiet)


def test_damaged_files_are_not_backed_up(config: StoreConfig, tmp_path: Path) -> None:
    with Store.open(config) as store:
        History(FULL).write(store, 20)
    directory = config.data_dir / "collections" / FULL.name
    lengths = {
        name: state["length"]
        for name, state in json.loads((directory / "MANIFEST.json").read_bytes())["files"].items()
    }
    for number, (name, length) in enumerate(lengths.items()):
        path = directory / name
        data = path.read_bytes()
        path.write_bytes(
            data[: length // 2] + bytes([data[length // 2] ^ 1]) + data[length // 2 + 1 :]
        )
        output = tmp_path / str(number)
        with pytest.raises(DataLossError, match=name):
            take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)
        with pytest.raises(NotFoundError):
            archive.read(output)
        path.write_bytes(data)
    unread = BackupConfig(
        data_dir=config.data_dir, output=tmp_path / "unread", verify_features=False
    )
    flip(directory / "features-0.s00000.f16")
    take(unread, (), quiet)
    with pytest.raises(DataLossError, match=r"features-0\.s00000"):
        put_back(unread.output, RestoreConfig(data_dir=tmp_path / "r"), (), None, quiet)


def test_what_is_there_is_never_overwritten(
    config: StoreConfig, target: RestoreConfig, empty: RedisServer, tmp_path: Path
) -> None:
    with Store.open(config) as store:
        History(FULL).write(store, 3)
        History(CODES).write(store, 3)
    output = tmp_path / "backup"
    output.mkdir()
    (output / "note").write_text("mine")
    with pytest.raises(PreconditionError, match="not empty"):
        take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)
    (output / "note").unlink()
    take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)
    with pytest.raises(PreconditionError, match="not empty"):
        take(BackupConfig(data_dir=config.data_dir, output=output), (), quiet)

    put_back(output, target, [CODES.name], None, quiet)
    with empty.client() as client:
        keys = sorted(client.keys())
        files = sorted(target.data_dir.rglob("*"))
        with pytest.raises(AlreadyExistsError, match="Redis"):
            put_back(output, target, (), None, quiet)
        elsewhere = RestoreConfig(data_dir=tmp_path / "other", redis_url=target.redis_url)
        with pytest.raises(AlreadyExistsError, match="Redis"):
            put_back(output, elsewhere, (), None, quiet)
        assert (sorted(client.keys()), sorted(target.data_dir.rglob("*"))) == (keys, files)
        client.flushall()
        with pytest.raises(AlreadyExistsError, match=str(target.data_dir)):
            put_back(output, target, (), None, quiet)
        assert client.dbsize() == 0
    put_back(output, target, [CODES.name], "another", quiet)
    opened = Store.open(StoreConfig(data_dir=target.data_dir, redis_url=target.redis_url))
    said: list[str] = []
    with opened, pytest.raises(PreconditionError, match="in use"):
        put_back(output, target, [FULL.name], None, said.append)
    assert not said, "it read the backup first"


def test_what_cannot_be_is_refused(
    config: StoreConfig, target: RestoreConfig, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="no data directory"):
        take(BackupConfig(data_dir=tmp_path / "no", output=tmp_path / "o"), (), quiet)
    with Store.open(config) as store:
        store.create(FULL)
    with pytest.raises(NotFoundError, match="nobody"):
        take(BackupConfig(data_dir=config.data_dir, output=tmp_path / "o"), ["nobody"], quiet)
    assert not (tmp_path / "o").exists()
    take(BackupConfig(data_dir=config.data_dir, output=tmp_path / "o"), (), quiet)
    with pytest.raises(NotFoundError, match="nobody"):
        put_back(tmp_path / "o", target, ["nobody"], None, quiet)
    with pytest.raises(InvalidInputError):
        put_back(tmp_path / "o", target, (), "../x", quiet)
    with pytest.raises(NotFoundError, match="no backup"):
        put_back(tmp_path, target, (), None, quiet)
    with pytest.raises(InvalidInputError):
        BackupConfig(mb_per_s=-1)
    with pytest.raises(InvalidInputError):
        RestoreConfig(mb_per_s=float("nan"))
