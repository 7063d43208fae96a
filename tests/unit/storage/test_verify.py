"""Every planted difference between Redis and the files is found, no other is, and it is mended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from hashlens.errors import (
    CancelledError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from search_service.storage import Store, StoreConfig
from search_service.storage.catalog import Catalog
from search_service.storage.chunks import Raw
from search_service.storage.differences import Differences
from search_service.storage.file_checks import check_features, check_files
from search_service.storage.layout import bucket_of
from search_service.storage.verify import Verified
from tests.support.around import Around
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import (
    DEADLINE_S,
    assert_holds,
    contents,
    extras,
    in_redis,
    log_record,
    make_record,
    make_records,
    wait_until,
)

on_one_kind = pytest.mark.parametrize("server", server_binaries()[:1], indirect=True)


def verified(here: Around) -> Verified:
    return here.collection.verify(threading.Event())


def filled(here: Around, n: int = 400) -> Around:
    here.upsert(make_records(here.meta.spec, n))
    here.upsert(make_records(here.meta.spec, n // 4, seed=1))
    here.delete(["i5", "i6", f"i{n - 1}"])
    here.settle()
    return here


def bucket(here: Around, item_id: str, kind: str = "b") -> str:
    number = bucket_of(item_id.encode(), here.meta.n_buckets)
    return f"hl:{{{here.meta.spec.name}}}:{kind}:{number}"


def test_nothing_differs(around: Callable[..., Around]) -> None:
    here = filled(around())
    found = verified(here)
    assert (found.n_differences, found.differences) == (0, [])
    assert found.version == here.model.version
    assert found.n_catalog_items == found.n_array_items == len(here.model.items)


@on_one_kind
def test_a_compaction_meanwhile_is_no_difference(
    around: Callable[..., Around], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = filled(around())

    def compact_first(*arguments: Any) -> None:
        here.collection.compact()
        check_features(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("search_service.storage.verify.check_features", compact_first)
        with pytest.raises(UnavailableError, match="rewritten meanwhile"):
            verified(here)
    assert verified(here).n_differences == 0


def test_two_replicas_have_one_digest(
    around: Callable[..., Around], server: RedisServer, tmp_path: Path
) -> None:
    here = around()
    other = Store.open(StoreConfig(data_dir=tmp_path / "other", redis_url=server.url))
    with other:
        theirs = other.get(here.meta.spec.name, deadline_s=DEADLINE_S)
        here.upsert(make_records(here.meta.spec, 300))
        here.delete(["i5", "i6"])
        theirs.wait_for(here.model.version, DEADLINE_S)
        first = verified(here)
        assert theirs.verify(threading.Event()).digest == first.digest
        # Files made anew have no dead rows, and the same items.
        here.collection.rebuild(threading.Event())
        assert verified(here).digest == first.digest
        here.upsert(make_records(here.meta.spec, 1))
        assert verified(here).digest != first.digest


@on_one_kind
def test_the_digest_is_the_one_of_the_book(
    around: Callable[..., Around], client: redis.Redis
) -> None:
    here = filled(around())
    stored = in_redis(client, here.meta.spec.name)
    columns = [b""] * 11
    for item_id in sorted(stored, key=lambda item_id: stored[item_id][0]):
        record = here.model.items[item_id]
        tags = b"".join(bytes([len(tag)]) + tag.encode() for tag in record.tags)
        values = [
            struct.pack("<Q", stored[item_id][0]),
            record.code,
            struct.pack("<Q", record.expires_ms),
            struct.pack("<I", zlib.crc32(record.feature)),
            struct.pack("<I", 0),
        ]
        for text in (item_id.encode(), tags, record.payload):
            values += [struct.pack("<I", len(text)), text]
        columns = [column + value for column, value in zip(columns, values, strict=True)]
    whole = struct.pack("<QQ", here.model.version, len(stored))
    whole += b"".join(hashlib.blake2b(column, digest_size=16).digest() for column in columns)
    assert verified(here).digest == hashlib.blake2b(whole, digest_size=16).digest()


@pytest.mark.parametrize("dim", [0, 8])
def test_writes_meanwhile_are_no_differences(around: Callable[..., Around], dim: int) -> None:
    here = filled(around(dim=dim, expected_rows=20_000), 1500)
    rng = np.random.default_rng(3)
    began = here.model.version

    class Meanwhile(threading.Event):
        """Something is written whenever the check asks whether to stop."""

        def is_set(self) -> bool:
            ids = [f"i{i}" for i in rng.integers(0, 2000, size=30)]
            here.delete(ids[:10])
            here.upsert([make_record(here.meta.spec, item_id, rng) for item_id in ids[10:]])
            return super().is_set()

    found = here.collection.verify(Meanwhile())
    assert found.differences == []
    assert found.version > began
    assert found.n_catalog_items == found.n_array_items


def plant(client: redis.Redis, here: Around) -> dict[str, Callable[[], object]]:
    """Differences by what is said of them; each is about i7."""
    name = here.meta.spec.name
    seq, code, _ = in_redis(client, name)["i7"]
    key, meta = bucket(here, "i7"), f"hl:{{{name}}}:meta"
    record = here.model.items["i7"]
    other = extras(b"another", record.tags, record.expires_ms)
    flipped = bytes([code[0] ^ 1]) + code[1:]
    n_bytes = seq.to_bytes(8, "little")
    return {
        "is in the arrays, and not in Redis": lambda: [
            client.hdel(key, "i7"),
            client.hdel(bucket(here, "i7", "p"), "i7"),
            client.hincrby(meta, "n_items", -1),
        ],
        "its code differs": lambda: client.hset(key, "i7", n_bytes + flipped),
        "its version is": lambda: client.hset(key, "i7", (5).to_bytes(8, "little") + code),
        "its payload, tags or expiry differ": lambda: client.hset(
            bucket(here, "i7", "p"), "i7", other
        ),
        "not in the arrays": lambda: [
            # i6 was deleted, so its number is free.
            client.hset(bucket(here, "new"), "new", (7).to_bytes(8, "little") + code),
            client.hincrby(meta, "n_items", 1),
        ],
        "Redis counts": lambda: client.hincrby(meta, "n_items", 3),
    }


@pytest.mark.parametrize(
    "what",
    [
        "is in the arrays, and not in Redis",
        "its code differs",
        "its version is",
        "its payload, tags or expiry differ",
        "not in the arrays",
        "Redis counts",
    ],
)
def test_a_difference_is_found_and_mended(
    around: Callable[..., Around], client: redis.Redis, what: str
) -> None:
    here = filled(around())
    plant(client, here)[what]()
    found = verified(here)
    assert found.n_differences == 1, found.differences
    assert what in found.differences[0]
    here.collection.rebuild(threading.Event())
    after = verified(here)
    if what == "Redis counts":  # Rebuilding files does not mend Redis.
        assert after.differences == found.differences
        return
    missing = {"not in the arrays": ["new"], "its code differs": ["i7"], "its version is": ["i7"]}
    # Redis has no features, and the old one was stored with something else.
    assert after.differences == [f"{i}: its feature is missing" for i in missing.get(what, [])]
    redis_has = in_redis(client, here.meta.spec.name)
    held = contents(here.collection.snapshot())
    assert {i: r.code for i, r in held.items()} == {i: v[1] for i, v in redis_has.items()}


FILES = [
    "codes-0.w0.u64",
    "codes-0.w1.u64",
    "rows-0.rec",
    "ids-0.bin",
    "payloads-0.bin",
    "tags-0.bin",
    "dead-0.u64",
    "features-0.s00001.f16",
    "MANIFEST.json",
]


@on_one_kind
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_mended(around: Callable[..., Around], name: str) -> None:
    here = filled(around())
    path = here.files / name
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 if name == "MANIFEST.json" else 30)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes((byte ^ 0x41,)))
    found = verified(here)
    assert found.n_differences >= 1
    subject = "does not match its checksum" if "features" in name else name
    assert any(subject in line for line in found.differences), found.differences
    here.collection.rebuild(threading.Event())
    after = verified(here)
    if "features" in name:  # Nobody else has it here.
        assert len(after.differences) == 1
        assert "its feature is missing" in after.differences[0]
    elif name in ("rows-0.rec", "ids-0.bin", "codes-0.w0.u64", "codes-0.w1.u64"):
        # The row with the byte cannot prove what its feature is.
        assert all("its feature is missing" in line for line in after.differences)
        assert len(after.differences) <= 2
    else:
        assert after.differences == []
    expected = {i: (r.code, r.payload, r.tags) for i, r in here.model.items.items()}
    held = contents(here.collection.snapshot())
    assert {i: (r.code, r.payload, r.tags) for i, r in held.items()} == expected


@on_one_kind
def test_files_that_are_gone_or_cut(around: Callable[..., Around]) -> None:
    here = filled(around())
    # Not the store's own, which it would put aside.
    local = here.installed(here.rebuild(here.files))
    segments = sorted(path.name for path in local.directory.glob("features-*"))
    (local.directory / segments[0]).unlink()
    os.truncate(local.directory / segments[1], 16)
    os.truncate(local.directory / "ids-0.bin", 16)
    differences, stop = Differences(), threading.Event()
    check_files(local.directory, differences, stop)
    assert [line.partition(":")[0] for line in differences.lines] == [*segments[:2], "ids-0.bin"]
    differences = Differences()
    check_features(local.directory, local.frozen(), local.spec, differences, stop)
    # 1024 bytes have 64 features of 8 numbers, 16 bytes have one.
    assert differences.n == 1 + 63
    assert segments[0] in differences.lines[0]
    local.close()


def test_a_rebuilt_collection_goes_on(around: Callable[..., Around], data_dir: Path) -> None:
    here = filled(around())
    before = here.collection.snapshot()
    held = contents(before)
    made = here.collection.rebuild(threading.Event())
    assert made.seq == here.model.version
    assert here.collection.snapshot().n_alive == here.collection.snapshot().rows
    assert contents(before) == held, "a snapshot in use stays valid"
    here.upsert(make_records(here.meta.spec, 50, seed=9))
    here.delete(["i1"])
    assert_holds(here.collection, here.model)
    here.settle()
    here.collection.rebuild(threading.Event())
    assert {path.name[-9:] for path in here.files.glob("rows-*")} == {"ows-2.rec"}
    here.store.close()
    config = StoreConfig(data_dir=data_dir, redis_url=here.url)
    with Store.open(config) as store:
        collection = store.get(here.meta.spec.name)
        assert_holds(collection, here.model)
        assert collection.verify(threading.Event()).differences == []


def test_files_made_anew_may_miss_features(
    around: Callable[..., Around], client: redis.Redis
) -> None:
    here = filled(around())
    here.store.close()
    config = StoreConfig(data_dir=here.files.parent.parent, redis_url=here.url)
    records = make_records(here.meta.spec, 50, prefix="late")
    with contextlib.closing(Catalog(here.url, 5.0)) as catalog:
        raw = [Raw(record.id.encode(), log_record(record)) for record in records]
        catalog.put(here.meta, raw, request_id="late", deadline_s=DEADLINE_S)
    # The log is cut before this replica has read it.
    here.model.upsert(records)
    client.xtrim(f"hl:{{{here.meta.spec.name}}}:log", maxlen=1, approximate=False)
    with Store.open(config) as store:

        def is_back() -> bool:
            collection = store.get(here.meta.spec.name)
            return not collection.is_lost and collection.snapshot().version == here.model.version

        wait_until(is_back, "the files are made anew")
        collection = store.get(here.meta.spec.name)
        found = collection.verify(threading.Event())
        # All but the last write are not in the log, and nobody else has them.
        assert found.n_differences == 49
        assert all("its feature is missing" in line for line in found.differences)
        assert set(contents(collection.snapshot())) == set(here.model.items)


@on_one_kind
def test_a_redis_that_went_back_is_not_believed(
    around: Callable[..., Around], client: redis.Redis
) -> None:
    here = filled(around())
    client.hset(f"hl:{{{here.meta.spec.name}}}:meta", "seq", here.model.version - 1)
    with pytest.raises(PreconditionError, match="acknowledged writes"):
        here.collection.rebuild(threading.Event())
    assert_holds(here.collection, here.model)


@on_one_kind
def test_one_rebuild_at_a_time_and_it_can_be_stopped(around: Callable[..., Around]) -> None:
    here = filled(around())
    refused: list[bool] = []

    class Meanwhile(threading.Event):
        def is_set(self) -> bool:
            with pytest.raises(OverloadedError):
                here.collection.rebuild(threading.Event())
            refused.append(True)
            self.set()
            return super().is_set()

    with pytest.raises(CancelledError):
        here.collection.rebuild(Meanwhile())
    assert refused
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(CancelledError):
        here.collection.verify(stopped)
    assert_holds(here.collection, here.model)
    here.upsert(make_records(here.meta.spec, 10, prefix="after"))
    here.settle()
    assert verified(here).differences == []
