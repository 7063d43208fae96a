"""Which collections a replica serves: they come and go as Redis says, and as their files allow."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from hashlens.errors import (
    CancelledError,
    DeadlineError,
    HashlensError,
    LimitError,
    PreconditionError,
    UnavailableError,
)
from search_service.storage import data_dir
from search_service.storage.catalog import Catalog
from search_service.storage.collection import Collection
from search_service.storage.counters import Counters
from search_service.storage.follower import Follower
from search_service.storage.keys import Meta, foreign
from search_service.storage.leases import Leases
from search_service.storage.local import LocalCollection
from search_service.storage.opening import opened
from search_service.storage.replicas import Identity, LogLimits
from search_service.storage.store_config import StoreConfig

logger = logging.getLogger(__name__)

_ASIDE_S = 10.0


class Roster:
    """The collections on one replica, and a thread that keeps up with what others do.

    `find`, `all` and `replace` may be called by any thread; `adopt`, `settle` and `remove` by one
    that is `administering`.

    Parameters
    ----------
    config
        Where the files are, and how often to look.
    redis_url
        For the followers.
    replica
        This one.
    catalog
        Says which collections there are.
    leases
        Of files that others copy; ended when the files go.
    counters
        Told of damage.
    on_change
        Called when a follower has noticed something, or a collection was put aside.
    on_remove
        Called with the name of a collection that was dropped.
    """

    def __init__(
        self,
        config: StoreConfig,
        redis_url: str,
        replica: Identity,
        catalog: Catalog,
        leases: Leases,
        counters: Counters,
        *,
        on_change: Callable[[], None],
        on_remove: Callable[[str], None],
    ) -> None:
        self._config = config
        self._redis_url = redis_url
        self._directory = config.data_dir / "collections"
        self._replica = replica
        self._limits = LogLimits(
            config.log_budget_bytes, config.replica_silence_s, config.replica_forget_s
        )
        self._catalog = catalog
        self._leases = leases
        self._counters = counters
        self._on_change = on_change
        self._on_remove = on_remove
        self._collections: dict[str, Collection] = {}
        self._admin = threading.Lock()
        self._durability = "unknown"
        self._has_synchronized = False
        self._foreign_epochs: set[str] = set()
        self._closing = threading.Event()
        self._look = threading.Event()
        self._discovery = threading.Thread(target=self._discover, name="discover", daemon=True)

    def all(self) -> list[Collection]:
        """Return the collections; never waits."""
        return list(self._collections.values())

    def find(self, name: str) -> Collection | None:
        """Return a collection if it is on this replica; never waits."""
        return self._collections.get(name)

    def load(self) -> None:
        """Open all collections in the directory."""
        quarantine = self._config.data_dir / "quarantine"
        for local in opened(self._directory, quarantine, self._counters):
            self._serve(local)

    def start(self) -> None:
        """Begin to look for what other processes do."""
        self._discovery.start()

    def stop(self) -> None:
        """Let nothing come or go any more; `close` waits for what is under way."""
        self._closing.set()
        self._look.set()

    def close(self) -> None:
        """End all collections, with a last checkpoint each."""
        self.stop()
        if self._discovery.ident is not None:
            self._discovery.join()
        with self._admin:
            for collection in self._collections.values():
                collection.stop()
            for collection in self._collections.values():
                collection.close()
            self._collections = {}

    @contextlib.contextmanager
    def administering(self, deadline_s: float) -> Iterator[None]:
        """Hold the lock under which collections come and go.

        Raises
        ------
        DeadlineError
            Another has held it for that long.
        UnavailableError
            The store is closing.
        """
        if self._closing.is_set() or not self._admin.acquire(timeout=max(deadline_s, 0)):
            raise DeadlineError("Another collection is being made or dropped. Try again.")
        try:
            if self._closing.is_set():
                raise UnavailableError("The store is closing.")
            yield
        finally:
            self._admin.release()

    def adopt(self, meta: Meta) -> Collection:
        """Return the collection that Redis describes, making its files if need be.

        Raises
        ------
        LimitError
            The local disk is full or broken.
        """
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

    def remove(self, collection: Collection) -> None:
        """Stop serving a collection that was dropped, and delete its files."""
        logger.info("removing the files of %s, which was dropped", collection.spec.name)
        self._collections.pop(collection.spec.name)
        self._on_remove(collection.spec.name)
        self._leases.revoke(collection.spec.name)
        collection.remove()

    def settle(self, name: str, give_up: float) -> None:
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
        self.remove(local)

    def replace(self, collection: Collection, place: Callable[[], None]) -> None:
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

    def put_aside(self, collection: Collection, trouble: str) -> None:
        """Stop serving a collection whose files cannot be trusted, and have it made anew."""
        name = collection.spec.name
        with contextlib.suppress(HashlensError), self.administering(_ASIDE_S):
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

    def synchronize(self, deadline_s: float) -> None:
        """Open collections that others made, remove those that others dropped.

        Raises
        ------
        HashlensError
            Redis is away, or there was not enough time.
        """
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
                with self.administering(give_up - time.monotonic()):
                    if self._collections.get(collection.spec.name) is collection:
                        self.remove(collection)
            elif collection.is_foreign and collection.epoch not in self._foreign_epochs:
                self._foreign_epochs.add(collection.epoch)
                logger.warning("%s", collection.info().detail)
        for name in sorted(names - set(self._collections)):
            # Asked under the lock: one that is dropped here meanwhile must not come back.
            with self.administering(give_up - time.monotonic()):
                meta = self._catalog.meta(name, give_up - time.monotonic())
                if meta is not None and meta.is_active:
                    self.adopt(meta)

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

    def _changed(self) -> None:
        """Look at once for what a follower has noticed."""
        self._look.set()
        self._on_change()

    def _count_damage(self, n: int) -> None:
        self._counters.n_damaged_features += n

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
                self.synchronize(self._config.redis_timeout_s)
                trouble = ""
            except HashlensError as error:
                if str(error) != trouble:
                    logger.warning("cannot look for collections: %s", error)
                trouble = str(error)
            self._look.wait(self._config.discovery_interval_s)
            self._look.clear()
