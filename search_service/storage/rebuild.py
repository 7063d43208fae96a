"""A collection's files made anew from Redis, with features from older files where they are whole.

What Redis holds besides the log is read bucket by bucket while writes go on, so it is of no single
version. Therefore the log is kept from a version S0 on, before the first bucket is read; whatever
was written after S0 is left out of what is read; and the log from S0 to the version after the last
bucket is applied on top. What comes of it is what a replica that followed the log has.

Memory: about 50 bytes for each item and its id and code, until the rows are written; extras wait in
a file without a name.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from hashlens.errors import CancelledError, PreconditionError, UnavailableError
from search_service.storage import layout, manifest
from search_service.storage.arrays import Arrays
from search_service.storage.buckets import BucketReader
from search_service.storage.catalog_items import CatalogItems
from search_service.storage.connection import translate
from search_service.storage.failpoints import reach
from search_service.storage.keys import Meta, foreign
from search_service.storage.local import LocalCollection
from search_service.storage.log import LogReader
from search_service.storage.manifest import Manifest
from search_service.storage.old_features import OldFeatures

_BYTES_AT_ONCE: Final = 8 << 20
_LOG_AT_ONCE: Final = 1024
_BLOCK_S: Final = 0.05
_ATTEMPTS: Final = 8


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Files that are whole and durable, and not yet where they belong: see `install`."""

    directory: Path
    seq: int
    """The last write that they hold."""
    rows: int
    n_missing_features: int
    """Alive rows whose feature is missing."""


def rebuild(
    parent: Path,
    meta: Meta,
    *,
    url: str,
    replica_id: str,
    timeout_s: float,
    segment_bytes: int,
    old: Path | None = None,
    generation: int = 0,
    stop: threading.Event | None = None,
    settle: Callable[[], int] | None = None,
) -> Rebuilt:
    """Make a directory of a collection's files from what Redis holds.

    Rows are in the order of their writes. Features come from the log, as far as that reaches back,
    and from `old`; where there is none, zeros are written and `layout.NO_FEATURE` is set. If an
    error is raised, the directory is gone.

    Parameters
    ----------
    parent
        Where to make it, under a name that `local.clean` knows for unfinished work.
    meta
        Of the collection; its sequence number may be old.
    url
        Where Redis is.
    replica_id
        Under which the log is kept from here on. Nobody may trim it further under this id before
        the files are in use.
    timeout_s
        The longest wait for one reply of Redis, in seconds.
    segment_bytes
        About how long a file of features gets, in bytes.
    old
        A directory of the collection's files, damaged or not, to take features from.
    generation
        Of the new files; see `install`.
    stop
        Set it to end this early.
    settle
        Called when almost all is done; returns a version that the new files must have, so that
        whoever searches the old ones does not go back in time.

    Raises
    ------
    PreconditionError, NotFoundError
        Redis has another collection of the name, or none.
    UnavailableError
        Redis is away, or the log was trimmed in spite of all; try again.
    DataLossError
        What Redis holds is not what a collection holds.
    CancelledError
        `stop` was set.
    OSError
        The disk is full or broken.
    """
    stop = stop or threading.Event()
    draft = parent / f".new-{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        with contextlib.ExitStack() as resources:
            name = meta.spec.name
            log = LogReader(url, name, timeout_s=timeout_s, block_s=_BLOCK_S)
            resources.callback(log.close)
            start = _begin(log, meta, replica_id)
            buckets = BucketReader(url, meta, timeout_s=timeout_s)
            resources.callback(buckets.close)
            items = CatalogItems(meta, resources.enter_context(tempfile.TemporaryFile(dir=draft)))
            for batch in buckets.batches(stop):
                reach("rebuild.scan")
                items.add(batch)
            rows_per_segment = layout.rows_per_segment(meta.spec, segment_bytes)
            arrays = Arrays.create(
                draft, meta.spec, generation=generation, rows_per_segment=rows_per_segment
            )
            resources.callback(arrays.close)
            features = None
            if old is not None and meta.spec.dim:
                features = resources.enter_context(contextlib.closing(OldFeatures(old, meta)))
            items.write(arrays, start.seq, features, stop)
            del items
            loaded = Manifest(
                spec=meta.spec,
                epoch=meta.epoch,
                n_buckets=meta.n_buckets,
                generation=generation,
                rows_per_segment=rows_per_segment,
                seq=start.seq,
                log_crc32=start.log_crc32,
                rows=arrays.rows,
                deaths=0,
                # Nothing that was replaced or deleted before has been read.
                erased_seq=start.seq,
                files={},
            )
            local = LocalCollection.over(draft, loaded, arrays)
            _replay(log, meta, local, stop)
            local.checkpoint()
            if settle is not None:
                _replay(log, meta, local, stop, settle())
                local.checkpoint()
            return Rebuilt(draft, local.seq, arrays.rows, local.n_missing_features)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, redis.RedisError):
            raise translate(error) from error
        raise


