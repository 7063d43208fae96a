"""What a store does with each of its collections every so often, in threads of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from hashlens.errors import HashlensError, UnavailableError
from search_service.storage.collection import Collection
from search_service.storage.counters import Counters
from search_service.storage.leases import Leases
from search_service.storage.store_config import StoreConfig

logger = logging.getLogger(__name__)

_CHECKPOINT_POLL_S: Final = 0.5


class Routines:
    """Says hello to the other replicas, makes checkpoints, has expired items removed.

    Parameters
    ----------
    config
        How often.
    collections
        Returns those of the store.
    leases
        Of files that others copy; those that ran out are ended.
    counters
        Told of checkpoints that failed.
    """

    def __init__(
        self,
        config: StoreConfig,
        collections: Callable[[], list[Collection]],
        leases: Leases,
        counters: Counters,
    ) -> None:
        self._config = config
        self._collections = collections
        self._leases = leases
        self._counters = counters
        self._closing = threading.Event()
        self._greet = threading.Event()
        self._threads = [
            threading.Thread(target=self._hello, name="hello", daemon=True),
            threading.Thread(target=self._checkpoint, name="checkpoint", daemon=True),
            threading.Thread(target=self._expire, name="expire", daemon=True),
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def greet(self) -> None:
        """Say hello at once."""
        self._greet.set()

    def close(self) -> None:
        """End."""
        self._closing.set()
        self._greet.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _hello(self) -> None:
        """Thread: say that this replica is alive, look at the log, end what nobody copies now."""
        config = self._config
        interval_s = min(config.hello_interval_s, config.replica_silence_s / 3)
        while not self._closing.is_set():
            for collection in self._collections():
                try:
                    collection.hello(config.redis_timeout_s)
                    collection.count_log(config.redis_timeout_s)
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
            for collection in self._collections():
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
            for collection in self._collections():
                try:
                    collection.expire(self._closing.is_set)
                except HashlensError as error:
                    # Redis has gone, or the collection: whoever looks after those warns.
                    logger.info("nothing of %s expires: %s", collection.spec.name, error)
