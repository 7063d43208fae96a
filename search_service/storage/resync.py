"""Brings collections back whose files the log cannot complete: from a peer, else from Redis."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hashlens.errors import (
    CancelledError,
    DataLossError,
    HashlensError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from search_service.storage import manifest, rebuild
from search_service.storage.catalog import Catalog
from search_service.storage.collection import Collection
from search_service.storage.copying import Copy
from search_service.storage.counters import Counters
from search_service.storage.data_dir import discard
from search_service.storage.failpoints import reach
from search_service.storage.keys import Meta, foreign
from search_service.storage.manifest import Manifest
from search_service.storage.peers import Peers
from search_service.storage.replicas import Identity

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 15.0
_POLL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class ResyncConfig:
    """What a `Resyncer` needs to know."""

    data_dir: Path
    redis_url: str = field(repr=False)
    timeout_s: float
    """The longest wait for one reply of Redis, in seconds."""
    segment_bytes: int
    silence_s: float
    """A peer that was silent for longer is not asked, in seconds."""
    patience_s: float
    """How long to wait for peers that do not serve or are silent, before Redis is asked, in
    seconds."""

    def directory(self, name: str) -> Path:
        """Return where a collection's files are."""
        return self.data_dir / "collections" / name

    def draft(self, name: str) -> Path:
        """Return where a collection's files are while they are being copied."""
        return self.data_dir / "collections" / f".copy-{name}"

    @property
    def quarantine(self) -> Path:
        """Where files go that a person may want to look at."""
        return self.data_dir / "quarantine"