def install(made: Rebuilt, directory: Path) -> None:
    """Put rebuilt files where they belong; durable when it returns.

    Where there are files of the collection already, the new ones go beside them, for which they
    need a later generation, and the manifest is switched: a crash leaves the old or the new. Files
    that are not listed any more are for `LocalCollection.load` to delete.

    Raises
    ------
    OSError
        The disk is broken. The old files still count, or the new ones do.
    """
    reach("rebuild.rename")
    if not directory.exists():
        made.directory.rename(directory)
        manifest.sync_directory(directory.parent)
        return
    for path in made.directory.iterdir():
        if path.name != manifest.MANIFEST:
            if (directory / path.name).exists():
                raise FileExistsError(f"{directory} has a {path.name} already")
            path.rename(directory / path.name)
    manifest.sync_directory(directory)
    reach("rebuild.rename")
    (made.directory / manifest.MANIFEST).rename(directory / manifest.MANIFEST)
    manifest.sync_directory(directory)
    made.directory.rmdir()


@dataclass(frozen=True, slots=True)
class _Start:
    seq: int
    """The log is kept from here on."""
    log_crc32: int
    """Of the log record of that write; 0 if it is not there."""


def _begin(log: LogReader, meta: Meta, replica_id: str) -> _Start:
    """Have the log kept, and return from where.

    Codes are in the buckets, and reading them there is faster; features are in the log only.
    """
    seq = meta.seq
    for _ in range(_ATTEMPTS):
        position = log.register(meta.epoch, replica_id, checkpoint_seq=seq, seq=seq)
        if position.seq < seq:
            raise UnavailableError(f"Redis went back to version {position.seq}. Try again.")
        first = position.first
        is_kept = position.seq == seq or (first is not None and first <= seq + 1)
        if first is None or not meta.spec.dim:
            wanted = seq if is_kept else position.seq
        else:
            wanted = first - 1
        if is_kept and wanted == seq:
            return _Start(seq, 0 if position.here is None else zlib.crc32(position.here))
        seq = wanted
    raise UnavailableError("The log is trimmed faster than it can be read. Try again.")


def _replay(
    log: LogReader,
    meta: Meta,
    local: LocalCollection,
    stop: threading.Event,
    until: int | None = None,
) -> None:
    """Apply what was written since the start, up to a version, or up to now."""
    feature_bytes = layout.feature_bytes(meta.spec)
    mean_bytes = float(layout.record_bytes(meta.spec))
    while until is None or local.seq < until:
        if stop.is_set():
            raise CancelledError("The rebuild was stopped.")
        count = min(max(int(_BYTES_AT_ONCE / mean_bytes), 1), _LOG_AT_ONCE)
        batch = log.read(local.seq, count)
        if batch.epoch != meta.epoch:
            raise PreconditionError(foreign(meta.spec.name, batch.epoch))
        until = batch.seq if until is None else until
        if local.seq >= until:
            return
        seqs = [seq for seq, _ in batch.entries]
        if not seqs or seqs != list(range(local.seq + 1, local.seq + 1 + len(seqs))):
            raise UnavailableError(
                f"The log of {meta.spec.name} does not go on behind version {local.seq}. Try again."
            )
        records = [
            layout.unpack_record(seq, raw, meta.spec.n_bits, feature_bytes)
            for seq, raw in batch.entries
        ]
        local.apply(records)
        mean_bytes = sum(len(record.raw) for record in records) / len(records)
