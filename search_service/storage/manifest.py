"""The manifest: what of a collection's files is safe, written so that it is whole or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hashlens.errors import DataLossError, PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import layout
from search_service.storage.failpoints import reach

MANIFEST: Final = "MANIFEST.json"
"""Its file name."""


@dataclass(frozen=True, slots=True)
class FileState:
    """How much of an append-only file counts."""

    length: int
    """Bytes from its beginning."""
    crc32: int | None
    """Of those bytes; None for features, whose checksums are in the rows."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A consistent prefix of a collection's files."""

    spec: CollectionSpec
    epoch: str
    n_buckets: int
    generation: int
    """Part of the file names; compaction writes the next one."""
    rows_per_segment: int
    seq: int
    """The last write that the files hold."""
    log_crc32: int
    """Of the log record of that write; 0 where there is none yet."""
    rows: int
    deaths: int
    erased_seq: int
    """Rows that were dead at this write are in none of the files."""
    files: dict[str, FileState]


def write(directory: Path, manifest: Manifest) -> None:
    """Replace a directory's manifest; durable when it returns.

    Raises
    ------
    OSError
        The disk is full or broken; the old manifest is still there.
    """
    body = dataclasses.asdict(manifest)
    body["spec"]["feature_dtype"] = manifest.spec.feature_dtype.value
    body["format"] = layout.FORMAT_VERSION
    body["checksum"] = checksum(body)
    reach("checkpoint.manifest")
    replace_file(directory / MANIFEST, json.dumps(body, indent=1).encode())


def read(directory: Path) -> Manifest:
    """Read a directory's manifest.

    Raises
    ------
    DataLossError
        It is missing or damaged.
    PreconditionError
        It is whole, but of another format version.
    """
    path = directory / MANIFEST
    try:
        return parse(path.read_bytes(), path)
    except OSError as error:
        # Not the error's own words for itself: of bytes that are no text they are all the bytes.
        raise DataLossError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def parse(data: bytes, path: Path) -> Manifest:
    """Return the manifest that a file's bytes are; raises as `read`, `path` for the message."""
    try:
        body = json.loads(data)
        if body.pop("checksum") != checksum(body):
            raise DataLossError(f"{path} does not match its checksum")
        if body.pop("format") != layout.FORMAT_VERSION:
            raise PreconditionError(
                f"{path} was written by another version of Hashlens; this one reads format "
                f"{layout.FORMAT_VERSION}. Use that version, or another data directory."
            )
        spec = body.pop("spec")
        spec["feature_dtype"] = FeatureDtype(spec["feature_dtype"])
        files = {name: FileState(**state) for name, state in body.pop("files").items()}
        return Manifest(spec=CollectionSpec(**spec), files=files, **body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Not the error's own words for itself: of bytes that are no text they are all the bytes.
        raise DataLossError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in a file, all or nothing; durable when it returns."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reach("checkpoint.rename")
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(body: dict[str, Any]) -> int:
    """Return the CRC-32 of the canonical form of JSON that has no checksum yet."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return zlib.crc32(canonical.encode())
