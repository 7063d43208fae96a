"""One collection's files and the snapshots made of them; knows nothing of Redis.

The thread that follows the log calls `apply`; whoever searches takes `snapshot` without a lock;
whoever makes a checkpoint does not stop the other two.
"""

from __future__ import annotations

import codecs
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import DataLossError, DeadlineError
from hashlens.types import CollectionSpec
from search_service.snapshot import Snapshot
from search_service.storage import layout, manifest
from search_service.storage.arrays import Arrays
from search_service.storage.failpoints import reach
from search_service.storage.id_index import StoredIds
from search_service.storage.layout import LogRecord
from search_service.storage.manifest import Manifest
from search_service.storage.rows import RowsAt, RowTable

_CHECK_BYTES: Final = 1 << 20


class LocalCollection:
    """What this replica has of a collection. Use `create` or `load`."""

    def __init__(self, directory: Path, loaded: Manifest, arrays: Arrays, table: RowTable) -> None:
        self.spec = loaded.spec
        self.epoch = loaded.epoch
        self.n_buckets = loaded.n_buckets
        self.seq = loaded.seq
        """The last write applied."""
        self.log_crc32 = loaded.log_crc32
        """Of that write's log record; 0 where there is none."""
        self.checkpoint_seq = loaded.seq
        """The last write that is safe in the files."""
        self.erased_seq = loaded.erased_seq
        """Rows that were dead at this write are in none of the files."""
        self._directory = directory
        self._generation = loaded.generation
        self._arrays = arrays
        self._table = table
        self._rows_since_checkpoint = 0
        self._bytes_since_checkpoint = 0
        self._failed_sync = ""
        self._closed = False
        self._lock = threading.Lock()
        self._checkpoint_lock = threading.Lock()
        self._published = threading.Condition()
        self._snapshot = self._build()

    @classmethod
    def create(
        cls,
        directory: Path,
        spec: CollectionSpec,
        *,
        epoch: str,
        n_buckets: int,
        segment_bytes: int,
    ) -> Self:
        """Make an empty collection; its directory appears whole or not at all.

        Raises
        ------
        OSError
            The directory is there already, or the disk is full or broken.
        """
        draft = directory.with_name(f".new-{uuid.uuid4().hex}")
        draft.mkdir()
        try:
            rows_per_segment = layout.rows_per_segment(spec, segment_bytes)
            arrays = Arrays.create(draft, spec, generation=0, rows_per_segment=rows_per_segment)
            arrays.close()
            empty = Manifest(
                spec=spec,
                epoch=epoch,
                n_buckets=n_buckets,
                generation=0,
                rows_per_segment=rows_per_segment,
                seq=0,
                log_crc32=0,
                rows=0,
                deaths=0,
                erased_seq=0,
                files=arrays.state()[0],
            )
            reach("create.manifest")
            manifest.write(draft, empty)
            reach("create.rename")
            draft.rename(directory)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        manifest.sync_directory(directory.parent)
        return cls.load(directory)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open a collection's files, cut to the last checkpoint.

        Raises
        ------
        DataLossError
            They are damaged. Nothing was changed.
        OSError
            They cannot be opened.
        """
        loaded = manifest.read(directory)
        if loaded.spec.name != directory.name:
            raise DataLossError(f"{directory} holds the collection {loaded.spec.name}")
        for path in directory.iterdir():
            if path.name not in loaded.files and path.name != manifest.MANIFEST:
                path.unlink()
        arrays = Arrays.load(directory, loaded)
        try:
            return cls(directory, loaded, arrays, _load_table(directory, arrays))
        except BaseException:
            arrays.close()
            raise

    @property
    def snapshot(self) -> Snapshot:
        """The newest version; cheap, takes no lock."""
        return self._snapshot

    def index_ids(self) -> None:
        """Make ready to find rows by their ids, unless that is done; searching needs it not.

        Takes a fraction of a second for a million rows. Who needs it before waits for it.
        """
        self._table.index(self._stored_ids())

    @property
    def n_dead_rows(self) -> int:
        """Rows of replaced and deleted items."""
        return self._table.n_dead

    @property
    def n_missing_features(self) -> int:
        """Alive rows whose feature is missing."""
        return self._table.n_missing

    @property
    def pending(self) -> tuple[int, int]:
        """Rows and bytes applied since the last checkpoint began."""
        return self._rows_since_checkpoint, self._bytes_since_checkpoint

    def wait_for(self, version: int, deadline_s: float) -> Snapshot:
        """Return the newest snapshot as soon as it has a version.

        Raises
        ------
        DeadlineError
            It does not come within `deadline_s`.
        """
        snapshot = self._snapshot
        if snapshot.version >= version:
            return snapshot
        with self._published:
            if not self._published.wait_for(
                lambda: self._snapshot.version >= version, timeout=max(deadline_s, 0)
            ):
                raise DeadlineError(
                    f"Version {version} of {self.spec.name} has not come within {deadline_s:g} s; "
                    f"this replica has {self._snapshot.version}."
                )
            return self._snapshot

    def apply(self, records: Sequence[LogRecord]) -> None:
        """Apply the writes that follow `seq`, and publish what comes of them.

        Raises
        ------
        OSError
            The disk is full or broken. Nothing was applied; trying again is safe.
        """
        puts, deaths = self._sort_out(records)
        with self._lock:
            id_end, payload_end, tags_end = self._arrays.ends()
            ids = [record.id.encode() for record in puts]
            rows = np.zeros(len(puts), dtype=layout.ROW)
            rows["seq"] = [record.seq for record in puts]
            rows["id_end"] = id_end + _running_total([len(item_id) for item_id in ids])
            rows["payload_end"] = payload_end + _running_total([len(r.payload) for r in puts])
            rows["tags_end"] = tags_end + _running_total([len(r.tags) for r in puts])
            rows["expires_ms"] = [record.expires_ms for record in puts]
            rows["feature_crc32"] = [zlib.crc32(record.feature) for record in puts]
            packed = np.frombuffer(b"".join([record.code for record in puts]), dtype=np.uint8)
            self._arrays.append(
                packed=packed.reshape(len(puts), codes.n_bytes(self.spec.n_bits)),
                records=rows,
                ids=b"".join(ids),
                payloads=b"".join([record.payload for record in puts]),
                tags=b"".join([record.tags for record in puts]),
                features=b"".join([record.feature for record in puts]),
                deaths=np.array(deaths, dtype=layout.DEATH),
            )
            self._table.extend([record.id for record in puts], self._stored_ids())
            self._table.kill(np.array([row for row, _ in deaths], dtype=np.int64))
            self.seq = records[-1].seq
            self.log_crc32 = zlib.crc32(records[-1].raw)
            self._rows_since_checkpoint += len(records)
            self._bytes_since_checkpoint += sum(len(record.raw) for record in records)
        reach("append.publish")
        snapshot = self._build()
        snapshot.ids.index_tags()
        with self._published:
            self._snapshot = snapshot
            self._published.notify_all()

    def checkpoint(self) -> int:
        """Make everything applied so far safe; return the version that is.

        Raises
        ------
        OSError
            The disk is full or broken. The checkpoint before still holds.
        DataLossError
            The disk failed to keep earlier bytes, so what it holds beyond the last checkpoint
            cannot be known. Starting again rebuilds it from the log.
        """
        with self._checkpoint_lock:
            if self._failed_sync:
                raise DataLossError(
                    f"The disk under {self._directory} lost writes ({self._failed_sync}). "
                    "Mend it, then restart the search service."
                )
            with self._lock:
                seq = self.seq
                if seq == self.checkpoint_seq or self._closed:
                    return self.checkpoint_seq
                files, unsynced, new_names = self._arrays.state()
                state = Manifest(
                    spec=self.spec,
                    epoch=self.epoch,
                    n_buckets=self.n_buckets,
                    generation=self._generation,
                    rows_per_segment=self._arrays.rows_per_segment,
                    seq=seq,
                    log_crc32=self.log_crc32,
                    rows=self._arrays.rows,
                    deaths=self._arrays.deaths,
                    erased_seq=self.erased_seq,
                    files=files,
                )
                self._rows_since_checkpoint = self._bytes_since_checkpoint = 0
            try:
                reach("checkpoint.begin")
                for file in unsynced:
                    file.sync()
                    reach("checkpoint.sync")
                if new_names:
                    manifest.sync_directory(self._directory)
            except OSError as error:
                # The kernel may have dropped the pages and would report success the next time.
                self._failed_sync = str(error)
                raise
            manifest.write(self._directory, state)
            self.checkpoint_seq = seq
            with self._lock:
                self._arrays.retire(unsynced)
            return seq

    def close(self) -> None:
        """Give the descriptors back; snapshots that are in use stay valid."""
        with self._checkpoint_lock, self._lock:
            self._closed = True
            self._arrays.close()

    def remove(self) -> None:
        """Close, and delete the files; snapshots that are in use stay valid."""
        self.close()
        discard(self._directory)

    def _sort_out(
        self, records: Sequence[LogRecord]
    ) -> tuple[list[LogRecord], list[tuple[int, int]]]:
        """Return the writes that make rows, and (row, seq) of the rows that die."""
        puts: list[LogRecord] = []
        deaths: list[tuple[int, int]] = []
        rows_now: dict[str, int | None] = {}
        base = self._arrays.rows
        rows_before = self._table.alive_rows([record.id for record in records], self._stored_ids())
        for record, row_before in zip(records, rows_before, strict=True):
            item_id = record.id
            row = rows_now.get(item_id, row_before)
            if row is not None:
                deaths.append((row, record.seq))
            if record.op == layout.PUT:
                rows_now[item_id] = base + len(puts)
                puts.append(record)
            else:
                rows_now[item_id] = None
        return puts, deaths

    def _stored_ids(self) -> StoredIds:
        return StoredIds(self._arrays.id_bytes(), self._arrays.records())

    def _build(self) -> Snapshot:
        """Make the snapshot of what is applied."""
        arrays, table = self._arrays, self._table
        dead = table.dead_flags()
        return Snapshot(
            n_bits=self.spec.n_bits,
            dim=self.spec.dim,
            feature_dtype=self.spec.feature_dtype,
            version=self.seq,
            rows=arrays.rows,
            n_alive=arrays.rows - table.n_dead,
            words=arrays.words(),
            ids=RowsAt(
                table,
                arrays.rows,
                dead,
                self._stored_ids(),
                arrays.payload_bytes(),
                arrays.tag_bytes(),
            ),
            features=arrays.features(),
            rows_per_segment=arrays.rows_per_segment,
            dead=dead,
            has_feature=table.has_feature_flags(),
            model_id=self.spec.model_id,
            table_id=f"{self.epoch}/{self._generation}",
        )


def discard(directory: Path) -> None:
    """Delete a directory so that a crash never leaves half of it under its name."""
    doomed = directory.with_name(f".trash-{uuid.uuid4().hex}")
    reach("drop.begin")
    directory.rename(doomed)
    reach("drop.files")
    shutil.rmtree(doomed)


def clean(parent: Path) -> None:
    """Delete what an interrupted `LocalCollection.create` or `discard` left behind."""
    for pattern in (".new-*", ".trash-*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


def quarantine(directory: Path, quarantine_directory: Path) -> Path:
    """Put damaged files aside for a person to look at; return where they are."""
    quarantine_directory.mkdir(exist_ok=True)
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = quarantine_directory / f"{directory.name}-{when}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    directory.rename(aside)
    manifest.sync_directory(directory.parent)
    return aside


def _load_table(directory: Path, arrays: Arrays) -> RowTable:
    """Check the ids in the files, and rebuild the tombstones in memory."""
    _check_ids(directory, arrays)
    table = RowTable(arrays.rows)
    dead = arrays.death_records()["row"].astype(np.int64)
    if dead.size and int(dead.max()) >= arrays.rows:
        raise DataLossError(f"a tombstone in {directory} has no row")
    table.kill(dead)
    table.lose(np.flatnonzero(arrays.records()["flags"] & layout.NO_FEATURE))
    return table


def _check_ids(directory: Path, arrays: Arrays) -> None:
    """Raise DataLossError unless each id is UTF-8: all are, and none begins inside a letter."""
    data = arrays.id_bytes()[: arrays.ends()[0]]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for first in range(0, len(data), _CHECK_BYTES):
            decoder.decode(data[first : first + _CHECK_BYTES].data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataLossError(f"the ids in {directory} are not text: {error}") from None
    starts = arrays.records()["id_end"][:-1]
    if ((data[starts] & 0xC0) == 0x80).any():
        raise DataLossError(f"the ids in {directory} are not text: one ends inside a letter")


def _running_total(lengths: list[int]) -> NDArray[np.uint64]:
    return np.cumsum(np.array(lengths, dtype=np.uint64), dtype=np.uint64)
