"""The thread that compacts a store's collections: when asked, and when it is worth it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from hashlens.cpus import NICENESS_OF_CARE, lower_priority
from hashlens.errors import CancelledError, HashlensError
from search_service.storage.collection import Collection
from search_service.storage.compaction import Compacted
from search_service.storage.erasure import Eraser

logger = logging.getLogger(__name__)

_RETRY_S: Final = 60.0
"""When a compaction that failed by itself is tried again."""


@dataclass(frozen=True, slots=True)
class Policy:
    """When to compact, and how fast."""

    share: float
    """Compact when this share of the rows is dead; 0: only when asked."""
    min_rows: int
    """And at least so many."""
    bytes_per_s: float
    """Most bytes that are copied per second; 0: no limit."""
    poll_s: float
    """How often to look whether there is something to do."""

    def is_due(self, collection: Collection) -> bool:
        """Tell whether a collection has enough dead rows."""
        snapshot = collection.snapshot()
        n_dead = snapshot.rows - snapshot.n_alive
        return 0 < self.share * snapshot.rows <= n_dead >= self.min_rows


@dataclass(slots=True)
class _Ask:
    collection: Collection
    seq: int
    future: Future[Compacted]


class Compactor:
    """Compacts one collection at a time, at a low priority.

    Parameters
    ----------
    eraser
        Knows what other processes ask for.
    collections
        Returns those that there are.
    policy
        When, and how fast.
    """

    def __init__(
        self, eraser: Eraser, collections: Callable[[], Sequence[Collection]], policy: Policy
    ) -> None:
        self._eraser = eraser
        self._collections = collections
        self._policy = policy
        self._changed = threading.Condition()
        self._asks: list[_Ask] = []
        self._running: Collection | None = None
        self._closing = False
        self._retry_at_s: dict[str, float] = {}
        self._last: dict[str, Compacted] = {}
        self._thread = threading.Thread(target=self._run, name="compact", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def ask(self, collection: Collection, seq: int) -> Future[Compacted]:
        """Have what was dead at a version erased from the local files.

        Returns
        -------
        Future
            Its result tells of the compaction that found something to erase last; it raises what
            `Collection.compact` raises.
        """
        ask = _Ask(collection, seq, Future())
        with self._changed:
            if self._closing:
                raise CancelledError("The store is closing.")
            self._asks.append(ask)
            self._changed.notify_all()
        return ask.future

    def close(self) -> None:
        """End what is under way, and wait for it."""
        with self._changed:
            self._closing = True
            if self._running is not None:
                self._running.stop_compacting()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        for ask in self._asks:
            ask.future.set_exception(CancelledError("The store is closing."))

    def _run(self) -> None:
        lower_priority(NICENESS_OF_CARE)
        while True:
            with self._changed:
                if not self._asks:
                    self._changed.wait(self._policy.poll_s)
                if self._closing:
                    return
                asks = list(self._asks)
            if asks:
                self._answer(asks[0])
            else:
                for collection in self._due():
                    self._try(collection)

    def _answer(self, ask: _Ask) -> None:
        """Compact for one who asked, unless that was done for another meanwhile."""
        collection = ask.collection
        try:
            if collection.erased_seq < ask.seq:
                self._compact(collection)
            nothing = Compacted(collection.erased_seq, 0, 0, ())
            ask.future.set_result(self._last.get(collection.epoch, nothing))
        except Exception as error:
            if not isinstance(error, HashlensError | OSError):
                logger.exception("the compaction of %s failed", collection.spec.name)
            # Its frames would live as long as the future, and with them mappings of old files.
            ask.future.set_exception(error.with_traceback(None))
        with self._changed:
            self._asks.remove(ask)

    def _due(self) -> list[Collection]:
        """Return what is to be compacted."""
        collections = [one for one in self._collections() if not one.is_lost]
        asked: dict[str, tuple[str, int]] = {}
        with contextlib.suppress(HashlensError):
            names = [collection.spec.name for collection in collections]
            asked = self._eraser.asked(names, self._policy.poll_s)
        due = []
        for collection in collections:
            epoch, seq = asked.get(collection.spec.name, ("", 0))
            wanted = seq if epoch == collection.epoch else 0
            is_asked = collection.erased_seq < wanted <= collection.snapshot().version
            if is_asked or self._policy.is_due(collection):
                due.append(collection)
        now_s = time.monotonic()
        return [one for one in due if self._retry_at_s.get(one.epoch, -math.inf) <= now_s]

    def _try(self, collection: Collection) -> None:
        """Compact what nobody waits for."""
        try:
            self._compact(collection)
        except CancelledError:
            pass
        except Exception as error:
            self._retry_at_s[collection.epoch] = time.monotonic() + _RETRY_S
            expected = isinstance(error, HashlensError | OSError)
            logger.error(
                "no compaction of %s: %s",
                collection.spec.name,
                error,
                exc_info=None if expected else error,
            )

    def _compact(self, collection: Collection) -> None:
        with self._changed:
            if self._closing:
                raise CancelledError("The store is closing.")
            self._running = collection
        try:
            done = collection.compact(self._policy.bytes_per_s)
            if done.n_rows_erased:
                self._last[collection.epoch] = done
        finally:
            with self._changed:
                self._running = None
