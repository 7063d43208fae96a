"""``BACKUP.json``: what a backup holds. Written last: a directory without it is no backup."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hashlens.errors import DataLossError, NotFoundError, PreconditionError
from search_service.backup import catalog_file
from search_service.backup.files import Pace, check_features, crc32_of
from search_service.storage import layout, manifest
from search_service.storage.manifest import FileState, Manifest

BACKUP: Final = "BACKUP.json"
"""Its file name."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Saved:
    """One collection of a backup."""

    epoch: str
    generation: int
    seq: int
    """The version that was saved."""
    rows: int
    items: int
    """Rows that are alive."""
    files: dict[str, FileState]
    """All files of the collection's directory; CRC-32 None for features, which rows check."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What a backup holds."""

    created: str
    """When it was made, as in ``2015-06-07T08:09:10Z``."""
    hashlens: str
    """The version of Hashlens that made it."""
    collections: dict[str, Saved]


def write(directory: Path, archive: Archive) -> None:
    """Make a directory a backup; durable when it returns.

    Raises
    ------
    OSError
        The disk is full or broken.
    """
    body = dataclasses.asdict(archive)
    body["format"] = _VERSION
    body["checksum"] = manifest.checksum(body)
    manifest.replace_file(directory / BACKUP, json.dumps(body, indent=1).encode())


def read(directory: Path) -> Archive:
    """Read what a backup holds.

    Raises
    ------
    NotFoundError
        The directory is no backup.
    DataLossError
        It is damaged.
    PreconditionError
        It is of another format version.
    """
    path = directory / BACKUP
    try:
        body = json.loads(path.read_bytes())
        if body.pop("checksum") != manifest.checksum(body):
            raise DataLossError(f"{path} does not match its checksum")
        if body.pop("format") != _VERSION:
            raise PreconditionError(
                f"{path} was written by another version of Hashlens; this one reads format "
                f"{_VERSION}."
            )
        collections = {}
        for name, saved in body.pop("collections").items():
            files = {file: FileState(**state) for file, state in saved.pop("files").items()}
            if not layout.is_safe_name(name) or any(Path(file).name != file for file in files):
                raise DataLossError(f"{path} names what no backup holds")
            collections[name] = Saved(files=files, **saved)
        return Archive(collections=collections, **body)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"{directory} is no backup: it has no {BACKUP}, which is written last."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLossError(f"{path} cannot be read: {error!r}") from error


def check(directory: Path, name: str, saved: Saved, pace: Pace) -> Manifest:
    """Compare a collection in a backup with every checksum; return its manifest.

    Raises
    ------
    DataLossError
        A file is missing or damaged; the message names it.
    PreconditionError
        A file is of another format version.
    """
    folder = directory / name
    for file, state in saved.files.items():
        if state.crc32 is not None and crc32_of(folder / file, state.length, pace) != state.crc32:
            raise DataLossError(f"{folder / file} does not match its checksum")
    loaded = manifest.read(folder)
    expected = {**loaded.files}
    for own in (manifest.MANIFEST, catalog_file.CATALOG):
        if own not in saved.files:
            raise DataLossError(f"{folder / own} is missing")
        expected[own] = saved.files[own]
    found = (loaded.spec.name, loaded.epoch, loaded.generation, loaded.seq, loaded.rows)
    if expected != saved.files or found != (
        (name, saved.epoch, saved.generation, saved.seq, saved.rows)
    ):
        raise DataLossError(f"{folder / manifest.MANIFEST} is not what {BACKUP} says")
    check_features(folder, loaded, pace)
    return loaded
