"""Files of format v1, made once: every version must open them, and make the same bytes again."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import redis

from search_service.backup import archive
from search_service.backup.files import Pace
from search_service.backup.put_back import RestoreConfig, put_back
from search_service.storage import Record, Store, StoreConfig, layout
from search_service.storage.local import LocalCollection
from tests.data.make_golden_format import GOLDEN, LOST_ROW, SPECS, keys_of, lost_id, make, model_of
from tests.data.make_golden_format import writes as golden_writes
from tests.support.backups import exported
from tests.support.redis_server import RedisServer
from tests.support.stores import (
    DEADLINE_S,
    assert_holds,
    contents,
    in_redis,
    log_record,
    on_disk,
    wait_until,
)

NAMES = sorted(SPECS)


def expected(name: str) -> tuple[int, dict[str, Record]]:
    """Version and items, as they were written down."""
    found = json.loads((GOLDEN / "items.json").read_bytes())[name]
    items = {
        item_id: Record(
            item_id,
            bytes.fromhex(item["code"]),
            bytes.fromhex(item["feature"]),
            bytes.fromhex(item["payload"]),
            tuple(item["tags"]),
            item["expires_ms"],
        )
        for item_id, item in found["items"].items()
    }
    return found["version"], items


def golden_keys(name: str) -> dict[str, Any]:
    """What Redis had."""
    keys: dict[str, Any] = json.loads((GOLDEN / "redis.json").read_bytes())[name]
    return keys


def as_data_dir(folder: Path) -> Path:
    """Copy the golden files to where a store looks for them."""
    for name in NAMES:
        ignored = shutil.ignore_patterns("catalog.bin")
        shutil.copytree(GOLDEN / "backup" / name, folder / "collections" / name, ignore=ignored)
    return folder


def into_redis(client: redis.Redis, name: str) -> None:
    """Put the golden keys in."""
    for key, content in golden_keys(name).items():
        if key.endswith(":log"):
            for entry, record in content:
                client.xadd(key, {"r": bytes.fromhex(record)}, id=entry)
        elif key.endswith(":meta"):
            client.hset(key, mapping=content)
        else:
            client.hset(
                key, mapping={bytes.fromhex(k): bytes.fromhex(v) for k, v in content.items()}
            )
    client.sadd("hl:collections", name)


@pytest.fixture
def clean(client: redis.Redis) -> redis.Redis:
    client.flushall()
    return client


def test_the_golden_files_are_what_was_written() -> None:
    for name in NAMES:
        version, items = expected(name)
        model = model_of(name)
        assert version == model.version
        assert {i: r for i, r in items.items() if i != lost_id() or name != "full"} == {
            i: r for i, r in model.items.items() if i != lost_id() or name != "full"
        }
    assert expected("full")[1][lost_id()].feature == b""


def test_the_same_writes_make_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*") if path.is_file()}
    for path in sorted(made):
        assert (tmp_path / path).read_bytes() == (GOLDEN / path).read_bytes(), path


@pytest.mark.parametrize("name", NAMES)
def test_files_are_opened_by_the_store_and_by_the_book(name: str, tmp_path: Path) -> None:
    directory = as_data_dir(tmp_path) / "collections" / name
    assert on_disk(directory) == expected(name)
    local = LocalCollection.load(directory)
    try:
        assert (local.seq, contents(local.snapshot)) == expected(name)
        assert local.spec == SPECS[name]
        assert local.n_missing_features == (name == "full")
    finally:
        local.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_log_is_read_by_the_store_and_by_the_book(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    by_hand = [
        log_record(record) if kind == "upsert" else struct.pack("<BHII", 2, len(i), 0, 0) + i
        for kind, records in golden_writes(name)
        for record in records
        for i in [record.id.encode()]
    ]
    key = f"hl:{{{name}}}:log"
    raw = [bytes.fromhex(record) for _, record in golden_keys(name).get(key, [])]
    assert raw == by_hand
    local = LocalCollection.create(
        tmp_path / name, spec, epoch="e", n_buckets=1, segment_bytes=1 << 10
    )
    try:
        records = [
            layout.unpack_record(seq, data, spec.n_bits, layout.feature_bytes(spec))
            for seq, data in enumerate(raw, 1)
        ]
        if records:
            local.apply(records)
        assert contents(local.snapshot) == model_of(name).items
    finally:
        local.close()


def test_redis_is_read_by_the_store_and_by_the_book(
    server: RedisServer, clean: redis.Redis, tmp_path: Path
) -> None:
    for name in NAMES:
        into_redis(clean, name)
        assert keys_of(clean, name) == golden_keys(name)
        assert set(in_redis(clean, name)) == set(expected(name)[1])
    # A new replica rebuilds everything from the log, the feature that the files lost as well.
    with Store.open(StoreConfig(data_dir=tmp_path / "new", redis_url=server.url)) as store:
        for name in NAMES:
            assert_holds(store.get(name, deadline_s=DEADLINE_S), model_of(name))


def test_a_service_goes_on_with_files_and_redis(
    server: RedisServer, clean: redis.Redis, tmp_path: Path
) -> None:
    for name in NAMES:
        into_redis(clean, name)
    with Store.open(StoreConfig(data_dir=as_data_dir(tmp_path), redis_url=server.url)) as store:
        for name in NAMES:
            collection = store.get(name)
            wait_until(lambda c=collection: c.info().writable, f"{name} can be written")
            version, items = expected(name)
            assert contents(collection.snapshot()) == items
            result = collection.delete(sorted(items)[:1], request_id="", deadline_s=DEADLINE_S)
            assert result.version == version + len(sorted(items)[:1])


def test_a_backup_is_restored(server: RedisServer, clean: redis.Redis, tmp_path: Path) -> None:
    output = GOLDEN / "backup"
    for name, saved in archive.read(output).collections.items():
        assert archive.check(output, name, saved, Pace(0, lambda _: None)).spec == SPECS[name]
        version, items = exported(output / name / "catalog.bin", -(-SPECS[name].n_bits // 8))
        into_redis(clean, name)
        assert (version, items) == (expected(name)[0], in_redis(clean, name))
    clean.flushall()
    target = RestoreConfig(data_dir=tmp_path, redis_url=server.url)
    put_back(output, target, (), None, lambda _: None)
    for name in NAMES:
        golden = golden_keys(name)
        buckets = [key for key in golden if ":b:" in key or ":p:" in key]
        assert {key: keys_of(clean, name).get(key) for key in buckets} == {
            key: golden[key] for key in buckets
        }
        assert on_disk(tmp_path / "collections" / name) == expected(name)
    with Store.open(StoreConfig(data_dir=tmp_path, redis_url=server.url)) as store:
        for name in NAMES:
            assert contents(store.get(name).snapshot()) == expected(name)[1]
            if name == "full":
                snapshot = store.get(name).snapshot()
                assert snapshot.has_feature is not None
                assert [row for row, has in enumerate(snapshot.has_feature) if not has] == [
                    LOST_ROW
                ]
