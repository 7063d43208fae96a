"""Reading a collection's log, on a connection of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis

from search_service.storage import scripts
from search_service.storage.connection import connect, run_script
from search_service.storage.keys import Keys, check_status


class Position(NamedTuple):
    """Where a replica stands against the log."""

    seq: int
    """The newest write in Redis."""
    first: int | None
    """The oldest entry that is left, or None if there is none."""
    here: bytes | None
    """The log record at the replica's own sequence number, if it is left."""


class Batch(NamedTuple):
    """What a read brought."""

    entries: list[tuple[int, bytes]]
    """Sequence number and log record."""
    epoch: str | None
    """The collection's epoch right after the read. If it is still the reader's own, the entries
    are too: an epoch never comes back."""
    seq: int
    """The newest write in Redis right after the read."""
    here: bytes | None
    """The log record at `after_seq` right after the read, if it is left. If it is the one that the
    reader knows, the entries continue the reader's own log."""


class LogReader:
    """Follows the log of one collection. One thread reads; another may call `unblock`.

    Raises redis-py's errors; after one, use a new reader.

    Parameters
    ----------
    url
        Where Redis is.
    name
        The collection.
    timeout_s
        The longest wait for a reply, beyond the time that was asked to block.
    block_s
        How long a read waits for an entry.
    """

    def __init__(self, url: str, name: str, *, timeout_s: float, block_s: float) -> None:
        self._keys = Keys(name)
        self._block_ms = max(int(block_s * 1000), 1)
        self._client = connect(url, timeout_s + block_s)
        self._waker = connect(url, timeout_s)
        self._client_id: int | None = None
        self._wake_lock = threading.Lock()

    def register(self, epoch: str, replica_id: str, *, checkpoint_seq: int, seq: int) -> Position:
        """Tell Redis where this replica stands, so that the log is kept from there on.

        Raises
        ------
        PreconditionError, NotFoundError
            The collection is another one, gone, or about to be.
        """
        with contextlib.suppress(redis.ResponseError):
            self._client_id = int(self._client.client_id())
        reply = run_script(
            self._client,
            scripts.REGISTER,
            [self._keys.meta, self._keys.log, self._keys.replicas, self._keys.seen],
            [epoch, replica_id, checkpoint_seq, seq],
        )
        check_status(self._keys.name, reply)
        return position_of(reply)

    def read(self, after_seq: int, count: int) -> Batch:
        """Return up to `count` entries after a sequence number, waiting a little for the first."""
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xread({self._keys.log: f"{after_seq}-1"}, count, self._block_ms)
            pipeline.hmget(self._keys.meta, ["epoch", "seq"])
            # Asked after the entries: whoever replaced the data in between is found out.
            pipeline.xrange(self._keys.log, f"{after_seq}-1", f"{after_seq}-1")
            streams, (epoch, seq), here = pipeline.execute()
        entries: list[Any] = streams[0][1] if streams else []
        return Batch(
            [(seq_of(entry_id), fields[1]) for entry_id, fields in entries],
            None if epoch is None else epoch.decode(),
            int(seq or 0),
            here[0][1][b"r"] if here else None,
        )

    def probe(self) -> None:
        """Ask whether Redis takes writes: one that is read-only or full lets its log be read."""
        run_script(self._client, scripts.PROBE, [], [])

    def unblock(self) -> None:
        """Let a read that waits return at once, if the server allows it."""
        with self._wake_lock, contextlib.suppress(redis.RedisError):
            if self._client_id is not None:
                self._waker.client_unblock(self._client_id)

    def close(self) -> None:
        """Close the connections."""
        with self._wake_lock:
            self._client_id = None
            self._client.close()
            self._waker.close()


def position_of(reply: Sequence[Any]) -> Position:
    """Read the reply of `scripts.REGISTER`."""
    return Position(int(reply[1]), seq_of(reply[2]) if reply[2] else None, reply[3] or None)


def seq_of(entry_id: bytes) -> int:
    """Return the sequence number in a log entry's id."""
    return int(entry_id.partition(b"-")[0])