class Resyncer:
    """One thread that looks after lost collections, one at a time, until each is back.

    Parameters
    ----------
    config
        See `ResyncConfig`.
    replica
        This replica.
    catalog
        What Redis says.
    peers
        How to reach other replicas; None if there is no way.
    counters
        Told what was brought back, and how.
    lost
        Returns the collections that need other files.
    replace
        Ends a collection, lets its second argument put the files in place, and serves those.
        Raises CancelledError if the collection has gone meanwhile.
    """

    def __init__(
        self,
        config: ResyncConfig,
        replica: Identity,
        catalog: Catalog,
        peers: Peers | None,
        counters: Counters,
        *,
        lost: Callable[[], list[Collection]],
        replace: Callable[[Collection, Callable[[], None]], None],
    ) -> None:
        self._config = config
        self._replica = replica
        self._catalog = catalog
        self._peers = peers
        self._counters = counters
        self._lost = lost
        self._replace = replace
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._current = ""
        self._stop = threading.Event()
        self._failing_since_s: dict[str, float] = {}
        self._went_on_from: dict[str, int] = {}
        self._said = ""
        self._thread = threading.Thread(target=self._run, name="resync", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Let it look at once."""
        self._wake.set()

    def forget(self, name: str) -> None:
        """Give up what is under way for a collection that was dropped."""
        with self._lock:
            if self._current == name:
                self._stop.set()  # Whoever is at it cleans up.
            else:
                shutil.rmtree(self._config.draft(name), ignore_errors=True)

    def close(self) -> None:
        """End; what was copied stays for the next start."""
        self._closing.set()
        with self._lock:
            self._stop.set()
        self._wake.set()
        if self._peers is not None:
            self._peers.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            lost = self._lost()
            for collection in lost:
                self._bring_back(collection)
            if lost:
                # Also after a success: what is lost again at once would be copied without end.
                self._closing.wait(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            else:
                self._wake.wait(_POLL_S)
                self._wake.clear()
                pause_s = _FIRST_PAUSE_S

    def _bring_back(self, collection: Collection) -> None:
        """Try once."""
        name = collection.spec.name
        with self._lock:
            if self._closing.is_set():
                return
            self._current, self._stop = name, threading.Event()
        try:
            self._resync(collection)
        except CancelledError:
            is_over = self._stop.is_set() or not collection.needs_files
            if is_over and not self._closing.is_set():
                shutil.rmtree(self._config.draft(name), ignore_errors=True)
        except Exception as error:
            # Whatever it is, reading goes on and the thread lives to try again.
            self._failing_since_s.setdefault(name, time.monotonic())
            expected = isinstance(error, HashlensError | OSError)
            said = error.message if isinstance(error, HashlensError) else str(error)
            collection.note(f"It is not replaced yet: {said}")
            if said != self._said:
                self._said = said
                trace = None if expected else error
                logger.warning("%s is not brought back yet: %s", name, said, exc_info=trace)
        else:
            self._failing_since_s.pop(name, None)
        finally:
            with self._lock:
                self._current = ""

    def _resync(self, collection: Collection) -> None:
        """Find files that the log goes on from, and have them served."""
        name = collection.spec.name
        meta = self._catalog.meta(name, self._config.timeout_s)
        if meta is None or meta.epoch != collection.epoch or not meta.is_active:
            raise PreconditionError(foreign(name, None if meta is None else meta.epoch))
        if self._is_followable(collection, meta):
            self._replace(collection, lambda: None)
            logger.info("the log of %s goes on from the files that are there", name)
            return
        if self._peers is not None and self._copied(collection, meta, self._peers):
            self._replace(collection, lambda: self._put_copy(collection))
            logger.info("%s is copied", name)
            return
        self._rebuild(collection, meta)

    def _is_followable(self, collection: Collection, meta: Meta) -> bool:
        """Tell whether the log goes on from the old files after all: a Redis may come and go.

        Only if a checkpoint has all that is being searched: loading the files cuts off the rest,
        which snapshots have mapped.
        """
        try:
            found = manifest.read(self._config.directory(meta.spec.name))
            is_all = found.seq == collection.snapshot().version
            if not is_all or self._went_on_from.get(meta.epoch) == found.seq:
                return False
            self._agree(meta, found)
        except HashlensError:
            return False
        # Once: if the log has a hole right behind, it leads nowhere.
        self._went_on_from[meta.epoch] = found.seq
        return True

    def _agree(self, meta: Meta, found: Manifest) -> None:
        """Have the log kept from where files end.

        Raises
        ------
        UnavailableError
            The log does not go on from there.
        """
        position = self._catalog.replicas.register(
            meta, self._replica, found.seq, self._config.timeout_s
        )
        first = position.first or position.seq + 1
        if found.seq:
            here = position.here
            goes_on = here is not None and zlib.crc32(here) == found.log_crc32
        else:
            goes_on = first == 1
        if not goes_on or position.seq < found.seq:
            raise UnavailableError(f"The log does not go on from version {found.seq}.")

    def _copied(self, collection: Collection, meta: Meta, peers: Peers) -> bool:
        """Copy from the first peer that serves; False if there is none to wait for.

        Raises
        ------
        HashlensError, OSError
            There are peers, but none has served yet.
        """
        name = meta.spec.name
        copy = Copy(self._config.draft(name), meta, peers, self._stop)
        leftover = copy.leftover()
        if leftover is not None:
            with contextlib.suppress(DataLossError, UnavailableError):
                self._agree(meta, leftover)
                copy.verify(leftover)
                return True
        found = self._catalog.replicas.look(
            meta, self._config.timeout_s, silence_s=self._config.silence_s
        )
        known = [i for i in found.infos if i.address and i.id != self._replica.id]
        others = [i for i in known if i.live]
        # After an outage of all, the first one back is not to lose what the next one brings.
        silent = [i for i in known if not i.live and i.checkpoint_version]
        troubles = [f"{i.address}: silent for {i.silent_ms / 1000:.0f} s" for i in silent]
        retry_after_s = 0.0
        for peer in sorted(others, key=lambda info: -info.checkpoint_version):
            collection.note(f"Its files are being copied from {peer.address}.")
            logger.info("copying %s from %s", name, peer.address)
            try:
                copy.fetch(peer.address, found.first or 0, lambda got: self._agree(meta, got))
                return True
            except CancelledError:
                raise
            except HashlensError as error:
                logger.info("%s does not serve %s: %s", peer.address, name, error.message)
                troubles.append(f"{peer.address}: {error.message}")
                if isinstance(error, OverloadedError):  # Who is busy will serve.
                    retry_after_s = max(retry_after_s, error.retry_after_s)
        said = "; ".join(troubles)
        if retry_after_s:
            raise OverloadedError(said, retry_after_s=retry_after_s)
        since_s = self._failing_since_s.get(name, time.monotonic())
        if troubles and time.monotonic() - since_s < self._config.patience_s:
            raise UnavailableError(said)
        return False

    def _put_copy(self, collection: Collection) -> None:
        """Let copied files take the place of the old ones."""
        name = collection.spec.name
        directory, draft = self._config.directory(name), self._config.draft(name)
        reach("copy.rename")
        if directory.exists():
            discard(directory)
        reach("copy.rename")
        draft.rename(directory)
        manifest.sync_directory(directory.parent)
        self._counters.n_copied += 1  # Before anybody can see that it is there.

    def _rebuild(self, collection: Collection, meta: Meta) -> None:
        """Make the files anew from what Redis holds, features from older files where they are."""
        name = meta.spec.name
        directory = self._config.directory(name)
        collection.note("Its files are being made anew from Redis.")
        logger.info("no peer has %s: making its files anew from Redis", name)
        old = directory
        if collection.snapshot().rows == 0:
            old = self._newest_quarantined(name) or directory
        generation = 0
        with contextlib.suppress(DataLossError):
            # A compaction that began before may still switch to the next one.
            generation = manifest.read(directory).generation + 2
        made = rebuild.rebuild(
            directory.parent,
            meta,
            url=self._config.redis_url,
            replica_id=self._replica.id,
            timeout_s=self._config.timeout_s,
            segment_bytes=self._config.segment_bytes,
            old=old,
            generation=generation,
            stop=self._stop,
        )

        def install() -> None:
            rebuild.install(made, directory)
            self._counters.n_rebuilt += 1

        try:
            self._replace(collection, install)
        finally:
            shutil.rmtree(made.directory, ignore_errors=True)
        shutil.rmtree(self._config.draft(name), ignore_errors=True)
        logger.info("%s is made anew; %d features are missing", name, made.n_missing_features)

    def _newest_quarantined(self, name: str) -> Path | None:
        """Return what was put aside last of a collection."""
        pattern = re.compile(re.escape(name) + r"-\d{8}T\d{6}Z-\d+-[0-9a-f]+")
        with contextlib.suppress(FileNotFoundError):
            found = [p for p in self._config.quarantine.iterdir() if pattern.fullmatch(p.name)]
            return max(found, key=lambda path: path.stat().st_ctime, default=None)
        return None
