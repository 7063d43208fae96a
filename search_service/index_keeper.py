"""Keeps multi-index hashing up with tables that grow: in the background, within a memory budget."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, field

from hashlens.cpus import NICENESS_OF_CARE, lower_priority
from search_service.multi_index import MIN_ROWS, MultiIndex, index_bytes
from search_service.snapshot import Snapshot

logger = logging.getLogger(__name__)

_IDLE_S = 60.0
"""An index that nobody asked for in so long makes room for another, and one that could not be built
is tried again after as long."""


@dataclass(slots=True, eq=False)
class _Table:
    index: MultiIndex = field(default_factory=MultiIndex)
    asked_s: float = 0.0
    refused_s: float = -math.inf
    """When it could not be built the last time."""


class IndexKeeper:
    """Indexes of any number of tables. Thread-safe.

    Building takes one core at a low priority, and none of the kernels that need Numba's threads.

    Parameters
    ----------
    memory_bytes
        Most that all indexes together may take; 0 for no indexes.
    min_rows
        Tables with fewer rows are not indexed, and so many more have to come before a piece is
        added.
    """

    def __init__(self, memory_bytes: int, *, min_rows: int = MIN_ROWS) -> None:
        self._memory_bytes = memory_bytes
        self._min_rows = min_rows
        self._tables: dict[str, _Table] = {}
        self._pending: dict[str, Snapshot] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the indexes take, in bytes."""
        with self._changed:
            return sum(table.index.nbytes for table in self._tables.values())

    def index_for(self, snapshot: Snapshot) -> MultiIndex | None:
        """Return the index of a snapshot's first rows, if there is one; never waits.

        Asking is what makes one come to be.
        """
        if not snapshot.table_id or snapshot.rows < self._min_rows or self._memory_bytes <= 0:
            return None
        with self._changed:
            table = self._tables.setdefault(snapshot.table_id, _Table())
            table.asked_s = time.monotonic()
            is_due = snapshot.rows - table.index.rows >= self._min_rows
            if is_due and table.asked_s - table.refused_s >= _IDLE_S:
                self._pending[snapshot.table_id] = snapshot
                self._start()
                self._changed.notify()
            index = table.index
        # An older version may have fewer rows than are indexed by now.
        return index if 0 < index.rows <= snapshot.rows else None

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is left to build; tell whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop building and forget all indexes."""
        with self._changed:
            self._is_closed = True
            self._pending.clear()
            self._tables.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _start(self) -> None:
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._run, name="index", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        lower_priority(NICENESS_OF_CARE)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if self._is_closed:
                    return
                table_id, snapshot = next(iter(self._pending.items()))
                # It may have made room for another since it was asked for.
                table = self._tables.setdefault(table_id, _Table())
                fits = self._make_room(table_id, snapshot)
            index = self._built(table.index, snapshot) if fits else None
            with self._changed:
                if index is None:
                    table.refused_s = time.monotonic()
                else:
                    table.index = index
                # A newer version may have come meanwhile; it is asked for again.
                self._pending.pop(table_id, None)
                self._changed.notify_all()

    def _built(self, index: MultiIndex, snapshot: Snapshot) -> MultiIndex | None:
        began_s = time.monotonic()
        try:
            extended = index.extended(snapshot, lambda: self._is_closed)
        except InterruptedError:
            return None
        except Exception:  # Without an index everything is scanned; the thread has to live.
            logger.exception("%d rows could not be indexed", snapshot.rows)
            return None
        logger.info(
            "indexed %d rows in %.1f s, %d MB",
            extended.rows,
            time.monotonic() - began_s,
            extended.nbytes >> 20,
        )
        return extended

    def _make_room(self, table_id: str, snapshot: Snapshot) -> bool:
        """Forget idle indexes until there is memory for another; tell whether there is."""
        needed = index_bytes(snapshot.n_bits, snapshot.rows)
        others = sorted(
            (table.asked_s, name) for name, table in self._tables.items() if name != table_id
        )
        taken = sum(self._tables[name].index.nbytes for _, name in others)
        for asked_s, name in others:
            if taken + needed <= self._memory_bytes or time.monotonic() - asked_s < _IDLE_S:
                break
            taken -= self._tables.pop(name).index.nbytes
        if taken + needed <= self._memory_bytes:
            return True
        logger.info(
            "%d rows are not indexed: it would take %d MB of the %d MB allowed",
            snapshot.rows,
            needed >> 20,
            self._memory_bytes >> 20,
        )
        return False
