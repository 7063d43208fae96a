"""Compaction: the files written anew without the rows that are dead, while all else goes on.

The rows that are alive are copied, in their order, into files of the next generation beside the
old ones. What is applied meanwhile is copied afterwards, in rounds that get shorter; a row that
died after it was copied gets a tombstone. The last round and the switch of the manifest happen
under the collection's lock, so a crash at any moment leaves either generation whole. Readers keep
the mappings that they have.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import CancelledError
from search_service.snapshot import Texts
from search_service.storage import layout, manifest
from search_service.storage.append_file import Mappings
from search_service.storage.arrays import Arrays, Prefix
from search_service.storage.failpoints import reach
from search_service.storage.generation_reader import TEXT_ENDS, Block, GenerationReader
from search_service.storage.id_index import StoredIds
from search_service.storage.local import LocalCollection
from search_service.storage.rows import RowTable

logger = logging.getLogger(__name__)

_SYNC_BYTES: Final = 64 << 20
"""So much is copied before it is synced: a disk that has gigabytes to write at once is busy with
nothing else."""

_LITTLE_ROWS: Final = 2048
_MAX_ROUNDS: Final = 8
"""Rounds of catching up before writing has to wait for the rest."""


@dataclass(frozen=True, slots=True)
class OldFile:
    """A file that held rows that were dead."""

    path: Path
    length_bytes: int
    identity: tuple[int, int]
    """Inode and time of the last change: the number alone may have been given to another file."""
    mappings: Mappings
    """Of this process."""

    @property
    def is_gone(self) -> bool:
        """Whether its bytes are: no name leads to it, and nobody reads it any more.

        Names below other directories of the collections count: others may be copying it.
        """
        if len(self.mappings) or self.path.exists():
            return False
        others = self.path.parent.parent.glob(f"*/{self.path.name}")
        return not any(_identity(other) == self.identity for other in others)


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did."""

    erased_seq: int
    """Rows that were dead at this write are in none of the files that count."""
    n_rows_erased: int
    n_damaged: int
    """Rows whose feature did not match its checksum; they have none now."""
    files: tuple[OldFile, ...]
    """Files that held the rows."""


