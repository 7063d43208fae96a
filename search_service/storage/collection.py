"""One collection, as the service uses it: writes go to Redis, reads to the local files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from hashlens.errors import HashlensError, UnavailableError
from hashlens.packed_items import PackedItems
from hashlens.types import (
    CollectionInfo,
    CollectionSpec,
    DeleteResult,
)
from search_service.snapshot import Snapshot
from search_service.storage.catalog import Catalog
from search_service.storage.compaction import Compacted
from search_service.storage.follower import Follower
from search_service.storage.keys import Meta
from search_service.storage.leases import Lease, Leases
from search_service.storage.live import Live
from search_service.storage.local import LocalCollection
from search_service.storage.rebuild import Rebuilt
from search_service.storage.records import Record
from search_service.storage.replicas import Identity, LogLimits, Replicas
from search_service.storage.tag_builder import TagBuilder
from search_service.storage.upkeep import Upkeep
from search_service.storage.verify import Verified
from search_service.storage.writer import Writer

logger = logging.getLogger(__name__)


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
        meta = Meta(local.spec, local.epoch, local.n_buckets, local.seq, False)
        self._live = Live(local, follower, catalog, meta)
        self._writer = Writer(self._live)
        self._upkeep = Upkeep(self._live, replica, limits)
        self._replica = replica
        self._durability = durability
        self._tags = TagBuilder(local)
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
        return self._live.local

    @property
    def spec(self) -> CollectionSpec:
        """What it is bound to."""
        return self._live.local.spec

    @property
    def epoch(self) -> str:
        """UUID of this incarnation."""
        return self._live.local.epoch

    @property
    def is_foreign(self) -> bool:
        """Whether Redis has another collection of the name, or none."""
        return self._live.follower.is_foreign

    @property
    def is_lost(self) -> bool:
        """Whether the local files are not all there is, and the log cannot mend that."""
        return self._live.follower.is_lost

    @property
    def needs_files(self) -> bool:
        """Whether it is lost, and other files are being looked for."""
        return self._live.follower.needs_files

    @property
    def trouble(self) -> HashlensError | None:
        """Why it takes no writes, if so."""
        return self._live.trouble

    def note(self, what: str) -> None:
        """Say in `info` what is done about its trouble."""
        self._live.note = what

    def succeeded_by(self, collection: Collection) -> None:
        """Let those who wait for a version wait for it there."""
        self._successor = collection

    def hello(self, deadline_s: float) -> None:
        """Tell the other replicas that this one is alive; raises as `catalog.ReplicaList`."""
        self._upkeep.hello(deadline_s)

    def count_log(self, deadline_s: float) -> None:
        """Look how long the log is; raises what `catalog.Catalog` raises."""
        live = self._live
        live.log_entries = live.catalog.log_entries(self.spec.name, deadline_s)

    @property
    def log_entries(self) -> int:
        """How long the log was when `count_log` last looked."""
        return self._live.log_entries

    @property
    def log_version(self) -> int:
        """The newest write that is known to be in the log."""
        return self._live.follower.known_seq

    @property
    def is_refused(self) -> bool:
        """Whether Redis answers, and takes no writes."""
        return self._live.follower.refusal is not None

    def look(self, deadline_s: float) -> Replicas:
        """Return all replicas, the newest write and where the log begins, as Redis knows them.

        Raises as `catalog.ReplicaList`.
        """
        return self._upkeep.look(deadline_s)

    def lend(self, leases: Leases, min_version: int) -> Lease:
        """Lend the files to a replica that copies them. See `Upkeep.lend`."""
        return self._upkeep.lend(leases, min_version)

    def snapshot(self) -> Snapshot:
        """Return the newest version; cheap, takes no lock, needs no Redis."""
        return self._live.local.snapshot

    def wait_for(self, version: int, deadline_s: float) -> Snapshot:
        """Return the newest snapshot as soon as it has a version.

        Raises
        ------
        DeadlineError
            It does not come within `deadline_s`.
        """
        return self._live.local.wait_for(version, deadline_s)

    def info(self) -> CollectionInfo:
        """Describe it as this replica sees it; needs no Redis."""
        snapshot = self._live.local.snapshot
        trouble = self._live.trouble
        away = isinstance(trouble, UnavailableError)
        return CollectionInfo(
            spec=self.spec,
            epoch=self.epoch,
            version=snapshot.version,
            n_items=snapshot.n_alive,
            n_dead_rows=snapshot.rows - snapshot.n_alive,
            checkpoint_version=self._live.local.checkpoint_seq,
            durability="unknown" if away else self._durability(),
            writable=trouble is None,
            detail=self._live.explained(trouble),
            replica_id=self._replica.id,
            n_missing_features=self._live.local.n_missing_features,
            erased_version=self._live.local.erased_seq,
        )

    def upsert(
        self,
        items: Sequence[Record] | PackedItems,
        *,
        request_id: str,
        deadline_s: float,
        content: bytes | None = None,
    ) -> int:
        """Write items; return the version that has them. See `Writer.upsert`."""
        return self._writer.upsert(
            items, request_id=request_id, deadline_s=deadline_s, content=content
        )

    def delete(self, ids: Sequence[str], *, request_id: str, deadline_s: float) -> DeleteResult:
        """Remove items; ids that are not there are no error. See `Writer.delete`."""
        return self._writer.delete(ids, request_id=request_id, deadline_s=deadline_s)

    def expire(self, should_stop: Callable[[], bool]) -> int:
        """Have Redis remove what has expired; return how many. See `Writer.expire`."""
        return self._writer.expire(should_stop)

    def ask_to_erase(self, deadline_s: float) -> int:
        """Ask all replicas to erase what is dead; return the version. See `Writer.ask_to_erase`."""
        return self._writer.ask_to_erase(deadline_s)

    def checkpoint(self) -> int:
        """Make everything applied so far safe; return the version. See `Upkeep.checkpoint`."""
        return self._upkeep.checkpoint()

    def checkpoint_is_due(self, *, interval_s: float, rows: int, n_bytes: int) -> bool:
        """Tell whether enough has been applied, or long enough ago."""
        return self._upkeep.checkpoint_is_due(interval_s=interval_s, rows=rows, n_bytes=n_bytes)

    def verify(self, stop: threading.Event) -> Verified:
        """Compare the files with Redis and with their checksums. See `Upkeep.verify`."""
        return self._upkeep.verify(stop)

    def rebuild(self, stop: threading.Event) -> Rebuilt:
        """Make the local files anew from Redis. See `Upkeep.rebuild`."""
        return self._upkeep.rebuild(stop)

    def compact(self, bytes_per_s: float = 0) -> Compacted:
        """Write the files anew without dead rows. See `Upkeep.compact`."""
        return self._upkeep.compact(bytes_per_s)

    def stop_compacting(self) -> None:
        """End a compaction that is under way, and all later ones at once."""
        self._upkeep.stop_compacting()

    @property
    def checkpoint_seq(self) -> int:
        """Everything up to this write is safe in the local files."""
        return self._live.local.checkpoint_seq

    @property
    def erased_seq(self) -> int:
        """Rows that were dead at this write are in none of the local files."""
        return self._live.local.erased_seq

    def start(self) -> None:
        """Begin to follow the log, and to index the tags that are there."""
        self._live.follower.start()
        self._tags.start()

    def stop(self) -> None:
        """Ask all that is under way to end; `close` and `remove` wait for it."""
        self._upkeep.stop()
        self._tags.stop()
        self._live.follower.stop()

    def close(self) -> None:
        """End, with a last checkpoint. Snapshots that are in use stay valid."""
        self._end()
        try:
            self.checkpoint()
        except (OSError, HashlensError) as error:
            logger.warning("no last checkpoint of %s: %s", self.spec.name, error)
        self._live.local.close()

    def abandon(self) -> None:
        """End, and leave the local files as they are: they cannot be trusted."""
        self._end()
        self._live.local.close()

    def remove(self) -> None:
        """End, and delete the local files. Snapshots that are in use stay valid."""
        self._end()
        self._live.local.remove()

    def _end(self) -> None:
        self.stop()
        self._upkeep.end()
        self._tags.join()
