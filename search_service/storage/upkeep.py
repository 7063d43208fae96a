"""What keeps a collection's files safe, whole and small: checkpoints, checks, new files, loans."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from hashlens.errors import (
    HashlensError,
    LimitError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from search_service.storage.compaction import Compacted, Pace, compact
from search_service.storage.failpoints import reach
from search_service.storage.leases import Lease, Leases
from search_service.storage.live import Live
from search_service.storage.rebuild import Rebuilt
from search_service.storage.remake import compared, remade
from search_service.storage.replicas import Identity, LogLimits, Replicas
from search_service.storage.verify import Verified

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_TRIM_S = 2.0


class Upkeep:
    """Works on a collection's files while they are searched and written. Thread-safe.

    Parameters
    ----------
    live
        Its files and its Redis.
    replica
        This one, for which the log is kept.
    limits
        How long it is kept for others.
    """

    def __init__(self, live: Live, replica: Identity, limits: LogLimits) -> None:
        self._live = live
        self._replica = replica
        self._limits = limits
        self._checkpointed_at = time.monotonic()
        self._checkpointing = threading.Lock()
        self._is_held = False
        """Whether the log is kept for a rebuild, so that no checkpoint may trim it."""
        self._running: list[threading.Event] = []
        """What stops the checks and rebuilds that are running."""
        self._stopping = threading.Event()
        self._rebuilding = threading.Lock()

    def hello(self, deadline_s: float) -> None:
        """Tell the other replicas that this one is alive; raises as `catalog.ReplicaList`."""
        self._live.catalog.replicas.hello(
            self._live.meta, self._replica, self._live.local.erased_seq, deadline_s
        )

    def look(self, deadline_s: float) -> Replicas:
        """Return all replicas and where the log begins; raises as `catalog.ReplicaList`."""
        return self._live.catalog.replicas.look(
            self._live.meta, deadline_s, silence_s=self._limits.silence_s
        )

    def lend(self, leases: Leases, min_version: int) -> Lease:
        """Lend the files to a replica that copies them, with a checkpoint first if need be.

        Raises
        ------
        UnavailableError
            The files are not that new, or this replica needs others itself.
        OverloadedError
            There are too many leases.
        LimitError
            The disk is full or broken.
        """
        name = self._live.local.spec.name
        if self._live.follower.is_lost:
            raise UnavailableError(f"This replica of {name} has no place in the log.")
        try:
            if self._live.local.checkpoint_seq < min_version:
                self.checkpoint()
            if self._live.local.checkpoint_seq < min_version:
                raise UnavailableError(
                    f"This replica of {name} has only version {self._live.local.seq}."
                )
            return leases.grant(self._live.local)
        except OSError as error:
            raise LimitError(f"The files cannot be lent ({error}).") from error

    def checkpoint(self) -> int:
        """Make everything applied so far safe in the local files; return the version that is.

        What Redis keeps of the log for this replica is trimmed, if Redis is there.

        Raises
        ------
        OSError
            The disk is full or broken; the checkpoint before still holds.
        DataLossError
            The disk has lost writes; see `LocalCollection.checkpoint`.
        """
        with self._checkpointing:
            if self._live.follower.is_lost or self._is_held:
                return self._live.local.checkpoint_seq
            return self._checkpoint()

    def checkpoint_is_due(self, *, interval_s: float, rows: int, n_bytes: int) -> bool:
        """Tell whether enough has been applied, or long enough ago."""
        if self._live.local.seq == self._live.local.checkpoint_seq:
            return False
        pending_rows, pending_bytes = self._live.local.pending
        late = time.monotonic() - self._checkpointed_at >= interval_s
        return late or pending_rows >= rows or pending_bytes >= n_bytes

    def verify(self, stop: threading.Event) -> Verified:
        """Compare the local files with Redis and with their checksums; raises as `verify.verify`.

        Set `stop` to end it early; `close` does.
        """
        with self._stoppable(stop):
            return compared(self._live.local, self._live.follower, self._live.meta, stop)

    def rebuild(self, stop: threading.Event) -> Rebuilt:
        """Make the local files anew from Redis, with all features that are whole.

        Searching goes on in the old files until the new ones have all that those have. Set `stop`
        to end it early, and everything is as before; `close` does.

        Raises
        ------
        OverloadedError
            It is being done.
        HashlensError, OSError
            See `remake.remade`.
        """
        if not self._rebuilding.acquire(blocking=False):
            raise OverloadedError(
                f"{self._live.local.spec.name} is being rebuilt", retry_after_s=_RETRY_S
            )
        before = self._live.follower
        try:
            with self._checkpointing:
                self._is_held = True
            with self._stoppable(stop):
                old = self._live.local
                made, self._live.local = remade(
                    old, before, self._live.catalog, self._replica.id, stop
                )
                self._live.local.on_damage = old.on_damage
            return made
        finally:
            if before.is_stopping and not self._stopping.is_set():
                self._live.follower = before.on(self._live.local)
                self._live.follower.start()
            self._is_held = False
            self._rebuilding.release()

    def compact(self, bytes_per_s: float = 0) -> Compacted:
        """Write the local files anew without the rows of replaced and deleted items.

        Searching and writing go on. Another call meanwhile waits and goes over the files again.
        Redis is told, if it is there, and the log is trimmed.

        Parameters
        ----------
        bytes_per_s
            Most bytes that are copied per second; 0 for no limit.

        Raises
        ------
        CancelledError
            The collection was closed or dropped.
        PreconditionError
            The local files are not all there is; they are kept as they are.
        OSError, DataLossError
            See `compaction.compact`.
        """
        with self._rebuilding:
            if self._live.follower.is_lost:
                raise PreconditionError(self._live.explained(self._live.trouble))
            done = compact(self._live.local, Pace(bytes_per_s, self._stopping))
        self.checkpoint()
        if self._live.follower.trouble is None:
            # The next hello tells it, too; this one does so at once.
            with contextlib.suppress(HashlensError):
                self.hello(_TRIM_S)
        return done

    def stop_compacting(self) -> None:
        """End a compaction that is under way, and all later ones at once."""
        self._stopping.set()

    def stop(self) -> None:
        """Ask all that is under way to end, and all that would begin; `end` waits for it."""
        self.stop_compacting()
        for stop in list(self._running):
            stop.set()

    def end(self) -> None:
        """Wait until no files are being made, then end the follower for good."""
        with self._rebuilding:
            self._live.follower.stop()
            self._live.follower.join()

    def _checkpoint(self) -> int:
        self._checkpointed_at = time.monotonic()
        try:
            seq = self._live.local.checkpoint()
        except (OSError, HashlensError) as error:
            self._live.checkpoint_trouble = f"No checkpoint: {error}"
            raise
        self._live.checkpoint_trouble = ""
        if self._live.follower.trouble is not None:
            return seq
        reach("checkpoint.trim")
        try:
            self._live.catalog.trim(
                self._live.meta,
                self._replica.id,
                seq,
                max(int(self._limits.budget_bytes / self._live.follower.mean_bytes), 1),
                deadline_s=_TRIM_S,
                silence_s=self._limits.silence_s,
                forget_s=self._limits.forget_s,
            )
        except HashlensError as error:
            logger.info("the log of %s is not trimmed: %s", self._live.local.spec.name, error)
        return seq

    @contextlib.contextmanager
    def _stoppable(self, stop: threading.Event) -> Iterator[None]:
        """Let `stop` be set when the collection is closed."""
        self._running.append(stop)
        try:
            if self._stopping.is_set():
                stop.set()
            yield
        finally:
            self._running.remove(stop)
