"""`hashlens backup` and `hashlens restore` in processes of their own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from search_service.storage import failpoints

_COMMANDS = """
from hashlens.cli.main import main
from search_service.backup.commands import backup, restore
main.add_command(backup)
main.add_command(restore)
main(prog_name="hashlens")
"""
_LONGEST_S = 60


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
