"""What the tests of the store share: items, a model of a collection, and readers of the truth.

The readers follow `docs/format.md` and share no code with the store.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import redis

from hashlens.types import CollectionSpec
from search_service.snapshot import Snapshot
from search_service.storage import Collection, Record

DEADLINE_S = 30.0
"""Of calls that are to succeed, or to be refused at once: a busy machine may take long."""
FAR_MS = 4_000_000_000_000
"""An expiry that no test lives to see."""


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Poll until a condition holds."""
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends, f"not within {within_s} s: {what}"
        time.sleep(0.01)


def make_record(
    spec: CollectionSpec, item_id: str, rng: np.random.Generator, payload: bytes | None = None
) -> Record:
    """An item with random content that fits a collection."""
    code = bytearray(rng.bytes(-(-spec.n_bits // 8)))
    if spec.n_bits % 8:
        code[-1] &= (1 << spec.n_bits % 8) - 1
    numbers = rng.standard_normal(spec.dim).astype(spec.feature_dtype.numpy)
    if payload is None:
        payload = rng.bytes(int(rng.integers(0, 30)))
    tags = tuple(sorted({f"t{i}" for i in rng.integers(0, 5, size=int(rng.integers(0, 3)))}))
    expires_ms = FAR_MS if rng.random() < 0.2 else 0
    return Record(item_id, bytes(code), numbers.tobytes(), payload, tags, expires_ms)


def make_records(spec: CollectionSpec, n: int, seed: int = 0, prefix: str = "i") -> list[Record]:
    rng = np.random.default_rng(seed)
    return [make_record(spec, f"{prefix}{i}", rng) for i in range(n)]


@dataclass
class Model:
    """What a collection must hold."""

    items: dict[str, Record] = field(default_factory=dict)
    version: int = 0

    def upsert(self, records: list[Record]) -> None:
        for record in records:
            # Behind the others: a replaced item is as young as its last write.
            self.items.pop(record.id, None)
            self.items[record.id] = record
            self.version += 1

    def delete(self, ids: list[str]) -> int:
        found = 0
        for item_id in ids:
            if self.items.pop(item_id, None) is not None:
                self.version += 1
                found += 1
        return found


def contents(snapshot: Snapshot) -> dict[str, Record]:
    """Everything alive in a snapshot, by id, through each of its ways of looking."""
    dead = np.zeros(snapshot.rows, np.uint8) if snapshot.dead is None else snapshot.dead
    rows = np.flatnonzero(dead == 0)
    assert len(rows) == snapshot.n_alive
    ids = snapshot.ids_of(rows)
    assert len(set(ids)) == len(ids)
    assert [snapshot.row_of(item_id) for item_id in ids] == rows.tolist()
    payloads = snapshot.payloads_of(rows)
    codes = snapshot.codes_of(rows)
    tags, expiries = snapshot.ids.tags_of(rows), snapshot.ids.expiries_of(rows)
    found = {}
    for i, (row, item_id) in enumerate(zip(rows.tolist(), ids, strict=True)):
        feature = snapshot.feature_of(row)
        content = b"" if feature is None else feature.tobytes()
        found[item_id] = Record(
            item_id, codes[i].tobytes(), content, payloads[i], tags[i], expiries[i]
        )
    return found


def assert_holds(collection: Collection, model: Model) -> None:
    """The collection's newest snapshot is the model, once it has the model's version."""
    snapshot = collection.wait_for(model.version, DEADLINE_S)
    assert snapshot.version == model.version
    assert contents(snapshot) == model.items
    info = collection.info()
    assert (info.version, info.n_items) == (model.version, len(model.items))


def extras(payload: bytes, tags: tuple[str, ...], expires_ms: int) -> bytes:
    """What is stored of these, by the book."""
    if not (payload or tags or expires_ms):
        return b""
    packed = b"".join(bytes([len(tag.encode())]) + tag.encode() for tag in tags)
    return struct.pack("<QH", expires_ms, len(packed)) + packed + payload


def log_record(record: Record) -> bytes:
    """An item's log record, by the book."""
    item_id = record.id.encode()
    more = extras(record.payload, record.tags, record.expires_ms)
    header = struct.pack("<BHII", 1, len(item_id), len(more), len(record.feature))
    return header + item_id + record.code + more + record.feature


def in_redis(client: redis.Redis, name: str) -> dict[str, tuple[int, bytes, bytes]]:
    """Sequence number, code and extras of each item, read from the buckets."""
    meta = client.hgetall(f"hl:{{{name}}}:meta")
    n_buckets = int(meta[b"n_buckets"])
    found = {}
    for bucket in range(n_buckets):
        payloads = client.hgetall(f"hl:{{{name}}}:p:{bucket}")
        values = client.hgetall(f"hl:{{{name}}}:b:{bucket}")
        assert set(payloads) <= set(values)
        for item_id, value in values.items():
            assert zlib.crc32(item_id) % n_buckets == bucket
            (seq,) = struct.unpack("<Q", value[:8])
            found[item_id.decode()] = (seq, value[8:], payloads.get(item_id, b""))
    assert int(meta[b"n_items"]) == len(found)
    return found


def assert_in_redis(client: redis.Redis, name: str, model: Model) -> None:
    """The buckets hold the model."""
    expected = {
        i: (record.code, extras(record.payload, record.tags, record.expires_ms))
        for i, record in model.items.items()
    }
    found = in_redis(client, name)
    assert {i: (code, more) for i, (_, code, more) in found.items()} == expected
    assert int(client.hget(f"hl:{{{name}}}:meta", "seq")) == model.version


def on_disk(directory: Path) -> tuple[int, dict[str, Record]]:
    """Version and items of a collection's files as of their manifest, every checksum checked."""
    manifest = json.loads((directory / "MANIFEST.json").read_bytes())
    checksum = manifest.pop("checksum")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert zlib.crc32(canonical.encode()) == checksum
    assert manifest["format"] == 1
    spec, rows = manifest["spec"], manifest["rows"]
    data = {}
    for name, state in manifest["files"].items():
        data[name] = (directory / name).read_bytes()[: state["length"]]
        assert len(data[name]) == state["length"]
        if state["crc32"] is not None:
            assert zlib.crc32(data[name]) == state["crc32"]
    g = manifest["generation"]
    n_words = -(-spec["n_bits"] // 64)
    words = [np.frombuffer(data[f"codes-{g}.w{j}.u64"], "<u8") for j in range(n_words)]
    records = [
        struct.unpack("<QQQQQII", data[f"rows-{g}.rec"][i : i + 48])
        for i in range(0, 48 * rows, 48)
    ]
    deaths = np.frombuffer(data[f"dead-{g}.u64"], "<u8").reshape(-1, 2)
    assert len(deaths) == manifest["deaths"]
    dtype = spec["feature_dtype"]
    width = spec["dim"] * {"f32": 4, "f16": 2}[dtype]
    per_segment = manifest["rows_per_segment"]
    found = {}
    for row in sorted(set(range(rows)) - {int(r) for r in deaths[:, 0]}):
        _, id_end, payload_end, tags_end, expires_ms, feature_crc32, flags = records[row]
        _, id_start, payload_start, tags_start, _, _, _ = records[row - 1] if row else (0,) * 7
        code = b"".join(word[row].tobytes() for word in words)[: -(-spec["n_bits"] // 8)]
        feature = b""
        if width:
            segment, position = divmod(row, per_segment)
            content = data[f"features-{g}.s{segment:05d}.{dtype}"]
            feature = content[position * width : (position + 1) * width]
        assert zlib.crc32(feature) == feature_crc32
        assert flags in (0, 1)
        if flags:
            assert not any(feature)
            feature = b""
        item_id = data[f"ids-{g}.bin"][id_start:id_end].decode()
        assert item_id not in found
        packed = data[f"tags-{g}.bin"][tags_start:tags_end]
        tags = []
        while packed:
            tags.append(packed[1 : 1 + packed[0]].decode())
            packed = packed[1 + packed[0] :]
        payload = data[f"payloads-{g}.bin"][payload_start:payload_end]
        found[item_id] = Record(item_id, code, feature, payload, tuple(tags), expires_ms)
    return manifest["seq"], found
