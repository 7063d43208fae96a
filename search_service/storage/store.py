"""All collections of one search replica: its data directory, its Redis, its threads."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hashlens.errors import (
    AlreadyExistsError,
    CancelledError,
    DataLossError,
    DeadlineError,
    HashlensError,
    InvalidInputError,
    LimitError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from hashlens.types import CollectionInfo, CollectionSpec, CompactResult, ReplicaInfo
from search_service.storage import data_dir, layout
from search_service.storage.caretaker import Caretaker
from search_service.storage.catalog import Catalog
from search_service.storage.collection import Collection
from search_service.storage.compactor import Compactor, Policy
from search_service.storage.counters import Counters
from search_service.storage.embedded import EmbeddedRedis
from search_service.storage.follower import Follower
from search_service.storage.keys import Meta, foreign
from search_service.storage.leases import Lease, Leases
from search_service.storage.local import LocalCollection
from search_service.storage.peers import Peers
from search_service.storage.receipts import erase
from search_service.storage.replicas import FORGET_S, SILENCE_S, Identity, LogLimits
from search_service.storage.resync import ResyncConfig, Resyncer

logger = logging.getLogger(__name__)

_CHECKPOINT_POLL_S = 0.5
_LOOKUP_S = 2.0
_ASIDE_S = 10.0


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a `Store` needs to know."""

    data_dir: Path
    """Where this replica's files are; made if it is not there. One process at a time."""
    redis_url: str | None = None
    """``redis://``, ``rediss://`` or ``unix://``; Redis 7.0 or newer, or Valkey. None: a server of
    the store's own, whose data are in `data_dir`, too."""
    checkpoint_interval_s: float = 30.0
    """A write is safe in the local files after at most about this long, in seconds."""
    checkpoint_rows: int = 500_000
    """A checkpoint comes earlier after so many writes."""
    checkpoint_bytes: int = 256 << 20
    """A checkpoint comes earlier after so many bytes of the log: Redis holds them in memory."""
    log_budget_bytes: int = 1 << 30
    """How much of the log Redis keeps for slower replicas, in bytes. One that is further behind
    loses its place."""
    segment_bytes: int = 256 << 20
    """About how long a file of features gets, in bytes."""
    redis_timeout_s: float = 5.0
    """The longest wait for one reply of Redis, in seconds."""
    expire_interval_s: float = 1.0
    """How often to look for items that have expired, in seconds."""
    address: str = ""
    """host:port where other replicas reach this one; empty if they cannot."""
    hello_interval_s: float = 5.0
    """How often to tell the other replicas that this one is alive, in seconds."""
    replica_silence_s: float = SILENCE_S
    """The log is not kept for a replica that was silent for longer, in seconds."""
    replica_forget_s: float = FORGET_S
    """A replica that was silent for longer is forgotten, in seconds."""
    resync_patience_s: float = 60.0
    """How long to try peers that do not serve before files are made anew from Redis, which may not
    have all features, in seconds."""
    lease_s: float = 300.0
    """Files that another replica copies are kept for so long after it last read, in seconds."""
    discovery_interval_s: float = 2.0
    """How often to look for collections that other processes made or dropped, in seconds."""
    compaction_share: float = 0.3
    """Compact a collection when this share of its rows is dead; 0: only when asked."""
    compaction_min_rows: int = 100_000
    """And at least so many are."""
    compaction_mb_per_s: float = 64.0
    """How fast compaction copies at most, in millions of bytes per second; 0: no limit."""
    scrub_mb_per_s: float = 16.0
    """How fast all files are read and compared with their checksums in the background, in millions
    of bytes per second; 0: never."""
    scrub_interval_s: float = 86_400.0
    """How long after one such reading the next begins, in seconds."""


