from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hashlens.errors import DataLossError, PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import manifest
from search_service.storage.manifest import FileState, Manifest

EXAMPLE = Manifest(
    spec=CollectionSpec("c", "modèle", 48, 8, FeatureDtype.F32, 1000),
    epoch="e",
    n_buckets=8,
    generation=0,
    rows_per_segment=64,
    seq=5,
    log_crc32=17,
    rows=4,
    deaths=1,
    erased_seq=1,
    files={"ids-0.bin": FileState(20, 99), "features-0.s00000.f32": FileState(128, None)},
)


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    manifest.write(tmp_path, EXAMPLE)
    assert manifest.read(tmp_path) == EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["MANIFEST.json"]


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    manifest.write(tmp_path, EXAMPLE)
    path = tmp_path / manifest.MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataLossError):
            manifest.read(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_cut_manifest_is_noticed(tmp_path: Path, length: int) -> None:
    manifest.write(tmp_path, EXAMPLE)
    os.truncate(tmp_path / manifest.MANIFEST, length)
    with pytest.raises(DataLossError):
        manifest.read(tmp_path)


def test_a_missing_manifest_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(DataLossError):
        manifest.read(tmp_path)


@pytest.mark.parametrize("body", [b"[]", b"null", b"{}", b'{"checksum": 1}', b"\xff", b'"x"'])
def test_other_json_is_noticed(tmp_path: Path, body: bytes) -> None:
    (tmp_path / manifest.MANIFEST).write_bytes(body)
    with pytest.raises(DataLossError):
        manifest.read(tmp_path)


def test_another_format_is_refused_and_not_called_damage(tmp_path: Path) -> None:
    manifest.write(tmp_path, EXAMPLE)
    path = tmp_path / manifest.MANIFEST
    body = json.loads(path.read_bytes())
    body["format"] = 2
    del body["checksum"]
    body["checksum"] = manifest.checksum(body)
    path.write_text(json.dumps(body))
    with pytest.raises(PreconditionError, match="another version"):
        manifest.read(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    manifest.replace_file(target, b"old")
    # A directory in the place of the target makes the rename fail.
    target.unlink()
    target.mkdir()
    (target / "inside").touch()
    with pytest.raises(OSError, match="directory"):
        manifest.replace_file(target, b"new")
    assert list(tmp_path.iterdir()) == [target]
