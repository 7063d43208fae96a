"""One collection, as the service uses it: writes go to Redis, reads to the local files."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from hashlens.errors import (
    DeadlineError,
    HashlensError,
    LimitError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from hashlens.packed_items import PackedItems
from hashlens.types import (
    CollectionInfo,
    CollectionSpec,
    DeleteResult,
    ReplicaInfo,
)
from search_service.snapshot import Snapshot
from search_service.storage import layout
from search_service.storage.catalog import Catalog, Raw
from search_service.storage.compaction import Compacted, Pace, compact
from search_service.storage.expiry import remove_expired
from search_service.storage.failpoints import reach
from search_service.storage.follower import Follower
from search_service.storage.keys import Meta
from search_service.storage.leases import Lease, Leases
from search_service.storage.local import LocalCollection
from search_service.storage.packing import id_bytes, packed_records, record_of
from search_service.storage.rebuild import Rebuilt
from search_service.storage.records import Record
from search_service.storage.remake import compared, remade
from search_service.storage.replicas import Identity, LogLimits, Replicas
from search_service.storage.tag_builder import TagBuilder
from search_service.storage.verify import Verified

logger = logging.getLogger(__name__)

_SETTLE_S = 1.0
_LOOK_S = 0.2
"""How often a write that waits for Redis has it looked for."""
_TRIM_S = 2.0
_MAX_LAG_BYTES = 64 << 20
"""About how much of the log may be acknowledged and not yet applied here."""


class Collection:
    """A collection of this replica. Thread-safe. `Store` makes it.

    Parameters
    ----------
    local
        Its files.
    catalog
        Where writes go.
    follower
        Applies what Redis has acknowledged; `start` starts it.
    replica
        This one, for which the log is kept.
    limits
        How long it is kept for others.
    durability
        Returns what Redis does before it acknowledges.
    """

    def __init__(
        self,
        local: LocalCollection,
        catalog: Catalog,
        follower: Follower,
        *,
        replica: Identity,
        limits: LogLimits,
        durability: Callable[[], str],
    ) -> None:
        self._local = local
        self._catalog = catalog
        self._follower = follower
        self._replica = replica
        self._limits = limits
        self._durability = durability
        self._checkpoint_trouble = ""
        self._written = 0
        """About the last write of this replica's own callers."""
        self._meta = Meta(local.spec, local.epoch, local.n_buckets, local.seq, False)
        self._checkpointed_at = time.monotonic()
        self._checkpointing = threading.Lock()
        self._is_held = False
        """Whether the log is kept for a rebuild, so that no checkpoint may trim it."""
        self._running: list[threading.Event] = []
        """What stops the checks and rebuilds that are running."""
        self._tags = TagBuilder(local)
        self._stopping = threading.Event()
        self._rebuilding = threading.Lock()
        self._note = ""
        self._successor: Collection | None = None

    @property
    def newest(self) -> Collection:
        """What took its place when its files were replaced; until then, itself."""
        found = self
        while found._successor is not None:
            found = found._successor
        return found

    @property
    def local(self) -> LocalCollection:
        """Its files."""
        return self._local

    @property
    def spec(self) -> CollectionSpec:
        """What it is bound to."""
        return self._local.spec

    @property
    def epoch(self) -> str:
        """UUID of this incarnation."""
        return self._local.epoch

    @property
    def is_foreign(self) -> bool:
        """Whether Redis has another collection of the name, or none."""
        return self._follower.is_foreign

    @property
    def is_lost(self) -> bool:
        """Whether the local files are not all there is, and the log cannot mend that."""
        return self._follower.is_lost

    @property
    def needs_files(self) -> bool:
        """Whether it is lost, and other files are being looked for."""
        return self._follower.needs_files

    def note(self, what: str) -> None:
        """Say in `info` what is done about its trouble."""
        self._note = what

    def succeeded_by(self, collection: Collection) -> None:
        """Let those who wait for a version wait for it there."""
        self._successor = collection

    def hello(self, deadline_s: float) -> None:
        """Tell the other replicas that this one is alive; raises as `catalog.ReplicaList`."""
        self._catalog.replicas.hello(self._meta, self._replica, self._local.erased_seq, deadline_s)

    def replicas(self, deadline_s: float) -> list[ReplicaInfo]:
        """Return all replicas, by id; raises as `catalog.ReplicaList`."""
        return self.look(deadline_s).infos

    def look(self, deadline_s: float) -> Replicas:
        """Return all replicas and where the log begins; raises as `catalog.ReplicaList`."""
        return self._catalog.replicas.look(self._meta, deadline_s, silence_s=self._limits.silence_s)

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
        if self.is_lost:
            raise UnavailableError(f"This replica of {self.spec.name} has no place in the log.")
        try:
            if self._local.checkpoint_seq < min_version:
                self.checkpoint()
            if self._local.checkpoint_seq < min_version:
                raise UnavailableError(
                    f"This replica of {self.spec.name} has only version {self._local.seq}."
                )
            return leases.grant(self._local)
        except OSError as error:
            raise LimitError(f"The files cannot be lent ({error}).") from error

    def snapshot(self) -> Snapshot:
        """Return the newest version; cheap, takes no lock, needs no Redis."""
        return self._local.snapshot

    def wait_for(self, version: int, deadline_s: float) -> Snapshot:
        """Return the newest snapshot as soon as it has a version.

        Raises
        ------
        DeadlineError
            It does not come within `deadline_s`.
        """
        return self._local.wait_for(version, deadline_s)

    def info(self) -> CollectionInfo:
        """Describe it as this replica sees it; needs no Redis."""
        snapshot = self._local.snapshot
        trouble = self._follower.trouble or self._follower.refusal or self._local.disk_trouble()
        away = isinstance(trouble, UnavailableError)
        return CollectionInfo(
            spec=self.spec,
            epoch=self.epoch,
            version=snapshot.version,
            n_items=snapshot.n_alive,
            n_dead_rows=snapshot.rows - snapshot.n_alive,
            checkpoint_version=self._local.checkpoint_seq,
            durability="unknown" if away else self._durability(),
            writable=trouble is None,
            detail=self._checkpoint_trouble if trouble is None else self._explained(trouble),
            replica_id=self._replica.id,
            n_missing_features=self._local.n_missing_features,
            erased_version=self._local.erased_seq,
        )

    def upsert(
        self,
        items: Sequence[Record] | PackedItems,
        *,
        request_id: str,
        deadline_s: float,
        content: bytes | None = None,
    ) -> int:
        """Write items, replacing those whose ids are there; return the version that has them.

        Acknowledged by Redis when it returns. Items are written in their order, in chunks of a few
        hundred; each chunk is written whole or not at all.

        Parameters
        ----------
        items
            Of two with one id, the later stays.
        request_id
            Names this write: repeated with the same items within ten minutes, it changes nothing
            and returns the same version. Empty: this call's own retries only.
        deadline_s
            The longest to wait, in seconds.
        content
            What the request id is tied to. None: the items. Pass what they were made from where
            making them again may differ in the last digits.

        Raises
        ------
        InvalidInputError
            An item does not fit the collection, or the request id was used for something else.
        PreconditionError
            Redis and this replica do not hold the same collection.
        UnavailableError
            Redis is away. Repeating the call with the same request id is safe.
        DeadlineError
            Only a part is written; repeating the call with the same request id writes the rest.
        LimitError
            Redis or the local disk is full.
        OverloadedError
            This replica has not applied what was written before. Nothing is written.
        """
        give_up = time.monotonic() + deadline_s
        if isinstance(items, PackedItems):
            records = packed_records(items, self.spec)
        else:
            records = [record_of(item, self.spec, f"items[{i}]") for i, item in enumerate(items)]
        if not records:
            return self.snapshot().version
        self._check_writable(give_up)
        self._keep_up(give_up)
        written = self._catalog.put(
            self._meta,
            records,
            request_id=request_id or uuid.uuid4().hex,
            deadline_s=give_up - time.monotonic(),
            known_seq=self._follower.known_seq,
            content=content,
        )
        self._follower.saw(written.seq)
        self._written = max(self._written, written.seq)
        return written.seq

    def delete(self, ids: Sequence[str], *, request_id: str, deadline_s: float) -> DeleteResult:
        """Remove items; ids that are not there are no error. Otherwise as `upsert`."""
        packed = [id_bytes(item_id, f"ids[{i}]") for i, item_id in enumerate(ids)]
        if not packed:
            return DeleteResult(version=self.snapshot().version, n_deleted=0)
        give_up = time.monotonic() + deadline_s
        self._check_writable(give_up)
        written = self._catalog.delete(
            self._meta,
            [Raw(item_id, layout.pack_delete(item_id)) for item_id in packed],
            request_id=request_id or uuid.uuid4().hex,
            deadline_s=give_up - time.monotonic(),
            known_seq=self._follower.known_seq,
        )
        self._follower.saw(written.seq)
        return DeleteResult(version=written.seq, n_deleted=written.n_items)

    def expire(self, should_stop: Callable[[], bool]) -> int:
        """Have Redis remove what has expired; return how many items it removed.

        It goes by the log, so all replicas lose it at one version. While Redis is away nothing
        expires. For one thread at a time.

        Parameters
        ----------
        should_stop
            Polled between calls to Redis, each of which removes a few hundred.

        Raises
        ------
        HashlensError
            Redis refuses, or has gone away. The next call does what is left.
        """
        if self._follower.trouble is not None:
            return 0
        return remove_expired(self._local.snapshot, self._catalog, self._meta, should_stop)

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
            if self._follower.is_lost or self._is_held:
                return self._local.checkpoint_seq
            return self._checkpoint()

    def verify(self, stop: threading.Event) -> Verified:
        """Compare the local files with Redis and with their checksums; raises as `verify.verify`.

        Set `stop` to end it early; `close` does.
        """
        with self._stoppable(stop):
            return compared(self._local, self._follower, self._meta, stop)

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
            raise OverloadedError(f"{self.spec.name} is being rebuilt", retry_after_s=_SETTLE_S)
        before = self._follower
        try:
            with self._checkpointing:
                self._is_held = True
            with self._stoppable(stop):
                old = self._local
                made, self._local = remade(old, before, self._catalog, self._replica.id, stop)
                self._local.on_damage = old.on_damage
            return made
        finally:
            if before.is_stopping and not self._stopping.is_set():
                self._follower = before.on(self._local)
                self._follower.start()
            self._is_held = False
            self._rebuilding.release()

    def _checkpoint(self) -> int:
        self._checkpointed_at = time.monotonic()
        try:
            seq = self._local.checkpoint()
        except (OSError, HashlensError) as error:
            self._checkpoint_trouble = f"No checkpoint: {error}"
            raise
        self._checkpoint_trouble = ""
        if self._follower.trouble is not None:
            return seq
        reach("checkpoint.trim")
        try:
            self._catalog.trim(
                self._meta,
                self._replica.id,
                seq,
                max(int(self._limits.budget_bytes / self._follower.mean_bytes), 1),
                deadline_s=_TRIM_S,
                silence_s=self._limits.silence_s,
                forget_s=self._limits.forget_s,
            )
        except HashlensError as error:
            logger.info("the log of %s is not trimmed: %s", self.spec.name, error)
        return seq

    @property
    def checkpoint_seq(self) -> int:
        """Everything up to this write is safe in the local files."""
        return self._local.checkpoint_seq

    @property
    def erased_seq(self) -> int:
        """Rows that were dead at this write are in none of the local files."""
        return self._local.erased_seq

    def ask_to_erase(self, deadline_s: float) -> int:
        """Ask all replicas to erase what is dead by now; return the version that this is.

        Raises
        ------
        PreconditionError, NotFoundError
            Redis and this replica do not hold the same collection.
        UnavailableError
            Redis is away.
        """
        give_up = time.monotonic() + deadline_s
        self._check_writable(give_up)
        seq = self._catalog.eraser.ask(
            self._meta, self._follower.known_seq, give_up - time.monotonic()
        )
        self._follower.saw(seq)
        return seq

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
            if self.is_lost:
                raise PreconditionError(self.info().detail)
            done = compact(self._local, Pace(bytes_per_s, self._stopping))
        self.checkpoint()
        if self._follower.trouble is None:
            # The next hello tells it, too; this one does so at once.
            with contextlib.suppress(HashlensError):
                self.hello(_TRIM_S)
        return done

    def stop_compacting(self) -> None:
        """End a compaction that is under way, and all later ones at once."""
        self._stopping.set()

    def checkpoint_is_due(self, *, interval_s: float, rows: int, n_bytes: int) -> bool:
        """Tell whether enough has been applied, or long enough ago."""
        if self._local.seq == self._local.checkpoint_seq:
            return False
        pending_rows, pending_bytes = self._local.pending
        late = time.monotonic() - self._checkpointed_at >= interval_s
        return late or pending_rows >= rows or pending_bytes >= n_bytes

    def start(self) -> None:
        """Begin to follow the log, and to index the tags that are there."""
        self._follower.start()
        self._tags.start()

    def stop(self) -> None:
        """Ask all that is under way to end; `close` and `remove` wait for it."""
        self.stop_compacting()
        for stop in list(self._running):
            stop.set()
        self._tags.stop()
        self._follower.stop()

    def close(self) -> None:
        """End, with a last checkpoint. Snapshots that are in use stay valid."""
        self._end()
        try:
            self.checkpoint()
        except (OSError, HashlensError) as error:
            logger.warning("no last checkpoint of %s: %s", self.spec.name, error)
        self._local.close()

    def abandon(self) -> None:
        """End, and leave the local files as they are: they cannot be trusted."""
        self._end()
        self._local.close()

    def remove(self) -> None:
        """End, and delete the local files. Snapshots that are in use stay valid."""
        self._end()
        self._local.remove()

    def _end(self) -> None:
        self.stop()
        self._tags.stop()
        with self._rebuilding:
            self._follower.stop()
            self._follower.join()
        self._tags.join()

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

    def _check_writable(self, give_up: float) -> None:
        """Refuse what could not be applied here; the rest is for Redis to say."""
        self._local.check_disk()
        trouble = self._follower.trouble
        while isinstance(trouble, UnavailableError) and time.monotonic() < give_up:
            self._follower.wait_settled(min(give_up - time.monotonic(), _LOOK_S))
            trouble = self._follower.trouble
        if trouble is None or self.is_foreign:
            return
        if self.needs_files:
            raise UnavailableError(self._explained(trouble))
        if self.is_lost:
            raise PreconditionError(trouble.message)
        raise type(trouble)(trouble.message)

    def _explained(self, trouble: HashlensError) -> str:
        """Return what is wrong, and what is done about it."""
        note = self._note if self.needs_files else ""
        return f"{trouble.message} {note}".rstrip()

    def _keep_up(self, give_up: float) -> None:
        """Wait until the log is not far ahead of the files: Redis holds it in memory until then."""
        lag_items = max(int(_MAX_LAG_BYTES / self._follower.mean_bytes), 1)
        while self._written - self._local.seq > lag_items and self._follower.trouble is None:
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                raise OverloadedError(
                    f"{self.spec.name} is written faster than this replica can follow",
                    retry_after_s=_SETTLE_S,
                )
            with contextlib.suppress(DeadlineError):
                self._local.wait_for(self._written - lag_items, min(left_s, _SETTLE_S))