class Store:
    """The collections of one replica. Thread-safe. Use `Store.open`, and `close` it.

    Searching needs the local files only. While Redis is away, writes raise `UnavailableError`; the
    store comes back by itself.
    """

    def __init__(self, config: StoreConfig, redis_url: str, peers: Peers | None) -> None:
        self._config = config
        self._redis_url = redis_url
        self._resources = contextlib.ExitStack()
        self._directory = config.data_dir / "collections"
        self._replica = Identity(data_dir.replica_id(config.data_dir), config.address)
        self._limits = LogLimits(
            config.log_budget_bytes, config.replica_silence_s, config.replica_forget_s
        )
        self._catalog = Catalog(redis_url, config.redis_timeout_s)
        self._collections: dict[str, Collection] = {}
        self._admin = threading.Lock()
        self._durability = "unknown"
        self._has_synchronized = False
        self._foreign_epochs: set[str] = set()
        self._closing = threading.Event()
        self._look = threading.Event()
        self._counters = Counters()
        self._compactor = Compactor(
            self._catalog.eraser,
            lambda: list(self._collections.values()),
            Policy(
                share=config.compaction_share,
                min_rows=config.compaction_min_rows,
                bytes_per_s=config.compaction_mb_per_s * 1e6,
                poll_s=config.discovery_interval_s,
            ),
        )
        self._greet = threading.Event()
        self._caretaker = Caretaker(
            self._counters,
            lambda: list(self._collections.values()),
            self._put_aside,
            bytes_per_s=config.scrub_mb_per_s * 1e6,
            interval_s=config.scrub_interval_s,
        )
        self._threads = [
            threading.Thread(target=self._discover, name="discover", daemon=True),
            threading.Thread(target=self._checkpoint, name="checkpoint", daemon=True),
            threading.Thread(target=self._expire, name="expire", daemon=True),
            threading.Thread(target=self._hello, name="hello", daemon=True),
        ]
        self._leases = Leases(self._directory, config.lease_s)
        self._resyncer = Resyncer(
            ResyncConfig(
                data_dir=config.data_dir,
                redis_url=redis_url,
                timeout_s=config.redis_timeout_s,
                segment_bytes=config.segment_bytes,
                silence_s=config.replica_silence_s,
                patience_s=config.resync_patience_s,
            ),
            self._replica,
            self._catalog,
            peers,
            self._counters,
            lost=lambda: [c for c in list(self._collections.values()) if c.needs_files],
            replace=self._replace,
        )

    @classmethod
    def open(cls, config: StoreConfig, peers: Peers | None = None) -> Self:
        """Open a data directory and serve what is in it, whether Redis is there or not.

        A collection whose files are damaged is put aside under ``quarantine/``. It is brought back
        from the log if that reaches back to the first write, else from another replica, else from
        what Redis holds besides; see `resync`.

        Parameters
        ----------
        config
            See `StoreConfig`.
        peers
            How to reach other replicas; the store closes it. None: there is no way.

        Raises
        ------
        PreconditionError
            Another process uses the directory, or another version of Hashlens wrote it.
        InvalidInputError
            The URL is not one of Redis.
        OSError
            The directory cannot be read or written.
        """
        # Ids, payloads and features are nobody else's.
        config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as resources:
            resources.callback(os.close, data_dir.lock(config.data_dir))
            url = config.redis_url
            if url is None:
                url = resources.enter_context(EmbeddedRedis(config.data_dir / "redis")).url
            store = cls(config, url, peers)
            resources.callback(store._end)
            store._load()
            for thread in store._threads:
                thread.start()
            store._compactor.start()
            store._resyncer.start()
            store._caretaker.start()
            store._resources = resources.pop_all()
            return store

    def create(self, spec: CollectionSpec, *, deadline_s: float = 10.0) -> Collection:
        """Make a collection; return the one that is there if it has the same specification.

        Raises
        ------
        InvalidInputError
            The name cannot be one.
        AlreadyExistsError
            It is there with another specification.
        PreconditionError
            This replica has a collection of the name that Redis does not know.
        UnavailableError
            Redis is away.
        LimitError
            The local disk is full or broken.
        """
        if not layout.is_safe_name(spec.name):
            raise InvalidInputError(
                "A name has 1 to 64 of a-z, 0-9, _ and -, the first a letter or digit.",
                field="spec.name",
            )
        give_up = time.monotonic() + deadline_s
        with self._administering(deadline_s):
            self._settle(spec.name, give_up)
            meta = self._catalog.create(spec, give_up - time.monotonic())
            if meta.spec != spec:
                raise AlreadyExistsError(
                    f"The collection {spec.name} exists with another specification: {meta.spec}."
                )
            return self._adopt(meta)

    def find(self, name: str) -> Collection | None:
        """Return a collection if it is on this replica; never waits."""
        return self._collections.get(name)

    def get(self, name: str, *, deadline_s: float = _LOOKUP_S) -> Collection:
        """Return a collection; one that another process made is found, too.

        Raises
        ------
        NotFoundError
            There is none.
        UnavailableError
            It is not on this replica, and Redis is away.
        """
        found = self.find(name)
        if found is not None:
            return found
        give_up = time.monotonic() + deadline_s
        meta = self._catalog.meta(name, deadline_s) if layout.is_safe_name(name) else None
        if meta is None or not meta.is_active:
            raise NotFoundError(f"There is no collection {name}.")
        with self._administering(give_up - time.monotonic()):
            return self._adopt(meta)

    def replicas(self, name: str, *, deadline_s: float = _LOOKUP_S) -> list[ReplicaInfo]:
        """Return all replicas of a collection that Redis knows, by id.

        Raises
        ------
        NotFoundError
            There is no such collection.
        UnavailableError
            Redis is away.
        """
        give_up = time.monotonic() + deadline_s
        collection = self.get(name, deadline_s=deadline_s)
        return collection.replicas(give_up - time.monotonic())

    def list(self, *, deadline_s: float = _LOOKUP_S) -> list[CollectionInfo]:
        """Describe all collections, by name; while Redis is away, those on this replica."""
        try:
            self._synchronize(deadline_s)
        except HashlensError as error:
            logger.info("listing what is on this replica only: %s", error)
        return [*self.infos()]

    def compact(
        self, name: str, *, wait_for_replicas: bool = False, deadline_s: float = 60.0
    ) -> CompactResult:
        """Erase the rows of replaced and deleted items from all replicas and from Redis.

        Parameters
        ----------
        name
            The collection's.
        wait_for_replicas
            Wait, as long as the deadline lets, for the other live replicas, too.
        deadline_s
            The longest to wait, in seconds.

        Raises
        ------
        NotFoundError
            There is no such collection.
        DeadlineError
            This replica has not done it in time; it goes on.
        UnavailableError
            Redis is away.
        LimitError
            The local disk is full or broken. The files are as they were.
        """
        give_up = time.monotonic() + deadline_s
        collection = self.get(name, deadline_s=deadline_s)
        try:
            return erase(
                collection,
                self._compactor,
                self._catalog.eraser,
                self._config.data_dir,
                wait_for_replicas=wait_for_replicas,
                deadline_s=give_up - time.monotonic(),
            )
        except OSError as error:
            raise LimitError(f"The files of {name} cannot be written anew ({error}).") from error

    def infos(self) -> Sequence[CollectionInfo]:
        """Describe the collections on this replica, by name; never waits."""
        return [found.info() for _, found in sorted(self._collections.items())]

    @property
    def counters(self) -> Counters:
        """What has happened since the store was opened."""
        return self._counters

    def drop(self, name: str, *, deadline_s: float = 60.0) -> None:
        """Remove a collection from Redis and from this replica; others follow by themselves.

        Raises
        ------
        NotFoundError
            There is none.
        UnavailableError
            Redis is away. What has begun is completed by the next attempt.
        """
        give_up = time.monotonic() + deadline_s
        with self._administering(deadline_s):
            local = self._collections.get(name)
            known = layout.is_safe_name(name)
            epoch = self._catalog.drop(name, give_up - time.monotonic()) if known else None
            if local is not None:
                if epoch != local.epoch:
                    self._catalog.record_drop(name, local.epoch, give_up - time.monotonic())
                self._remove(local)
            elif epoch is None:
                raise NotFoundError(f"There is no collection {name}.")

    def lend(self, name: str, epoch: str, min_version: int) -> Lease:
        """Lend the files of a collection to a replica that copies them.

        Raises
        ------
        NotFoundError
            It is not on this replica.
        PreconditionError
            It is another one of the name.
        HashlensError
            See `Collection.lend`.
        """
        found = self.find(name)
        if found is None:
            raise NotFoundError(f"There is no collection {name}.")
        if found.epoch != epoch:
            raise PreconditionError(f"This replica has another {name}: {found.epoch}.")
        return found.lend(self._leases, min_version)

    def lease(self, token: str) -> Lease:
        """Return what was lent; NotFoundError if it is not any more."""
        return self._leases.find(token)

    def close(self) -> None:
        """End all threads, with a last checkpoint each. Snapshots that are in use stay valid."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        """End all threads; the files stay as the last checkpoints have them."""
        self._closing.set()
        self._look.set()
        self._compactor.close()
        self._greet.set()
        self._resyncer.close()
        self._caretaker.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        with self._admin:
            for collection in self._collections.values():
                collection.stop()
            for collection in self._collections.values():
                collection.close()
            self._collections = {}
        self._leases.close()
        self._catalog.close()

    def _load(self) -> None:
        """Open all collections in the directory."""
        self._directory.mkdir(exist_ok=True)
        data_dir.clean(self._directory)
        for directory in sorted(self._directory.glob("[!.]*")):
            if not layout.is_safe_name(directory.name):
                logger.warning("%s is not of this service: left alone", directory)
                continue
            try:
                if directory.is_symlink() or not directory.is_dir():
                    raise DataLossError(f"{directory} is not a directory")
                local = LocalCollection.load(directory)
            except OSError as error:
                # It may be whole: too many open files are no reason to put it away.
                logger.error("%s cannot be opened (%s) and is not served", directory, error)
                continue
            except DataLossError as error:
                try:
                    aside = data_dir.quarantine(directory, self._config.data_dir / "quarantine")
                except OSError as broken:
                    # Without it the others are served; with it nobody would be.
                    logger.error("%s; it cannot be put aside (%s) and is not served", error, broken)
                    continue
                self._counters.n_quarantined += 1
                logger.error("%s; the files are in %s now", error, aside)
                continue
            self._serve(local)

    def _serve(self, local: LocalCollection) -> Collection:
        """Begin to follow the log of a collection whose files are open."""
        follower = Follower(
            local,
            self._redis_url,
            self._replica.id,
            timeout_s=self._config.redis_timeout_s,
            on_change=self._changed,
        )
        local.on_damage = self._count_damage
        collection = Collection(
            local,
            self._catalog,
            follower,
            replica=self._replica,
            limits=self._limits,
            durability=lambda: self._durability,
        )
        self._collections[local.spec.name] = collection
        collection.start()
        return collection

    def _adopt(self, meta: Meta) -> Collection:
        """Return the collection that Redis describes, making its files if need be."""
        name = meta.spec.name
        found = self._collections.get(name)
        if found is not None:
            return found
        try:
            local = LocalCollection.create(
                self._directory / name,
                meta.spec,
                epoch=meta.epoch,
                n_buckets=meta.n_buckets,
                segment_bytes=self._config.segment_bytes,
            )
        except OSError as error:
            raise LimitError(f"The files of {name} cannot be made ({error}).") from error
        return self._serve(local)

    def _remove(self, collection: Collection) -> None:
        """Stop serving a collection that was dropped, and delete its files."""
        logger.info("removing the files of %s, which was dropped", collection.spec.name)
        self._collections.pop(collection.spec.name)
        self._resyncer.forget(collection.spec.name)
        self._leases.revoke(collection.spec.name)
        collection.remove()

    def _replace(self, collection: Collection, place: Callable[[], None]) -> None:
        """Have files that `place` puts there take the place of a collection's own.

        Raises
        ------
        CancelledError
            The collection was dropped or repaired meanwhile, or the store is closing.
        """
        name = collection.spec.name
        with self._admin:
            gone = self._closing.is_set() or self._collections.get(name) is not collection
            if gone or not collection.needs_files:
                raise CancelledError(f"{name} needs no other files any more.")
            collection.close()
            place()
            collection.succeeded_by(self._serve(LocalCollection.load(self._directory / name)))

    def _changed(self) -> None:
        """Look at once for what a follower has noticed."""
        self._look.set()
        self._greet.set()
        self._resyncer.wake()

    def _put_aside(self, collection: Collection, trouble: str) -> None:
        """Stop serving a collection whose files cannot be trusted, and have it made anew."""
        name = collection.spec.name
        with contextlib.suppress(HashlensError), self._administering(_ASIDE_S):
            if self._collections.get(name) is not collection:
                return
            self._collections.pop(name)
            self._leases.revoke(name)
            collection.abandon()
            directory = collection.local.directory
            where = "nowhere"
            if directory.exists():
                where = str(data_dir.quarantine(directory, self._config.data_dir / "quarantine"))
            self._counters.n_quarantined += 1
            logger.error("%s is put aside: %s; its files are in %s now", name, trouble, where)
            self._changed()

    def _count_damage(self, n: int) -> None:
        self._counters.n_damaged_features += n

    def _settle(self, name: str, give_up: float) -> None:
        """Make sure that what this replica has of a name does not stand in the way of a new one.

        Raises
        ------
        PreconditionError
            It does, and only a person can tell which of the two is right.
        """
        local = self._collections.get(name)
        if local is None:
            return
        meta = self._catalog.meta(name, give_up - time.monotonic())
        if meta is not None and meta.is_dropping:
            self._catalog.finish_drop(meta, give_up - time.monotonic())
        elif meta is not None and meta.epoch == local.epoch:
            return
        if local.epoch not in self._catalog.dropped([local.epoch], give_up - time.monotonic()):
            raise PreconditionError(foreign(name, None if meta is None else meta.epoch))
        self._remove(local)

    def _synchronize(self, deadline_s: float) -> None:
        """Open collections that others made, remove those that others dropped."""
        give_up = time.monotonic() + deadline_s
        durability = self._catalog.durability(deadline_s)
        if durability != self._durability:
            level = logging.INFO if durability in ("always", "unknown") else logging.WARNING
            logger.log(level, "Redis acknowledges writes with appendfsync %s", durability)
            self._durability = durability
        names = self._catalog.names(give_up - time.monotonic())
        if not self._has_synchronized:
            self._finish_drops(names, give_up)
            self._has_synchronized = True
        here = list(self._collections.values())
        epochs = [collection.epoch for collection in here]
        dropped = self._catalog.dropped(epochs, give_up - time.monotonic())
        for collection in here:
            if collection.epoch in dropped:
                with self._administering(give_up - time.monotonic()):
                    if self._collections.get(collection.spec.name) is collection:
                        self._remove(collection)
            elif collection.is_foreign and collection.epoch not in self._foreign_epochs:
                self._foreign_epochs.add(collection.epoch)
                logger.warning("%s", collection.info().detail)
        for name in sorted(names - set(self._collections)):
            meta = self._catalog.meta(name, give_up - time.monotonic())
            if meta is not None and meta.is_active:
                with self._administering(give_up - time.monotonic()):
                    self._adopt(meta)

    def _finish_drops(self, names: set[str], give_up: float) -> None:
        """Complete what a killed process began; to help one that was not does no harm."""
        for name in sorted(names):
            meta = self._catalog.meta(name, give_up - time.monotonic())
            if meta is not None and meta.is_dropping:
                self._catalog.finish_drop(meta, give_up - time.monotonic())

    def _discover(self) -> None:
        """Thread: keep up with what other processes do."""
        trouble = ""
        while not self._closing.is_set():
            try:
                self._synchronize(self._config.redis_timeout_s)
                trouble = ""
            except HashlensError as error:
                if str(error) != trouble:
                    logger.warning("cannot look for collections: %s", error)
                trouble = str(error)
            self._look.wait(self._config.discovery_interval_s)
            self._look.clear()

    def _hello(self) -> None:
        """Thread: tell the others that this replica is alive; end what nobody copies any more."""
        config = self._config
        interval_s = min(config.hello_interval_s, config.replica_silence_s / 3)
        while not self._closing.is_set():
            for collection in list(self._collections.values()):
                try:
                    collection.hello(self._config.redis_timeout_s)
                except UnavailableError:
                    break  # Whoever follows the log says so.
                except HashlensError as error:
                    logger.debug("no hello for %s: %s", collection.spec.name, error)
            self._leases.expire()
            self._greet.wait(interval_s)
            self._greet.clear()

    def _checkpoint(self) -> None:
        """Thread: make checkpoints as they fall due."""
        config = self._config
        while not self._closing.wait(_CHECKPOINT_POLL_S):
            for collection in list(self._collections.values()):
                if collection.checkpoint_is_due(
                    interval_s=config.checkpoint_interval_s,
                    rows=config.checkpoint_rows,
                    n_bytes=config.checkpoint_bytes,
                ):
                    try:
                        collection.checkpoint()
                    except (HashlensError, OSError) as error:
                        self._counters.n_failed_checkpoints += 1
                        logger.error("no checkpoint of %s: %s", collection.spec.name, error)

    def _expire(self) -> None:
        """Thread: have what has expired removed."""
        while not self._closing.wait(self._config.expire_interval_s):
            for collection in list(self._collections.values()):
                try:
                    collection.expire(self._closing.is_set)
                except HashlensError as error:
                    # Redis has gone, or the collection: whoever looks after those warns.
                    logger.info("nothing of %s expires: %s", collection.spec.name, error)

    @contextlib.contextmanager
    def _administering(self, deadline_s: float) -> Iterator[None]:
        """Hold the lock under which collections come and go."""
        if self._closing.is_set() or not self._admin.acquire(timeout=max(deadline_s, 0)):
            raise DeadlineError("Another collection is being made or dropped. Try again.")
        try:
            if self._closing.is_set():
                raise UnavailableError("The store is closing.")
            yield
        finally:
            self._admin.release()