class Pace:
    """Holds copying to a rate, and ends it early.

    Parameters
    ----------
    bytes_per_s
        Most bytes per second, on average; 0 for no limit.
    stop
        Set it to end whatever waits.
    """

    def __init__(self, bytes_per_s: float, stop: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self._stop = stop
        self._due_s = time.monotonic()

    def check(self) -> None:
        """Raise CancelledError if it is to end."""
        if self._stop.is_set():
            raise CancelledError("The compaction was stopped.")

    def spend(self, n_bytes: int) -> None:
        """Wait for as long as so many bytes take; CancelledError if it is to end."""
        if self._bytes_per_s > 0:
            self._due_s = max(self._due_s, time.monotonic()) + n_bytes / self._bytes_per_s
            self._stop.wait(self._due_s - time.monotonic())
        self.check()


def compact(local: LocalCollection, pace: Pace) -> Compacted:
    """Write a collection's files anew without the rows that are dead now.

    One at a time for each collection.

    Parameters
    ----------
    local
        The files.
    pace
        How fast to copy; what is applied meanwhile is copied as fast as it goes.

    Returns
    -------
    Compacted

    Raises
    ------
    CancelledError
        It was stopped, or the collection was closed. The old files go on.
    OSError
        The disk is full or broken. The old files go on.
    DataLossError
        The files do not match their checksums, or the disk has lost writes.
    """
    local.check_disk()
    generation = local.generation
    _remove_others(local.directory, generation)
    if local.note_erased():
        local.checkpoint()
        return Compacted(local.erased_seq, 0, 0, ())
    # The old table must not be indexed with the new files.
    local.index_ids()
    try:
        reach("compact.begin")
        with contextlib.closing(_Copy(local, pace)) as copy:
            return copy.run()
    except BaseException:
        if local.generation == generation:
            with contextlib.suppress(OSError):  # The next one, or the next start, does it.
                _remove_others(local.directory, generation)
        raise


class _Copy:
    """The files of the next generation, as they come to be."""

    def __init__(self, local: LocalCollection, pace: Pace) -> None:
        self._local = local
        self._pace = pace
        self._n_damaged = 0
        self._unsynced_bytes = 0
        self._table: RowTable | None = None
        rows_per_segment = local.snapshot.rows_per_segment
        self._source = GenerationReader(
            local.directory, local.spec, local.generation, rows_per_segment
        )
        self._arrays = Arrays.create(
            local.directory,
            local.spec,
            generation=local.generation + 1,
            rows_per_segment=rows_per_segment,
        )

    def close(self) -> None:
        """Give the descriptors back, but for those of files that are in use now."""
        self._source.close()
        if self._local.generation == self._source.generation:
            self._arrays.close()

    def run(self) -> Compacted:
        """Copy, catch up, switch, remove the old files."""
        local, arrays, source = self._local, self._arrays, self._source
        first = local.prefix()
        missing = self._copy(first, self._pace.spend)
        source.deaths(first)
        source.check(first)
        self._table = RowTable(arrays.rows)
        self._table.index(self._stored_ids())
        self._index_tags(arrays.rows)
        self._table.lose(missing)
        self._sync()
        for _ in range(_MAX_ROUNDS):
            now = local.prefix()
            if now.rows - source.row + now.deaths - source.n_deaths < _LITTLE_ROWS:
                break
            self._catch_up(now)
            self._sync()
        held = _names_with_dead_rows(local, first)
        old = local.switch(arrays, self._table, first.seq, self._catch_up)
        files = [
            OldFile(file.path, file.length, _identity(file.path), file.mappings)
            for file in old.files(held)
        ]
        # With it go the mappings that nobody uses.
        del old
        try:
            _remove_others(local.directory, local.generation)
            local.erased_seq = first.seq
        except OSError as error:
            # Its text only: whoever keeps the error keeps its frames, and with them old mappings.
            logger.error("old files of %s cannot be removed: %s", local.spec.name, str(error))
        n_erased = 0 if first.dead is None else int(np.count_nonzero(first.dead))
        if self._n_damaged:
            logger.error(
                "%s: %d features do not match their checksums and are missing now",
                local.spec.name,
                self._n_damaged,
            )
        logger.info("compacted %s: %d rows less, %d left", local.spec.name, n_erased, arrays.rows)
        return Compacted(
            local.erased_seq,
            n_erased,
            self._n_damaged,
            tuple(files),
        )

    def _copy(self, now: Prefix, spend: Callable[[int], None]) -> NDArray[np.int64]:
        """Copy the rows up to `now` that are alive then; return those without a feature."""
        missing = [np.zeros(0, dtype=np.int64)]
        for block in self._source.blocks(now):
            reach("compact.copy")
            spend(block.nbytes)
            flagged = np.flatnonzero(block.records["flags"] & layout.NO_FEATURE)
            missing.append(flagged + self._arrays.rows)
            self._n_damaged += block.n_damaged
            self._append(block)
            self._unsynced_bytes += block.nbytes
            if self._unsynced_bytes > _SYNC_BYTES:
                self._sync()
        return np.concatenate(missing)

    def _catch_up(self, now: Prefix) -> None:
        """Copy what was applied since the last round."""
        assert self._table is not None
        known_rows = self._source.row
        self._table.lose(self._copy(now, lambda _: self._pace.check()))
        died = self._source.deaths(now)
        self._source.check(now)
        died = died[died["row"] < known_rows]
        # Both generations have their rows in the order of the writes.
        seqs = now.records["seq"][died["row"].astype(np.int64)]
        rows = np.searchsorted(self._arrays.records()["seq"], seqs).astype(np.int64)
        deaths = np.zeros(len(died), dtype=layout.DEATH)
        deaths["row"], deaths["seq"] = rows, died["seq"]
        self._arrays.append(
            packed=np.zeros((0, codes.n_bytes(self._local.spec.n_bits)), dtype=np.uint8),
            records=np.zeros(0, dtype=layout.ROW),
            ids=b"",
            payloads=b"",
            tags=b"",
            features=b"",
            deaths=deaths,
        )
        self._table.kill(rows)

    def _append(self, block: Block) -> None:
        ids = block.ids() if self._table is not None else []
        records = block.records
        for name, end in zip(TEXT_ENDS, self._arrays.ends(), strict=True):
            records[name] += np.uint64(end)
        id_bytes, payloads, tags = block.texts
        self._arrays.append(
            packed=block.packed,
            records=records,
            ids=id_bytes,
            payloads=payloads,
            tags=tags,
            features=block.features,
            deaths=np.zeros(0, dtype=layout.DEATH),
        )
        if self._table is not None:
            self._table.extend(ids, self._stored_ids())

    def _index_tags(self, rows: int) -> None:
        assert self._table is not None
        tags = Texts(self._arrays.tag_bytes(), self._arrays.records()["tags_end"])
        while not self._table.tags.extend(tags, rows):
            self._pace.check()

    def _stored_ids(self) -> StoredIds:
        return StoredIds(self._arrays.id_bytes(), self._arrays.records())

    def _sync(self) -> None:
        """Make what was copied durable."""
        unsynced = self._arrays.state()[1]
        for file in unsynced:
            reach("compact.sync")
            file.sync()
        self._arrays.retire(unsynced)
        self._unsynced_bytes = 0


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _names_with_dead_rows(local: LocalCollection, first: Prefix) -> set[str]:
    """Return the files that hold bytes of rows that were dead."""
    if first.dead is None:
        return set()
    segments = np.unique(np.flatnonzero(first.dead) // local.snapshot.rows_per_segment)
    clean = {n for n, state in first.files.items() if state.crc32 is None}
    return set(first.files) - clean | {
        layout.features_file(local.generation, segment, local.spec.feature_dtype)
        for segment in segments.tolist()
    }


def _remove_others(directory: Path, generation: int) -> None:
    """Remove the files of all generations but one."""
    for path in list(directory.iterdir()):
        if layout.generation_of(path.name) not in (None, generation):
            reach("compact.unlink")
            path.unlink(missing_ok=True)
    manifest.sync_directory(directory)
