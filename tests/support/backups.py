"""`hashlens backup` and `hashlens restore` in processes of their own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Record, Store, failpoints
from tests.support.stores import DEADLINE_S, Model, make_record

_COMMANDS = """
from hashlens.cli.main import main
from search_service.backup.commands import backup, restore
main.add_command(backup)
main.add_command(restore)
main(prog_name="hashlens")
"""
_LONGEST_S = 150

FULL = CollectionSpec("full", "m", 100, 33, FeatureDtype.F16, 1000)
CODES = CollectionSpec("codes", "m", 8, 0, expected_rows=10)


def hashlens(*arguments: str | Path, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command, whether or not the package was installed with it."""
    return subprocess.run(
        [sys.executable, "-c", _COMMANDS, *map(str, arguments)],
        env={**os.environ, failpoints.VARIABLE: failpoint},
        capture_output=True,
        text=True,
        timeout=_LONGEST_S,
        check=False,
    )


def lose_feature(directory: Path, row: int) -> None:
    """Let a row of a collection's files miss its feature, by the book."""
    path = directory / "MANIFEST.json"
    manifest = json.loads(path.read_bytes())
    generation, spec = manifest["generation"], manifest["spec"]
    width = spec["dim"] * {"f32": 4, "f16": 2}[spec["feature_dtype"]]
    segment, position = divmod(row, manifest["rows_per_segment"])
    name = f"features-{generation}.s{segment:05d}.{spec['feature_dtype']}"
    with (directory / name).open("r+b") as file:
        file.seek(position * width)
        file.write(bytes(width))
    rows = bytearray((directory / f"rows-{generation}.rec").read_bytes())
    struct.pack_into("<II", rows, row * 48 + 40, zlib.crc32(bytes(width)), 1)
    (directory / f"rows-{generation}.rec").write_bytes(rows)
    state = manifest["files"][f"rows-{generation}.rec"]
    state["crc32"] = zlib.crc32(rows[: state["length"]])
    del manifest["checksum"]
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = zlib.crc32(canonical.encode())
    path.write_bytes(json.dumps(manifest, indent=1).encode())


def exported(path: Path, code_bytes: int) -> tuple[int, dict[str, tuple[int, bytes, bytes]]]:
    """Version, and sequence number, code and extras of each item in an export, by the book."""
    data = path.read_bytes()
    magic, version, width, n_items, seq = struct.unpack_from("<8sIIQQ", data)
    assert (magic, version, width) == (b"HLCATLOG", 1, code_bytes)
    at, found = 32, {}
    for _ in range(n_items):
        item_seq, id_bytes, extras_bytes = struct.unpack_from("<QHI", data, at)
        ends = [at + 14, at + 14 + id_bytes, at + 14 + id_bytes + width]
        at = ends[2] + extras_bytes
        item_id = data[ends[0] : ends[1]].decode()
        found[item_id] = (item_seq, data[ends[1] : ends[2]], data[ends[2] : at])
    assert (at, len(found)) == (len(data), n_items)
    return seq, found


class History:
    """What one writer has written, by version."""

    def __init__(self, spec: CollectionSpec) -> None:
        self.spec = spec
        self.steps: list[tuple[str, Record | None]] = []
        self.rng = np.random.default_rng(1)

    def write(self, store: Store, n_writes: int, stop: threading.Event | None = None) -> None:
        """Upsert, update and delete; every step of it is a version, and is in the local files."""
        collection = store.create(self.spec)
        present = set(self.at(len(self.steps)).items)
        for _ in range(n_writes):
            if stop is not None and stop.is_set():
                break
            ids = [f"i{i}" for i in self.rng.integers(0, 300, size=int(self.rng.integers(1, 30)))]
            if self.rng.random() < 0.3:
                gone = [item_id for item_id in dict.fromkeys(ids) if item_id in present]
                collection.delete(ids, request_id="", deadline_s=DEADLINE_S)
                self.steps += [(item_id, None) for item_id in gone]
                present -= set(gone)
            else:
                records = [make_record(self.spec, item_id, self.rng) for item_id in ids]
                collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
                self.steps += [(record.id, record) for record in records]
                present |= set(ids)
        collection.wait_for(len(self.steps), DEADLINE_S)

    def at(self, version: int) -> Model:
        model = Model(version=version)
        for item_id, record in self.steps[:version]:
            if record is None:
                del model.items[item_id]
            else:
                model.items[item_id] = record
        return model


def quiet(_: str) -> None:
    """Where a command would print."""
