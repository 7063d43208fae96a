"""The thread that follows a collection's log and applies it to the local files."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import zlib
from collections.abc import Callable
from typing import Final, NoReturn

import redis

from hashlens.errors import (
    DataLossError,
    HashlensError,
    InternalError,
    LimitError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from search_service.storage import layout
from search_service.storage.connection import translate
from search_service.storage.keys import foreign
from search_service.storage.local import LocalCollection
from search_service.storage.log import LogReader

logger = logging.getLogger(__name__)

BATCH_BYTES: Final = 8 << 20
"""About how much of the log one read brings, in bytes."""

BLOCK_S: Final = 0.5
"""How long a read waits for a write; also how long it may take to notice an emptied Redis."""

_MAX_COUNT = 1024
_FIRST_PAUSE_S = 0.05
_MAX_PAUSE_S = 2.0


class ResyncNeededError(PreconditionError):
    """The log and the local files have no common point from which to go on."""


class LostWritesError(ResyncNeededError):
    """Redis has lost writes that are here: an operator decides which of the two is right."""


class Follower:
    """Applies the log as it grows, reconnecting for as long as it takes.

    Parameters
    ----------
    local
        The files; this thread is their only writer.
    url
        Where Redis is.
    replica_id
        Under which the log is kept for this replica.
    timeout_s
        The longest wait for a reply of Redis.
    on_change
        Called when following begins, when Redis turns out to have another collection of the name,
        or none, and when other files are needed.
    """

    def __init__(
        self,
        local: LocalCollection,
        url: str,
        replica_id: str,
        *,
        timeout_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self._local = local
        self.url = url
        """Where Redis is."""
        self._replica_id = replica_id
        self.timeout_s = timeout_s
        """The longest wait for a reply of Redis."""
        self._on_change = on_change
        self._feature_bytes = layout.feature_bytes(local.spec)
        self.mean_bytes = float(layout.record_bytes(local.spec))
        """Of a log record in the last batch; at first, of one without a payload."""
        self._trouble: HashlensError | None = UnavailableError("Redis has not answered yet.")
        self._refusal: HashlensError | None = None
        self._known_seq = local.seq
        self._known_lock = threading.Lock()
        self._reader: LogReader | None = None
        self._stopping = threading.Event()
        self._settled = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"follow-{local.spec.name}", daemon=True
        )

    def on(self, local: LocalCollection) -> Follower:
        """Return another follower like this one, not started, for other files."""
        another = Follower(
            local,
            self.url,
            self._replica_id,
            timeout_s=self.timeout_s,
            on_change=self._on_change,
        )
        another.saw(self.known_seq)
        return another

    @property
    def trouble(self) -> HashlensError | None:
        """Why the log is not being followed; None while it is."""
        return self._trouble

    @property
    def refusal(self) -> HashlensError | None:
        """Why Redis takes no writes, though its log is being followed; None while it does."""
        return self._refusal

    @property
    def known_seq(self) -> int:
        """The newest write that Redis is known to have had; if it has less, it lost writes."""
        return max(self._known_seq, self._local.seq)

    def saw(self, seq: int) -> None:
        """Note a write that Redis has acknowledged."""
        with self._known_lock:
            self._known_seq = max(self._known_seq, seq)

    @property
    def is_lost(self) -> bool:
        """Whether the local files cannot go on from what Redis has."""
        return isinstance(self._trouble, ResyncNeededError)

    @property
    def needs_files(self) -> bool:
        """Whether other files are needed; then the thread has ended."""
        return self.is_lost and not isinstance(self._trouble, LostWritesError)

    @property
    def is_foreign(self) -> bool:
        """Whether Redis has another collection of the name, or none."""
        return isinstance(self._trouble, PreconditionError | NotFoundError) and not self.is_lost

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait_settled(self, deadline_s: float) -> None:
        """Wait until Redis has been compared with the files; the thread looks soon if it is away.

        One that comes back may be another one.
        """
        self._hurry.set()
        self._settled.wait(max(deadline_s, 0))

    def stop(self) -> None:
        """Ask the thread to end; `join` waits for it."""
        self._stopping.set()
        self._hurry.set()
        reader = self._reader
        if reader is not None:
            reader.unblock()

    def join(self) -> None:
        """Wait until the thread has ended; at most for the time-outs of Redis."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            try:
                self._local.index_ids()
                with contextlib.closing(self._connect()) as reader:
                    self._register(reader)
                    if self._trouble is None:
                        pause_s = _FIRST_PAUSE_S
                    while not self._stopping.is_set():
                        self._step(reader)
            except Exception as error:
                # Whatever it is, reading goes on and the thread lives to try again.
                self._note(error)
            if self.needs_files:
                return
            self._stopping.wait(_FIRST_PAUSE_S * random.uniform(0.5, 1.0))
            self._hurry.wait((pause_s - _FIRST_PAUSE_S) * random.uniform(0.5, 1.0))
            self._hurry.clear()
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _connect(self) -> LogReader:
        self._reader = LogReader(
            self.url, self._local.spec.name, timeout_s=self.timeout_s, block_s=BLOCK_S
        )
        return self._reader

    def _register(self, reader: LogReader) -> None:
        """Find the point in the log from which to go on.

        Raises
        ------
        ResyncNeededError
            There is none.
        """
        local = self._local
        # Before Redis is asked: it may get more while it answers.
        known_seq = self.known_seq
        position = reader.register(
            local.epoch, self._replica_id, checkpoint_seq=local.checkpoint_seq, seq=local.seq
        )
        if position.seq < known_seq:
            self._give_up(
                f"Redis went back from version {known_seq} to {position.seq}", LostWritesError
            )
        if position.here is not None and zlib.crc32(position.here) != local.log_crc32:
            self._give_up(f"Redis has another write as version {local.seq}", LostWritesError)
        if local.seq and position.here is None and position.first is not None:
            # Without it nothing shows that the log continues the files.
            self._give_up(f"the log, from version {position.first}, lacks that one")
        if position.seq > local.seq and (position.first is None or position.first > local.seq + 1):
            self._give_up(f"the log begins at version {position.first}, which is too late")
        self.saw(position.seq)
        # A full disk is not known to have room, nor an entry to be readable now, before the next
        # write is in the files.
        is_of_entries = isinstance(self._trouble, LimitError | DataLossError | InternalError)
        if not is_of_entries or position.seq == local.seq:
            self._recovered()
        self._settled.set()

    def _recovered(self) -> None:
        if self._trouble is not None:
            logger.info(
                "following the log of %s from version %d", self._local.spec.name, self._local.seq
            )
            self._trouble = None
            self._on_change()

    def _step(self, reader: LogReader) -> None:
        """Wait a little for writes, and apply them."""
        local = self._local
        count = min(max(int(BATCH_BYTES / self.mean_bytes), 1), _MAX_COUNT)
        known_seq = self.known_seq
        batch = reader.read(local.seq, count)
        if batch.epoch != local.epoch:
            raise PreconditionError(foreign(local.spec.name, batch.epoch))
        if batch.here is None:
            is_other = local.seq > 0 and bool(batch.entries)
        else:
            is_other = zlib.crc32(batch.here) != local.log_crc32
        if is_other or batch.seq < known_seq:
            # A demoted primary takes over another one's data, or stays behind, and keeps its
            # connections. Whether this is the one to follow shows on a new connection.
            raise UnavailableError("Redis has other data than before. Looking again.")
        self.saw(batch.seq)
        if not batch.entries:
            if batch.seq != local.seq:
                self._register(reader)
            else:
                self._probe(reader)
            return
        self._refusal = None
        records = [
            layout.unpack_record(seq, raw, local.spec.n_bits, self._feature_bytes)
            for seq, raw in batch.entries
        ]
        if [record.seq for record in records] != list(
            range(local.seq + 1, local.seq + 1 + len(records))
        ):
            self._give_up(f"the log has a hole behind version {local.seq}")
        local.apply(records)
        self._recovered()
        self.mean_bytes = sum(len(record.raw) for record in records) / len(records)

    def _probe(self, reader: LogReader) -> None:
        """Find out whether Redis takes writes."""
        try:
            reader.probe()
            self._refusal = None
        except redis.RedisError as error:
            refusal = translate(error)
            if not isinstance(refusal, LimitError):
                # Perhaps no primary any more: only a new connection finds the one that is.
                raise
            if self._refusal is None:
                logger.warning("%s takes no writes: %s", self._local.spec.name, refusal.message)
            self._refusal = refusal

    def _give_up(self, reason: str, kind: type[ResyncNeededError] = ResyncNeededError) -> NoReturn:
        advice = ""
        if kind is LostWritesError:
            advice = (
                " Bring back the Redis that has them. If restarting the search service does not "
                "mend it, drop the collection and index again, or take this replica's files away."
            )
        raise kind(
            f"This replica's files of {self._local.spec.name} end at version {self._local.seq}, "
            f"but {reason}. Searching goes on in what is there.{advice}"
        )

    def _note(self, error: Exception) -> None:
        """Remember why the log is not followed, and tell whom it concerns."""
        trouble, before = _explain(error), self._trouble
        self._trouble = trouble
        if isinstance(trouble, UnavailableError):
            self._settled.clear()
        else:
            self._settled.set()
        if before is None or before.message != trouble.message:
            expected = isinstance(error, HashlensError | redis.RedisError | OSError)
            logger.log(
                # It may just have been dropped; whoever is told finds out.
                logging.INFO if self.is_foreign else logging.WARNING,
                "not following the log of %s: %s",
                self._local.spec.name,
                trouble.message,
                exc_info=None if expected else error,
            )
        if self.is_foreign or self.is_lost:
            self._on_change()


def _explain(error: Exception) -> HashlensError:
    """Return the error of ours that says the same."""
    if isinstance(error, HashlensError):
        return error
    if isinstance(error, redis.RedisError):
        return translate(error)
    if isinstance(error, OSError):
        return LimitError(f"The search service cannot write its files ({error}). Mend the disk.")
    return InternalError(f"Applying the log failed: {error!r}")
