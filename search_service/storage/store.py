"""All collections of one search replica: its data directory, its Redis, its threads."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from typing import Self

from hashlens.errors import (
    AlreadyExistsError,
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
from search_service.storage.connection import RedisState
from search_service.storage.counters import Counters
from search_service.storage.embedded import EmbeddedRedis
from search_service.storage.keys import Meta
from search_service.storage.leases import Lease, Leases
from search_service.storage.peers import Peers
from search_service.storage.receipts import erase
from search_service.storage.replicas import Identity
from search_service.storage.resync import ResyncConfig, Resyncer
from search_service.storage.roster import Roster
from search_service.storage.routines import Routines
from search_service.storage.store_config import StoreConfig

logger = logging.getLogger(__name__)

_LOOKUP_S = 2.0


class Store:
    """The collections of one replica. Thread-safe. Use `Store.open`, and `close` it.

    Searching needs the local files only. While Redis is away, writes raise `UnavailableError`; the
    store comes back by itself.
    """

    def __init__(self, config: StoreConfig, redis_url: str, peers: Peers | None) -> None:
        self._config = config
        self._resources = contextlib.ExitStack()
        self._replica = Identity(data_dir.replica_id(config.data_dir), config.address)
        self._catalog = Catalog(redis_url, config.redis_timeout_s)
        self._counters = Counters()
        self._leases = Leases(config.data_dir / "collections", config.lease_s)
        self._roster = Roster(
            config,
            redis_url,
            self._replica,
            self._catalog,
            self._leases,
            self._counters,
            on_change=self._changed,
            on_remove=lambda name: self._resyncer.forget(name),
        )
        self._compactor = Compactor(
            self._catalog.eraser,
            self._roster.all,
            Policy(
                share=config.compaction_share,
                min_rows=config.compaction_min_rows,
                bytes_per_s=config.compaction_mb_per_s * 1e6,
                poll_s=config.discovery_interval_s,
            ),
        )
        self._caretaker = Caretaker(
            self._counters,
            self._roster.all,
            self._roster.put_aside,
            bytes_per_s=config.scrub_mb_per_s * 1e6,
            interval_s=config.scrub_interval_s,
        )
        self._routines = Routines(
            config,
            self._roster.all,
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
            lost=lambda: [c for c in self._roster.all() if c.needs_files],
            replace=self._roster.replace,
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
            store._roster.load()
            store._roster.start()
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
        with self._roster.administering(deadline_s):
            self._roster.settle(spec.name, give_up)
            meta = self._catalog.create(spec, give_up - time.monotonic())
            if meta.spec != spec:
                raise AlreadyExistsError(
                    f"The collection {spec.name} exists with another specification: {meta.spec}."
                )
            return self._roster.adopt(meta)

    def find(self, name: str) -> Collection | None:
        """Return a collection if it is on this replica; never waits."""
        return self._roster.find(name)

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
        self._active_meta(name, deadline_s)
        with self._roster.administering(give_up - time.monotonic()):
            found = self.find(name)
            if found is not None:
                return found
            # Once more: it may just have been dropped here, and must not come back.
            return self._roster.adopt(self._active_meta(name, give_up - time.monotonic()))

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
        return collection.look(give_up - time.monotonic()).infos

    def list(self, *, deadline_s: float = _LOOKUP_S) -> list[CollectionInfo]:
        """Describe all collections, by name; while Redis is away, those on this replica."""
        try:
            self._roster.synchronize(deadline_s)
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
            if self.find(name) is not collection.newest:
                raise UnavailableError(f"{name} was dropped or replaced meanwhile.") from error
            raise LimitError(f"The files of {name} cannot be written anew ({error}).") from error

    def infos(self) -> Sequence[CollectionInfo]:
        """Describe the collections on this replica, by name; never waits."""
        return [found.info() for found in self.collections()]

    def collections(self) -> Sequence[Collection]:
        """Return the collections on this replica, by name; never waits."""
        return sorted(self._roster.all(), key=lambda c: c.spec.name)

    @property
    def redis(self) -> RedisState:
        """How calls to Redis went."""
        return self._catalog.state

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
        with self._roster.administering(deadline_s):
            local = self._roster.find(name)
            known = layout.is_safe_name(name)
            epoch = self._catalog.drop(name, give_up - time.monotonic()) if known else None
            if local is not None:
                if epoch != local.epoch:
                    self._catalog.record_drop(name, local.epoch, give_up - time.monotonic())
                self._roster.remove(local)
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

    def _active_meta(self, name: str, deadline_s: float) -> Meta:
        """Return what Redis says of a collection; NotFoundError if it has none."""
        meta = self._catalog.meta(name, deadline_s) if layout.is_safe_name(name) else None
        if meta is None or not meta.is_active:
            raise NotFoundError(f"There is no collection {name}.")
        return meta

    def _end(self) -> None:
        """End all threads; the files stay as the last checkpoints have them."""
        self._roster.stop()
        self._compactor.close()
        self._resyncer.close()
        self._caretaker.close()
        self._routines.close()
        self._roster.close()
        self._leases.close()
        self._catalog.close()

    def _changed(self) -> None:
        """Act at once on what the roster has noticed."""
        self._routines.greet()
        self._resyncer.wake()
