"""Makes the golden files of format v1: ``python -m tests.data.make_golden_format [DIRECTORY]``.

Version 1 is frozen: run this only to add to what is there. The files are what a store leaves that
is given fixed writes, under fixed epochs, with a real Redis:

* ``backup/``: a backup of all collections; without ``catalog.bin``, each of its directories is one
  of a data directory.
* ``redis.json``: the keys in Redis before the first checkpoint trims the log, names and values in
  hexadecimal where they are bytes.
* ``items.json``: what each collection holds, by id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from uuid import UUID

import redis

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.backup import archive
from search_service.backup.take import BackupConfig, take
from search_service.storage import Record, Store, StoreConfig, catalog
from tests.support.backups import lose_feature
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.stores import DEADLINE_S, FAR_MS, Model

GOLDEN = Path(__file__).parent / "golden" / "format-v1"
SEGMENT_BYTES = 160
"""Sixteen rows of the first collection: its features take several files."""
CREATED, HASHLENS = "2015-06-07T08:09:10Z", "0.1.0"
LOST_ROW = 30
"""Of the first collection: its feature is missing."""

SPECS = {
    "full": CollectionSpec("full", "model-a", 100, 5, FeatureDtype.F16, 300),
    "codes": CollectionSpec("codes", "model-b", 8, 0, FeatureDtype.F16, 1),
    "f32": CollectionSpec("f32", "model-c", 64, 3, FeatureDtype.F32, 1000),
    "compacted": CollectionSpec("compacted", "model-e", 65, 5, FeatureDtype.F16, 300),
    "empty": CollectionSpec("empty", "model-d", 512, 1, FeatureDtype.F32, 1),
}

Write = tuple[str, list[Record]]
"""``upsert`` or ``delete``, and items."""


def epoch_of(name: str) -> str:
    """A fixed one."""
    return str(UUID(bytes=_noise(name, 16), version=4))


def writes(name: str) -> list[Write]:
    """What is written: new items, an update of some, deletes, an item that comes back."""
    if name == "empty":
        return []
    first = [_record(name, f"i{n}", 0) for n in range(40)]
    odd = [_record(name, item_id, 0) for item_id in ("\u00e9", "\U0001f600", " ", "x" * 300)]
    again = [_record(name, f"i{n}", 1) for n in range(0, 20, 3)]
    gone = [_record(name, f"i{n}", 0) for n in (1, 2, 3, 39)]
    back = [_record(name, "i2", 2), _record(name, "i5", 2), _record(name, "i5", 3)]
    return [("upsert", first + odd), ("upsert", again), ("delete", gone), ("upsert", back)]


def model_of(name: str) -> Model:
    """What the writes lead to."""
    model = Model()
    for kind, records in writes(name):
        if kind == "upsert":
            model.upsert(records)
        else:
            model.delete([record.id for record in records])
    return model


def make(directory: Path) -> None:
    """Make all files in an empty directory."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(server_binaries()[0]) as server:
        data_dir = Path(folder) / "data"
        in_redis = _write(data_dir, server)
        lose_feature(data_dir / "collections" / "full", LOST_ROW)
        output = directory / "backup"
        config = BackupConfig(data_dir=data_dir, output=output, copy=True)
        made = take(config, (), lambda _: None)
        (output / archive.BACKUP).unlink()
        archive.write(output, dataclasses.replace(made, created=CREATED, hashlens=HASHLENS))
    _write_json(directory / "redis.json", in_redis)
    _write_json(directory / "items.json", {name: _items(name) for name in SPECS})


def _write(data_dir: Path, server: RedisServer) -> dict[str, Any]:
    """Write everything through a store; return the keys before the log is trimmed."""
    config = StoreConfig(
        data_dir=data_dir,
        redis_url=server.url,
        segment_bytes=SEGMENT_BYTES,
        checkpoint_interval_s=3600,
    )
    with Store.open(config) as store, server.client() as client:
        for name, spec in SPECS.items():
            fixed = SimpleNamespace(uuid4=lambda name=name: UUID(epoch_of(name)))
            with mock.patch.object(catalog, "uuid", fixed):
                collection = store.create(spec)
            for number, (kind, records) in enumerate(writes(name)):
                request_id = f"golden-{number}"
                if kind == "upsert":
                    collection.upsert(records, request_id=request_id, deadline_s=DEADLINE_S)
                else:
                    ids = [record.id for record in records]
                    collection.delete(ids, request_id=request_id, deadline_s=DEADLINE_S)
            collection.wait_for(model_of(name).version, DEADLINE_S)
        keys = {name: keys_of(client, name) for name in SPECS}
        store.get("compacted").compact()
        return keys


def keys_of(client: redis.Redis, name: str) -> dict[str, Any]:
    """All keys of a collection that hold its data or its writes; not what is said of replicas."""
    found: dict[str, Any] = {}
    for key in sorted(key.decode() for key in client.keys(f"hl:{{{name}}}:*")):
        if key.endswith(":log"):
            entries = client.xrange(key)
            found[key] = [[entry.decode(), fields[b"r"].hex()] for entry, fields in entries]
        elif key.endswith(":meta"):
            fields = client.hgetall(key)
            found[key] = {field.decode(): fields[field].decode() for field in sorted(fields)}
        elif any(kind in key for kind in (":b:", ":p:", ":req:")):
            fields = client.hgetall(key)
            found[key] = {field.hex(): fields[field].hex() for field in sorted(fields)}
    return found


def _items(name: str) -> dict[str, Any]:
    model = model_of(name)
    items = {}
    for item_id, record in sorted(model.items.items()):
        items[item_id] = {
            "code": record.code.hex(),
            "feature": record.feature.hex(),
            "payload": record.payload.hex(),
            "tags": list(record.tags),
            "expires_ms": record.expires_ms,
        }
    if name == "full":
        items[lost_id()]["feature"] = ""
    return {"version": model.version, "items": items}


def lost_id() -> str:
    """The item in `LOST_ROW`: one of the first write that stays."""
    return f"i{LOST_ROW}"


def _record(name: str, item_id: str, edition: int) -> Record:
    """An item; everything about it follows from its id, in ways that no library decides."""
    spec = SPECS[name]
    noise = _noise(f"{name}/{item_id}/{edition}", 200)
    code = bytearray(noise[: -(-spec.n_bits // 8)])
    if spec.n_bits % 8:
        code[-1] &= (1 << spec.n_bits % 8) - 1
    letter = {FeatureDtype.F16: "e", FeatureDtype.F32: "f"}[spec.feature_dtype]
    numbers = [(byte - 128) / 8 for byte in noise[100 : 100 + spec.dim]]
    payload = noise[120 : 120 + noise[64] % 20]
    tags = tuple(sorted({f"t{byte % 5}" for byte in noise[70 : 70 + noise[65] % 4]}))
    return Record(
        item_id,
        bytes(code),
        struct.pack(f"<{spec.dim}{letter}", *numbers),
        payload if noise[66] % 3 else b"",
        tags,
        FAR_MS + noise[67] if noise[68] % 4 == 0 else 0,
    )


def _noise(seed: str, n_bytes: int) -> bytes:
    blocks = [hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(-(-n_bytes // 32))]
    return b"".join(blocks)[:n_bytes]


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", "utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    target.mkdir(parents=True, exist_ok=True)
    make(target)
