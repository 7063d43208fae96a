"""All collections of one search replica: its data directory, its Redis, its threads."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from hashlens.errors import (
    AlreadyExistsError,
    CancelledError,
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
from search_service.storage.opening import opened
from search_service.storage.peers import Peers
from search_service.storage.receipts import erase
from search_service.storage.replicas import Identity, LogLimits
from search_service.storage.resync import ResyncConfig, Resyncer
from search_service.storage.routines import Routines
from search_service.storage.store_config import StoreConfig

logger = logging.getLogger(__name__)

_LOOKUP_S = 2.0
_ASIDE_S = 10.0


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
        self._caretaker = Caretaker(
            self._counters,
            lambda: list(self._collections.values()),
            self._put_aside,
            bytes_per_s=config.scrub_mb_per_s * 1e6,
            interval_s=config.scrub_interval_s,
        )
        self._discovery = threading.Thread(target=self._discover, name="discover", daemon=True)
        self._leases = Leases(self._directory, config.lease_s)
        self._routines = Routines(
            config,
            lambda: list(self._collections.values()),
            self._leases,
            self._counters,
        )
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
            store._discovery.start()
            store._routines.start()
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
        self._resyncer.close()
        self._caretaker.close()
        self._routines.close()
        if self._discovery.ident is not None:
            self._discovery.join()
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
        quarantine = self._config.data_dir / "quarantine"
        for local in opened(self._directory, quarantine, self._counters):
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
        self._routines.greet()
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
