"""Making a backup, while a search service may be writing."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hashlens import __version__
from hashlens.config import setting
from hashlens.errors import (
    DataLossError,
    InvalidInputError,
    LimitError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from search_service.backup import archive, catalog_file
from search_service.backup.archive import Archive, Saved
from search_service.backup.files import Pace, blocks, check_features, copy, link, open_source
from search_service.storage import layout, manifest
from search_service.storage.failpoints import reach
from search_service.storage.manifest import FileState, Manifest

_MAX_ATTEMPTS: Final = 10
"""How often a collection is begun anew because its files were replaced meanwhile."""

_MANIFEST_BYTES: Final = 1 << 26


@dataclass(frozen=True, kw_only=True)
class BackupConfig:
    """Options of `hashlens backup`."""

    data_dir: Path = setting(Path("hashlens-data"), "The search service's data directory.")
    output: Path = setting(Path("hashlens-backup"), "New or empty directory for the backup.")
    base: Path | None = setting(
        None, "An earlier backup: full feature files that it has are linked to, not copied again."
    )
    copy: bool = setting(False, "Copy also what could be a hard link into the data directory.")
    verify_features: bool = setting(True, "Read all features and compare their checksums.")
    mb_per_s: float = setting(0.0, "Read at most so much, in MB per second; 0: no limit.")

    def __post_init__(self) -> None:
        if not self.mb_per_s >= 0:
            raise InvalidInputError("mb_per_s is 0 or more", field="mb_per_s")


def take(config: BackupConfig, names: Sequence[str], report: Callable[[str], None]) -> Archive:
    """Back a data directory up as of the last checkpoint of each collection.

    It takes no lock and asks no service: what a manifest describes does not change.

    Parameters
    ----------
    config
        Where from, where to.
    names
        Collections; empty for all.
    report
        Called with a line for each collection.

    Raises
    ------
    NotFoundError
        There is no such data directory, collection or base.
    PreconditionError
        The output directory is not empty, or something is of another format version.
    DataLossError
        A file is damaged; the message names it.
    UnavailableError
        A collection's files are replaced faster than they can be copied.
    LimitError
        The disk is full or broken.
    """
    root = config.data_dir / "collections"
    if not root.is_dir():
        raise NotFoundError(f"{config.data_dir} is no data directory of a search service.")
    for name in names:
        if not (layout.is_safe_name(name) and (root / name).is_dir()):
            raise NotFoundError(f"{config.data_dir} has no collection {name}.")
    base = None if config.base is None else archive.read(config.base)
    taker = _Taker(config, base, Pace(config.mb_per_s * 1e6, report), report)
    try:
        return taker.take(root, names)
    except OSError as error:
        raise LimitError(f"The backup cannot be written or read ({error}).") from error


class _ReplacedError(Exception):
    """The files are not those of the collection any more."""


class _Taker:
    """One backup in the making."""

    def __init__(
        self,
        config: BackupConfig,
        base: Archive | None,
        pace: Pace,
        report: Callable[[str], None],
    ) -> None:
        self._config = config
        self._base = base
        self._pace = pace
        self._report = report

    def take(self, root: Path, names: Sequence[str]) -> Archive:
        """Back collections up, and say so in the end."""
        output = self._config.output
        output.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise PreconditionError(
                f"{output} is not empty. Choose another directory, or empty it if it holds a "
                f"backup that was not finished: one without {archive.BACKUP}."
            )
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        collections = {}
        there = sorted(path.name for path in root.iterdir() if layout.is_safe_name(path.name))
        for name in names or there:
            saved = self._collection(root / name)
            if saved is not None:
                collections[name] = saved
            elif names:
                raise NotFoundError(f"The collection {name} was dropped meanwhile.")
        made = Archive(created, __version__, collections)
        manifest.sync_directory(output)
        manifest.sync_directory(output.absolute().parent)
        reach("backup.finish")
        archive.write(output, made)
        return made

    def _collection(self, source: Path) -> Saved | None:
        """Back one collection up; None if it was dropped."""
        target = self._config.output / source.name
        for _ in range(_MAX_ATTEMPTS):
            target.mkdir(mode=0o700)
            try:
                with _opened(source) as (directory_fd, loaded, raw):
                    return self._files(source, directory_fd, loaded, raw, target)
            except _ReplacedError:
                shutil.rmtree(target)
                if not source.exists():
                    self._report(f"{source.name}: dropped meanwhile, left out")
                    return None
                self._report(f"{source.name}: its files were replaced meanwhile, once more")
        raise UnavailableError(
            f"The files of {source.name} were replaced {_MAX_ATTEMPTS} times during the backup."
        )

    def _files(
        self, source: Path, directory_fd: int, loaded: Manifest, raw: bytes, target: Path
    ) -> Saved:
        """Take the files that a manifest describes."""
        began_s = time.monotonic()
        n_linked = 0
        base = None
        # The rows come first: by them an earlier backup's features are known for the same.
        rows = layout.rows_file(loaded.generation)
        for name in sorted(loaded.files, key=lambda name: name != rows):
            try:
                n_linked += self._file(source, directory_fd, name, loaded, target, base)
                if name == rows:
                    base = self._base_of(source.name, loaded, target / rows)
            except FileNotFoundError:
                if _is_current(source, directory_fd, loaded):
                    raise DataLossError(f"{source / name} is missing") from None
                raise _ReplacedError from None
            reach("backup.file")
        (target / manifest.MANIFEST).write_bytes(raw)
        if self._config.verify_features:
            check_features(target, loaded, self._pace)
        own = {
            manifest.MANIFEST: FileState(len(raw), zlib.crc32(raw)),
            catalog_file.CATALOG: catalog_file.write(target, loaded),
        }
        for name in own:
            _sync(target / name)
        manifest.sync_directory(target)
        n_items = loaded.rows - loaded.deaths
        n_bytes = sum(state.length for state in loaded.files.values())
        self._report(
            f"{source.name}: version {loaded.seq}, the last checkpoint: {n_items:,} items in "
            f"{loaded.rows:,} rows, "
            f"{n_bytes / 1e6:,.1f} MB, {n_linked} of {len(loaded.files)} files linked, "
            f"{time.monotonic() - began_s:.1f} s"
        )
        return Saved(
            epoch=loaded.epoch,
            generation=loaded.generation,
            seq=loaded.seq,
            rows=loaded.rows,
            items=n_items,
            files={**loaded.files, **own},
        )

    def _file(
        self,
        source: Path,
        directory_fd: int,
        name: str,
        loaded: Manifest,
        target: Path,
        base: Path | None,
    ) -> bool:
        """Take one file; tell whether it is a link."""
        state = loaded.files[name]
        full_bytes = loaded.rows_per_segment * layout.feature_bytes(loaded.spec)
        # One that still grows must not be a link: what comes behind is cut at the service's start.
        if state.crc32 is None and state.length == full_bytes:
            if not self._config.copy and link(name, directory_fd, target / name):
                size = (target / name).stat().st_size
                if size != state.length:
                    raise DataLossError(f"{source / name} has {size} bytes, not {state.length}")
                return True
            if base is not None and _has(base / name, full_bytes):
                with _descriptor(base) as base_fd:
                    if link(name, base_fd, target / name):
                        return True
        crc32 = copy(name, directory_fd, source / name, state.length, target / name, self._pace)
        if state.crc32 is not None and crc32 != state.crc32:
            raise DataLossError(f"{source / name} does not match its checksum")
        return False

    def _base_of(self, name: str, loaded: Manifest, rows: Path) -> Path | None:
        """Return where the earlier backup has the first of the same rows; None if it has not."""
        saved = None if self._base is None else self._base.collections.get(name)
        if self._config.base is None or saved is None or saved.epoch != loaded.epoch:
            return None
        state = saved.files.get(rows.name)
        if state is None or state.length > loaded.files[rows.name].length:
            return None
        descriptor = open_source(rows.name, None, rows)
        try:
            crc32 = 0
            for block in blocks(descriptor, state.length, rows, self._pace):
                crc32 = zlib.crc32(block, crc32)
        finally:
            os.close(descriptor)
        return self._config.base / name if crc32 == state.crc32 else None


@contextlib.contextmanager
def _descriptor(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[int, Manifest, bytes]]:
    """Open a collection's directory; yield its descriptor, its manifest and the manifest's bytes.

    By the descriptor, files of a collection that was dropped are never mixed with those of the next
    one of its name.
    """
    try:
        directory_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise _ReplacedError from None
    try:
        path = source / manifest.MANIFEST
        try:
            descriptor = open_source(path.name, directory_fd, path)
        except FileNotFoundError:
            if source.exists() and os.path.samestat(source.stat(), os.fstat(directory_fd)):
                raise DataLossError(f"{path} is missing") from None
            raise _ReplacedError from None
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            raw = file.read(_MANIFEST_BYTES)
        yield directory_fd, manifest.parse(raw, path), raw
    finally:
        os.close(directory_fd)


def _is_current(source: Path, directory_fd: int, loaded: Manifest) -> bool:
    """Tell whether a collection's files are still those that a manifest describes."""
    try:
        # Other files may come under the same names, in another directory.
        if not os.path.samestat(source.stat(), os.fstat(directory_fd)):
            return False
        return manifest.read(source).generation == loaded.generation
    except (FileNotFoundError, DataLossError):
        return False


def _has(path: Path, length: int) -> bool:
    return path.is_file() and path.stat().st_size == length


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
