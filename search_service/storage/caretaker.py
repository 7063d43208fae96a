"""Two threads that look after files which nobody asks for: are they there, are they what they were.

A search checks what it reads, but not all is read, and disks rot in silence. And a mapped file that
somebody cuts would kill the process at the first touch of what is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np

from hashlens.cpus import NICENESS_OF_CARE, lower_priority
from hashlens.errors import CancelledError
from search_service.storage import layout
from search_service.storage.collection import Collection
from search_service.storage.counters import Counters
from search_service.storage.differences import Differences
from search_service.storage.file_checks import check_files
from search_service.storage.local import LocalCollection

logger = logging.getLogger(__name__)

_WATCH_S: Final = 0.5
_BYTES_AT_ONCE: Final = 1 << 20
_POLL_S: Final = 1.0


class Caretaker:
    """Watches the files of all collections, and reads them all now and then.

    Parameters
    ----------
    counters
        Told how many rows were read.
    collections
        Returns those of the store.
    put_aside
        Called with a collection whose files cannot be trusted any more, and why.
    bytes_per_s
        How fast to read, at most; 0: do not, only watch.
    interval_s
        How long after one reading has ended the next begins.
    """

    def __init__(
        self,
        counters: Counters,
        collections: Callable[[], list[Collection]],
        put_aside: Callable[[Collection, str], None],
        *,
        bytes_per_s: float,
        interval_s: float,
    ) -> None:
        self._counters = counters
        self._collections = collections
        self._put_aside = put_aside
        self._bytes_per_s = bytes_per_s
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watch", daemon=True)]
        if bytes_per_s > 0:
            self._threads.append(threading.Thread(target=self._scrub, name="scrub", daemon=True))

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End."""
        self._closing.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _watch(self) -> None:
        """Thread: find files that were cut, replaced or deleted before a search does."""
        while not self._closing.wait(_WATCH_S):
            for collection in self._collections():
                trouble = collection.local.file_trouble()
                if trouble:
                    self._put_aside(collection, trouble)

    def _scrub(self) -> None:
        """Thread: read everything, slowly, again and again."""
        lower_priority(NICENESS_OF_CARE)
        due: dict[LocalCollection, float] = {}
        while not self._closing.wait(_POLL_S):
            here = {collection.local: collection for collection in self._collections()}
            due = {local: due.get(local, 0.0) for local in here}
            for local, collection in here.items():
                if time.monotonic() < due[local]:
                    continue
                with contextlib.suppress(CancelledError, OSError):
                    trouble = self._read(local)
                    if trouble:
                        self._put_aside(collection, trouble)
                due[local] = time.monotonic() + self._interval_s

    def _read(self, local: LocalCollection) -> str:
        """Compare all files of a collection with their checksums; return what is past repair.

        A damaged feature costs that feature only, and `FeatureChecks` knows it then.
        """
        differences = Differences()
        check_files(local.directory, differences, self._closing)
        if differences.lines:
            # It may just have been replaced, dropped or compacted.
            return "; ".join(differences.lines) if local.is_in_place() else ""
        if local.spec.dim:
            self._read_features(local)
        return ""

    def _read_features(self, local: LocalCollection) -> None:
        frozen, checks = local.frozen_with_checks()
        width = layout.feature_bytes(local.spec)
        step = max(_BYTES_AT_ONCE // width, 1)
        crc32s = frozen.records["feature_crc32"]
        for first in range(0, len(frozen.records), frozen.rows_per_segment):
            segment = first // frozen.rows_per_segment
            name = layout.features_file(frozen.generation, segment, local.spec.feature_dtype)
            last = min(first + frozen.rows_per_segment, len(frozen.records))
            descriptor = os.open(local.directory / name, os.O_RDONLY)
            try:
                for lo in range(first, last, step):
                    rows = np.arange(lo, min(lo + step, last), dtype=np.int64)
                    data = memoryview(os.pread(descriptor, len(rows) * width, (lo - first) * width))
                    found = [
                        zlib.crc32(data[i * width : (i + 1) * width]) for i in range(len(rows))
                    ]
                    is_good = np.array(found, dtype=np.uint32) == crc32s[rows]
                    # What a disk does not give is as bad as what it gives wrong.
                    is_good[len(data) // width :] = False
                    checks.note(rows, is_good)
                    self._counters.n_rows_scrubbed += len(rows)
                    if self._closing.wait(len(data) / self._bytes_per_s):
                        raise CancelledError("The store is closing.")
            finally:
                os.close(descriptor)
