"""One collection's files and the snapshots made of them; knows nothing of Redis.

The thread that follows the log calls `apply`; whoever searches takes `snapshot` without a lock;
whoever makes a checkpoint does not stop the other two.
"""

from __future__ import annotations

import threading
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import CancelledError, DataLossError, UnavailableError
from hashlens.types import CollectionSpec
from search_service.snapshot import Snapshot
from search_service.storage import data_dir, layout, manifest
from search_service.storage.arrays import Arrays, Prefix
from search_service.storage.contents import Contents
from search_service.storage.failpoints import reach
from search_service.storage.feature_check import FeatureChecks, log_damage
from search_service.storage.frozen import Frozen
from search_service.storage.layout import LogRecord
from search_service.storage.making import make
from search_service.storage.manifest import FileState, Manifest
from search_service.storage.published import Published
from search_service.storage.rows import RowTable, load_table
from search_service.storage.saved import Saved


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
        self.erased_seq = loaded.erased_seq
        """Rows that were dead at this write are in none of the files."""
        self.directory = directory
        """Where the files are."""
        self._saved = Saved(directory, loaded)
        self._contents = Contents(loaded.spec, arrays, table)
        self._rows_since_checkpoint = 0
        self._bytes_since_checkpoint = 0
        self.on_damage: Callable[[int], None] = lambda n: None
        """Called with how many features were found damaged."""
        self._checks = FeatureChecks(arrays.rows if self.spec.dim else 0, self._note_damage)
        self._closed = False
        # Files that take the place of others may have other rows under the same generation.
        self._load_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._checkpoint_lock = threading.Lock()
        self._published = Published(self.spec.name, self._build())

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
        make(directory, spec, epoch=epoch, n_buckets=n_buckets, segment_bytes=segment_bytes)
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
            return cls(directory, loaded, arrays, load_table(directory, arrays))
        except BaseException:
            arrays.close()
            raise

    @classmethod
    def over(cls, directory: Path, loaded: Manifest, arrays: Arrays) -> Self:
        """Take rows that are in the files already, none of them safe before a `checkpoint`.

        Raises
        ------
        DataLossError
            An id is not text.
        """
        local = cls(directory, loaded, arrays, load_table(directory, arrays))
        local._saved.seq = -1
        return local

    @property
    def checkpoint_seq(self) -> int:
        """The last write that is safe in the files."""
        return self._saved.seq

    @property
    def generation(self) -> int:
        """Part of the names of the files that count now."""
        return self._saved.generation

    @property
    def snapshot(self) -> Snapshot:
        """The newest version; cheap, takes no lock."""
        return self._published.newest

    def index_ids(self) -> None:
        """Make ready to find rows by their ids, unless that is done; searching needs it not.

        Takes a fraction of a second for a million rows. Who needs it before waits for it.
        """
        contents = self._contents
        contents.table.index(contents.stored_ids())

    @property
    def n_dead_rows(self) -> int:
        """Rows of replaced and deleted items."""
        return self._contents.table.n_dead

    @property
    def n_missing_features(self) -> int:
        """Alive rows whose feature is missing."""
        damaged = self._checks.damaged_rows()
        table = self._contents.table
        return table.n_missing + sum(not table.is_dead(row) for row in damaged)

    @property
    def checks(self) -> FeatureChecks:
        """What is known of the features in the files that count now."""
        return self._checks

    def file_trouble(self) -> str:
        """Return which file is gone, replaced or cut under this process, or nothing.

        Who touches a mapped page behind the end of a file is killed by the system.
        """
        with self._lock:
            return "" if self._closed else self._contents.arrays.trouble()

    @property
    def pending(self) -> tuple[int, int]:
        """Rows and bytes applied since the last checkpoint began."""
        return self._rows_since_checkpoint, self._bytes_since_checkpoint

    @property
    def segment_bytes(self) -> int:
        """How long a full file of features is; for codes only, how many rows it would have."""
        return self._contents.arrays.rows_per_segment * max(layout.feature_bytes(self.spec), 1)

    def frozen(self) -> Frozen:
        """Return everything in the files at this moment, for who compares it."""
        with self._lock:
            return self._contents.frozen(self.seq, self.generation)

    def frozen_with_checks(self) -> tuple[Frozen, FeatureChecks]:
        """Return `frozen`, and what is known of its features."""
        while True:
            checks = self._checks
            frozen = self.frozen()
            if checks is self._checks:
                return frozen, checks

    def is_in_place(self) -> bool:
        """Tell whether its directory is still its own."""
        if self._closed:
            return False
        try:
            return manifest.read(self.directory).epoch == self.epoch
        except DataLossError:
            return not self._closed and self.directory.exists()

    def wait_for(self, version: int, deadline_s: float) -> Snapshot:
        """Return the newest snapshot as soon as it has a version.

        Raises
        ------
        DeadlineError
            It does not come within `deadline_s`.
        """
        return self._published.wait_for(version, deadline_s)

    def apply(self, records: Sequence[LogRecord]) -> None:
        """Apply the writes that follow `seq`, and publish what comes of them.

        Raises
        ------
        OSError
            The disk is full or broken. Nothing was applied; trying again is safe.
        """
        with self._lock:
            self._contents.apply(records)
            self.seq = records[-1].seq
            self.log_crc32 = zlib.crc32(records[-1].raw)
            self._rows_since_checkpoint += len(records)
            self._bytes_since_checkpoint += sum(len(record.raw) for record in records)
            reach("append.publish")
            self._publish()

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
            self.check_disk()
            with self._lock:
                seq, erased_seq = self.seq, self.erased_seq
                saved = (self._saved.seq, self._saved.erased_seq)
                if (seq, erased_seq) == saved or self._closed:
                    return self._saved.seq
                files, unsynced, new_names = self._contents.arrays.state()
                state = self._manifest(self._contents.arrays, self.generation, erased_seq, files)
                self._rows_since_checkpoint = self._bytes_since_checkpoint = 0
            self._saved.checkpoint(state, unsynced, has_new_names=new_names)
            with self._lock:
                self._contents.arrays.retire(unsynced)
            return seq

    def check_disk(self) -> None:
        """Raise DataLossError if the disk has lost what was written, see `checkpoint`.

        Writing stops then, too: what comes would only be safe in Redis, whose log would grow.
        """
        trouble = self.disk_trouble()
        if trouble is not None:
            raise trouble

    def disk_trouble(self) -> DataLossError | None:
        """Return what `check_disk` would raise."""
        return self._saved.trouble()

    def prefix(self) -> Prefix:
        """Return what of the files counts now; it stays true while they grow."""
        with self._lock:
            return self._contents.prefix(self.seq)

    def note_erased(self) -> bool:
        """If no row is dead, let this version count as erased, and tell so.

        The next checkpoint makes that last.
        """
        with self._lock:
            if self._contents.table.n_dead:
                return False
            self.erased_seq = self.seq
            return True

    def switch(
        self,
        arrays: Arrays,
        table: RowTable,
        erased_seq: int,
        finish: Callable[[Prefix], None],
    ) -> Arrays:
        """Go over to files of the next generation; return the old ones, closed.

        Nothing is applied meanwhile. Whatever goes wrong before the manifest is switched, the old
        files go on. `erased_seq` stays: nothing is erased before the old files are gone.

        Parameters
        ----------
        arrays, table
            The new files and the table of their rows; all but what `finish` adds should be durable.
        erased_seq
            Rows that were dead at this write are in none of the new files.
        finish
            Called with what there is now; adds to `arrays` and `table` what is missing.

        Raises
        ------
        CancelledError
            The collection was closed meanwhile.
        OSError
            The disk is full or broken.
        DataLossError
            The disk has failed to keep what was written. If that is the manifest, `generation` is
            the new one already, and the files of both have to stay: which of the two comes back
            after a crash is not known.
        """
        with self._checkpoint_lock, self._lock:
            self.check_disk()
            if self._closed:
                raise CancelledError(f"{self.spec.name} was closed.")
            finish(self._contents.prefix(self.seq))
            files, unsynced, _ = arrays.state()
            self._saved.switch(
                self._manifest(arrays, self.generation + 1, erased_seq, files), unsynced
            )
            old, self._contents = self._contents.arrays, Contents(self.spec, arrays, table)
            # Who copied them has checked them.
            self._checks = FeatureChecks(0, self._note_damage)
            self._rows_since_checkpoint = self._bytes_since_checkpoint = 0
            self._publish()
            old.close()
            arrays.retire(unsynced)
            reach("compact.switched")
            self.check_disk()
            return old

    def lend(self, directory: Path) -> Manifest:
        """Give the files of the last checkpoint second names in a new directory.

        They stay readable under those whatever becomes of the collection. What is appended to them
        meanwhile lies beyond what the manifest counts.

        Raises
        ------
        UnavailableError
            The collection is closed.
        DataLossError
            The manifest is damaged.
        OSError
            The disk is full or broken. Nothing is left behind.
        """
        with self._checkpoint_lock:
            if self._closed:
                raise UnavailableError(f"{self.spec.name} is closed.")
            return self._saved.link_to(directory)

    def close(self) -> None:
        """Give the descriptors back; snapshots that are in use stay valid."""
        with self._checkpoint_lock, self._lock:
            self._closed = True
            self._contents.arrays.close()

    def remove(self) -> None:
        """Close, and delete the files; snapshots that are in use stay valid."""
        self.close()
        data_dir.discard(self.directory)

    def _note_damage(self, rows: NDArray[np.int64]) -> None:
        """Say once which features are damaged; searches find out by themselves."""
        log_damage(rows, self.spec.name, self.directory, self.generation)
        self.on_damage(len(rows))

    def _manifest(
        self, arrays: Arrays, generation: int, erased_seq: int, files: dict[str, FileState]
    ) -> Manifest:
        return Manifest(
            spec=self.spec,
            epoch=self.epoch,
            n_buckets=self.n_buckets,
            generation=generation,
            rows_per_segment=arrays.rows_per_segment,
            seq=self.seq,
            log_crc32=self.log_crc32,
            rows=arrays.rows,
            deaths=arrays.deaths,
            erased_seq=erased_seq,
            files=files,
        )

    def _publish(self) -> None:
        snapshot = self._build()
        snapshot.ids.index_tags()  # A little at a time: what has just come, as a rule.
        self._published.publish(snapshot)

    def _build(self) -> Snapshot:
        table_id = f"{self.epoch}/{self.generation}/{self._load_id}"
        return self._contents.snapshot(self.seq, table_id, self._checks)
