"""Who makes sketches and keeps them: one thread, in the background, within a budget of memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from search_service.sketch import Sketch
from search_service.snapshot import Snapshot

logger = logging.getLogger(__name__)

_IDLE_S = 600.0
"""How long a table is not searched before its sketch may go, if another table needs the room."""


@dataclass(slots=True)
class _Entry:
    sketch: Sketch
    asked_s: float
    wanted: Snapshot | None = None
    """Has rows that the sketch lacks. Held until they are in, or there is no room."""
    is_full: bool = False


class Sketches:
    """Sketches of the tables that are searched. Safe to use from several threads.

    The first search of a table has its sketch begun, later ones have it extended by the rows that
    came meanwhile. Nothing is compiled or entered here that runs in parallel.

    Parameters
    ----------
    max_bytes
        Most memory for all sketches together. A table that does not fit is kept in part.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the last one asked for last
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the sketches take, in bytes."""
        with self._changed:
            return sum(entry.sketch.nbytes for entry in self._entries.values())

    def of(self, snapshot: Snapshot) -> Sketch | None:
        """Return what there is of a snapshot's table, and have it made or extended if need be.

        Takes microseconds, and never waits for a sketch to be made.
        """
        if not snapshot.table_id or snapshot.dim == 0 or self._closed.is_set():
            return None
        now_s = time.monotonic()
        with self._changed:
            entry = self._entries.setdefault(
                snapshot.table_id, _Entry(Sketch(snapshot.dim), asked_s=now_s)
            )
            entry.asked_s = now_s
            self._entries.move_to_end(snapshot.table_id)
            if entry.sketch.rows < snapshot.rows and not entry.is_full:
                entry.wanted = snapshot
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._serve, name="sketches", daemon=True
                    )
                    self._thread.start()
                self._changed.notify()
            return entry.sketch if entry.sketch.rows else None

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread and forget the sketches; those in use stay valid."""
        with self._changed:
            self._closed.set()
            self._entries.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            try:
                took_s = self._extend(*work)
            except Exception:  # searches do without, and other tables still want theirs
                logger.exception("sketches: %s is not extended any further", work[0])
                work[1].wanted, work[1].is_full = None, True
                continue
            # Searches come first: half of one CPU's time is enough here.
            self._closed.wait(took_s)

    def _next(self) -> tuple[str, _Entry, Snapshot] | None:
        with self._changed:
            while not self._closed.is_set():
                for table_id, entry in self._entries.items():
                    if entry.wanted is not None:
                        return table_id, entry, entry.wanted
                self._changed.wait()
        return None

    def _extend(self, table_id: str, entry: _Entry, snapshot: Snapshot) -> float:
        """Add some rows; return how long it took, in seconds."""
        began_s = time.monotonic()
        before = entry.sketch
        sketch = before.extended(snapshot, self._max_bytes - self.nbytes + before.nbytes)
        is_full = sketch is before and before.rows < snapshot.rows and not self._made_room(entry)
        with self._changed:
            entry.sketch = sketch
            entry.is_full = is_full
            if is_full or sketch.rows >= snapshot.rows:
                if entry.wanted is snapshot:
                    entry.wanted = None
                logger.info(
                    "sketches: %s has %d of %d rows, %.0f MB",
                    table_id,
                    sketch.rows,
                    snapshot.rows,
                    sketch.nbytes / 1e6,
                )
        return time.monotonic() - began_s

    def _made_room(self, entry: _Entry) -> bool:
        """Forget the sketch that was asked for least lately, if that is long ago."""
        with self._changed:
            for table_id, other in self._entries.items():
                if other is not entry and time.monotonic() - other.asked_s > _IDLE_S:
                    del self._entries[table_id]
                    return True
        return False
