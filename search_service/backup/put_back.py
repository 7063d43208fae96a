"""Putting a backup back, into a data directory and a Redis that do not have the collections."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from hashlens.config import setting
from hashlens.errors import (
    AlreadyExistsError,
    DataLossError,
    HashlensError,
    InvalidInputError,
    LimitError,
    NotFoundError,
    UnavailableError,
)
from search_service.backup import archive, catalog_file
from search_service.backup.archive import Saved
from search_service.backup.files import Pace, copy
from search_service.redis_config import RedisConfig
from search_service.storage import data_dir, layout, manifest
from search_service.storage.catalog import Catalog
from search_service.storage.embedded import EmbeddedRedis
from search_service.storage.failpoints import reach
from search_service.storage.manifest import Manifest
from search_service.storage.refill import FILL_BYTES, FILL_ITEMS, Refill, first_record

_REPLY_S: Final = 5.0
_CALL_S: Final = 30.0
_DROP_S: Final = 60.0
_READY_S: Final = 120.0
"""The longest to wait for a Redis that reads its data."""
_POLL_S: Final = 0.2
_REPORT_ITEMS: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RestoreConfig(RedisConfig):
    """Options of `hashlens restore`."""

    data_dir: Path = setting(
        Path("hashlens-data"), "Data directory to restore into; no service may be using it."
    )
    mb_per_s: float = setting(0.0, "Read at most so much, in MB per second; 0: no limit.")

    def __post_init__(self) -> None:
        if not self.mb_per_s >= 0:
            raise InvalidInputError("mb_per_s is 0 or more", field="mb_per_s")


class _Job(NamedTuple):
    """One collection to put back."""

    source: Path
    saved: Saved
    loaded: Manifest
    """As it was saved."""
    name: str
    """As it will be called."""


def put_back(
    backup: Path,
    config: RestoreConfig,
    names: Sequence[str],
    new_name: str | None,
    report: Callable[[str], None],
) -> None:
    """Restore collections; each appears whole or not at all, at the version that was saved.

    Parameters
    ----------
    backup
        What `take` made.
    config
        Where to.
    names
        Collections; empty for all.
    new_name
        What the one collection will be called; None: as it was.
    report
        Called with a line for each collection.

    Raises
    ------
    NotFoundError
        This is no backup, or it has no such collection.
    DataLossError
        The backup is damaged; the message names the file. Nothing was changed.
    AlreadyExistsError
        The data directory or Redis has a collection of the name. Nothing was changed.
    PreconditionError
        A service uses the data directory, or the backup is of another format version.
    UnavailableError
        Redis is away. Running it again begins anew.
    LimitError
        The disk or Redis is full or broken.
    """
    held = archive.read(backup)
    wanted = list(dict.fromkeys(names)) or sorted(held.collections)
    for name in wanted:
        if name not in held.collections:
            raise NotFoundError(f"The backup {backup} has no collection {name}.")
    if new_name is not None and (len(wanted) != 1 or not layout.is_safe_name(new_name)):
        raise InvalidInputError(
            "Give a name to one collection: 1 to 64 of a-z, 0-9, _ and -, the first a letter or "
            "digit.",
            field="as",
        )
    if (config.data_dir / "LOCK").exists():  # refused before, not after, hours of reading
        os.close(data_dir.lock(config.data_dir))
    pace = Pace(config.mb_per_s * 1e6, report)
    jobs = []
    for name in wanted:
        saved = held.collections[name]
        loaded = archive.check(backup, name, saved, pace)
        jobs.append(_Job(backup / name, saved, loaded, new_name or name))
        report(f"{name}: every checksum is right")
    try:
        config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _held(config) as url:
            _Restorer(config.data_dir / "collections", url, pace, report).restore(jobs)
    except OSError as error:
        raise LimitError(f"The files cannot be written or read ({error}).") from error


@contextlib.contextmanager
def _held(config: RestoreConfig) -> Iterator[str]:
    """Hold the data directory; yield where Redis is."""
    with contextlib.ExitStack() as resources:
        resources.callback(os.close, data_dir.lock(config.data_dir))
        url = config.store_url()
        if url is not None:
            yield url
        else:
            yield resources.enter_context(EmbeddedRedis(config.data_dir / "redis")).url


class _Restorer:
    """Restores into one directory and one Redis."""

    def __init__(
        self, directory: Path, url: str, pace: Pace, report: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._url = url
        self._pace = pace
        self._report = report
        self._catalog = Catalog(url, _REPLY_S)

    def restore(self, jobs: Sequence[_Job]) -> None:
        """Restore collections, or none if a name is taken."""
        try:
            self._wait_for_redis()
            complete = [self._is_almost_done(job) for job in jobs]
            self._directory.mkdir(exist_ok=True)
            for draft in self._directory.glob(".new-*"):
                shutil.rmtree(draft)
            for job, done in zip(jobs, complete, strict=True):
                if done:
                    self._complete(job)
                else:
                    self._whole(job)
        finally:
            self._catalog.close()

    def _wait_for_redis(self) -> None:
        give_up = time.monotonic() + _READY_S
        while True:
            try:
                self._catalog.durability(_REPLY_S)
                return
            except UnavailableError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(_POLL_S)

    def _is_almost_done(self, job: _Job) -> bool:
        """Tell whether an earlier restore of the same lacks its last step only.

        Raises
        ------
        AlreadyExistsError
            The name is taken.
        """
        meta = self._catalog.meta(job.name, _CALL_S)
        directory = self._directory / job.name
        if meta is not None and meta.is_active:
            raise AlreadyExistsError(
                f"Redis has a collection {job.name}. Drop it, or restore under another name."
            )
        if not directory.exists():
            return False
        here = manifest.read(directory)
        is_ours = meta is not None and meta.is_restoring and meta.epoch == here.epoch
        if is_ours and (here.seq, here.rows) == (job.saved.seq, job.saved.rows):
            return True
        raise AlreadyExistsError(
            f"{directory} exists. Restore under another name, or into another data directory."
        )

    def _complete(self, job: _Job) -> None:
        """Take the last step of a restore that was interrupted there."""
        epoch = manifest.read(self._directory / job.name).epoch
        with contextlib.closing(self._refill(job, epoch)) as refill:
            refill.finish(job.saved.seq, job.saved.items)
        self._report(f"{job.name}: completed at version {job.saved.seq}")

    def _whole(self, job: _Job) -> None:
        """Restore one collection."""
        began_s = time.monotonic()
        # What an interrupted restore or drop left; a name without more is not worth mentioning.
        self._catalog.drop(job.name, _DROP_S)
        epoch = str(uuid.uuid4())
        draft = self._directory / f".new-{uuid.uuid4().hex}"
        target = self._directory / job.name
        try:
            self._copy(job, epoch, draft)
            reach("restore.files")
            with contextlib.closing(self._refill(job, epoch)) as refill:
                self._fill(job, refill)
                reach("restore.rename")
                draft.rename(target)
                manifest.sync_directory(self._directory)
                reach("restore.activate")
                refill.finish(job.saved.seq, job.saved.items)
        except BaseException:
            self._undo(job.name, epoch, draft)
            raise
        self._report(
            f"{job.name}: version {job.saved.seq}, {job.saved.items:,} items in "
            f"{job.saved.rows:,} rows, {time.monotonic() - began_s:.1f} s"
        )

    def _copy(self, job: _Job, epoch: str, draft: Path) -> None:
        """Copy the files, compare them again, and give them a manifest of the new epoch."""
        draft.mkdir(mode=0o700)
        for name, state in job.loaded.files.items():
            crc32 = copy(name, None, job.source / name, state.length, draft / name, self._pace)
            if state.crc32 is not None and crc32 != state.crc32:
                raise DataLossError(f"{job.source / name} does not match its checksum")
        log_crc32 = zlib.crc32(first_record(epoch, job.loaded.seq))
        spec = dataclasses.replace(job.loaded.spec, name=job.name)
        own = dataclasses.replace(job.loaded, spec=spec, epoch=epoch, log_crc32=log_crc32)
        manifest.write(draft, own)

    def _fill(self, job: _Job, refill: Refill) -> None:
        """Put all items into Redis."""
        refill.begin()
        batch: list[tuple[bytes, bytes]] = []
        n_bytes = n_filled = 0
        for entry in catalog_file.read(job.source / catalog_file.CATALOG, job.loaded):
            if batch and (len(batch) == FILL_ITEMS or n_bytes + len(entry.raw) > FILL_BYTES):
                refill.fill(batch)
                reach("restore.redis")
                n_filled += len(batch)
                if n_filled % _REPORT_ITEMS < len(batch):
                    self._report(f"{job.name}: {n_filled:,} of {job.saved.items:,} items in Redis")
                batch, n_bytes = [], 0
            batch.append((entry.id, entry.raw))
            n_bytes += len(entry.raw)
        if batch:
            refill.fill(batch)
        reach("restore.redis")

    def _undo(self, name: str, epoch: str, draft: Path) -> None:
        """Remove what a restore that failed has left; nothing if it was nearly done."""
        if not draft.exists():
            return
        with contextlib.suppress(HashlensError, OSError):
            shutil.rmtree(draft)
            meta = self._catalog.meta(name, _REPLY_S)
            if meta is not None and meta.is_restoring and meta.epoch == epoch:
                self._catalog.drop(name, _DROP_S)

    def _refill(self, job: _Job, epoch: str) -> Refill:
        spec = dataclasses.replace(job.loaded.spec, name=job.name)
        return Refill(
            self._url,
            spec,
            epoch=epoch,
            n_buckets=job.loaded.n_buckets,
            attempt_timeout_s=_REPLY_S,
            deadline_s=_CALL_S,
        )
