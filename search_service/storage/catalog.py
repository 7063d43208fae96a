"""The truth in Redis: which collections there are, and what is written to them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import redis

from hashlens import codes
from hashlens.errors import (
    DeadlineError,
    NotFoundError,
    PreconditionError,
)
from hashlens.types import CollectionSpec
from search_service.storage import layout, scripts
from search_service.storage.chunks import Raw, body_of, chunks_of
from search_service.storage.connection import Caller, RedisState, run_script
from search_service.storage.erasure import Eraser
from search_service.storage.keys import (
    COLLECTIONS,
    DROPPED,
    Keys,
    Meta,
    check_status,
    read_meta,
    restoring,
    text,
)
from search_service.storage.replicas import FORGET_S, SILENCE_S, ReplicaList

REQUEST_TTL_S: Final = 600
"""How long a request id is remembered, in seconds."""

_SWEEP_KEYS = 1000
_OLDEST_SERVER = (7, 0)


class Written(NamedTuple):
    """The answer to a write."""

    seq: int
    """The collection's sequence number after it."""
    n_items: int
    """How many items were written or removed."""


class Catalog:
    """Reads and writes collections in Redis. Thread-safe.

    Every method takes `deadline_s` and raises what `connection.Caller.run` raises.

    Parameters
    ----------
    url
        Where Redis is.
    attempt_timeout_s
        The longest wait for one reply.
    """

    def __init__(self, url: str, attempt_timeout_s: float) -> None:
        self._caller = Caller(url, attempt_timeout_s)
        self.replicas = ReplicaList(self._caller)
        """Who follows the logs."""
        self.eraser = Eraser(self._caller)
        """Erases from the logs."""

    @property
    def state(self) -> RedisState:
        """How the calls to Redis went."""
        return self._caller.state

    def log_entries(self, name: str, deadline_s: float) -> int:
        """Return how many entries a collection's log has."""
        return int(self._caller.run(lambda client: client.xlen(Keys(name).log), deadline_s))

    def close(self) -> None:
        """Close all connections."""
        self._caller.close()

    def durability(self, deadline_s: float) -> str:
        """Return what Redis does before it acknowledges: always, everysec, no, none or unknown.

        Raises
        ------
        PreconditionError
            The server is older than Redis 7.0.
        """

        def ask(client: redis.Redis) -> str:
            version = _server_version(client)
            if version is not None and version < _OLDEST_SERVER:
                found = ".".join(map(str, version))
                raise PreconditionError(f"Redis 7.0 or newer is needed; this one is {found}.")
            try:
                reply = client.config_get("appendonly", "appendfsync")
            except redis.ResponseError:
                return "unknown"
            settings = {text(key): text(value) for key, value in reply.items()}
            if settings.get("appendonly") == "no":
                return "none"
            return settings.get("appendfsync", "unknown")

        return self._caller.run(ask, deadline_s)

    def names(self, deadline_s: float) -> set[str]:
        """Return the names of all collections."""
        found = self._caller.run(lambda client: client.smembers(COLLECTIONS), deadline_s)
        return {name for name in map(text, found) if layout.is_safe_name(name)}

    def meta(self, name: str, deadline_s: float) -> Meta | None:
        """Return what Redis says of a collection, or None."""
        found = self._caller.run(lambda client: client.hgetall(Keys(name).meta), deadline_s)
        return read_meta(name, found) if found else None

    def dropped(self, epochs: Sequence[str], deadline_s: float) -> set[str]:
        """Return those of the epochs that were dropped on purpose."""
        if not epochs:
            return set()
        found = self._caller.run(lambda client: client.hmget(DROPPED, list(epochs)), deadline_s)
        return {epoch for epoch, when in zip(epochs, found, strict=True) if when is not None}

    def create(self, spec: CollectionSpec, deadline_s: float) -> Meta:
        """Make a collection unless it is there, and return what is there then.

        A drop of the same name that was interrupted is completed first.
        """
        give_up = time.monotonic() + deadline_s
        keys = Keys(spec.name)
        fields = {
            "format": layout.FORMAT_VERSION,
            "model_id": spec.model_id,
            "n_bits": spec.n_bits,
            "dim": spec.dim,
            "feature_dtype": spec.feature_dtype.value,
            "expected_rows": spec.expected_rows,
            "epoch": str(uuid.uuid4()),
            "n_buckets": layout.n_buckets_for(spec.expected_rows),
        }
        arguments = [part for item in fields.items() for part in item]
        while True:
            # The name goes in before and after: before, so that a crash leaves no collection that
            # nobody finds; after, because an older drop may be taking the name out in between.
            self._add_name(spec.name, give_up - time.monotonic())
            reply = self._script(scripts.CREATE, [keys.meta], arguments, give_up - time.monotonic())
            meta = read_meta(spec.name, dict(zip(reply[::2], reply[1::2], strict=True)))
            if meta.is_restoring:
                raise PreconditionError(restoring(spec.name))
            if not meta.is_dropping:
                self._add_name(spec.name, give_up - time.monotonic())
                return meta
            self.finish_drop(meta, give_up - time.monotonic())

    def drop(self, name: str, deadline_s: float) -> str | None:
        """Remove a collection; return its epoch, or None if there is no such collection."""
        give_up = time.monotonic() + deadline_s
        meta = self.meta(name, deadline_s)
        if meta is None:
            self._remove_name(name, give_up - time.monotonic())
            return None
        # By epoch: if this is tried again, it must not hit a collection made in the meantime.
        self._script(
            scripts.DROP_BEGIN, [Keys(name).meta], [meta.epoch], give_up - time.monotonic()
        )
        self.finish_drop(meta, give_up - time.monotonic())
        return meta.epoch

    def finish_drop(self, meta: Meta, deadline_s: float) -> None:
        """Complete a drop that has begun.

        Every step may be repeated, by anyone: what a crash leaves is completed by the next call.
        """
        give_up = time.monotonic() + deadline_s
        keys = Keys(meta.spec.name)
        self.record_drop(meta.spec.name, meta.epoch, deadline_s)
        step = _SWEEP_KEYS // 2
        for first in range(0, meta.n_buckets, step):
            numbers = range(first, min(first + step, meta.n_buckets))
            doomed = [key for number in numbers for key in keys.buckets(number)]
            arguments = [keys.meta, *doomed]
            self._script(scripts.DROP_KEYS, arguments, [meta.epoch], give_up - time.monotonic())
        doomed = [keys.meta, keys.log, keys.replicas, keys.seen]
        self._script(scripts.DROP_END, doomed, [meta.epoch], give_up - time.monotonic())
        self._remove_name(meta.spec.name, give_up - time.monotonic())

    def record_drop(self, name: str, epoch: str, deadline_s: float) -> None:
        """Let all replicas know that an epoch was dropped on purpose."""
        note = f"{name} {time.time():.0f}"
        self._script(scripts.RECORD_DROP, [DROPPED], [epoch, note], deadline_s)

    def put(
        self,
        meta: Meta,
        items: Sequence[Raw],
        *,
        request_id: str,
        deadline_s: float,
        known_seq: int = 0,
        content: bytes | None = None,
    ) -> Written:
        """Write items, replacing those whose ids are there.

        Parameters
        ----------
        meta
            Of the collection.
        items
            What to write.
        request_id
            Names this write.
        deadline_s
            The longest to wait, in seconds.
        known_seq
            What Redis has had already: if it has less now, it has lost writes and gets no more.
        content
            What the request id is tied to; None: the items.

        Raises
        ------
        InvalidInputError
            The request id was used for something else.
        PreconditionError
            Redis has another epoch of the collection, or none, or it has lost writes.
        NotFoundError
            The collection is being dropped.
        DeadlineError
            Only a part is written.
        """
        return self._write(scripts.PUT, meta, items, request_id, deadline_s, known_seq, content)

    def delete(
        self,
        meta: Meta,
        items: Sequence[Raw],
        *,
        request_id: str,
        deadline_s: float,
        known_seq: int = 0,
    ) -> Written:
        """Remove items; raises as `put`."""
        return self._write(scripts.DELETE, meta, items, request_id, deadline_s, known_seq)

    def expire(
        self, meta: Meta, items: Sequence[Raw], deadline_s: float, known_seq: int = 0
    ) -> Written:
        """Remove those of the items that are still what they were, and have expired.

        Whether they have, the server's clock says. Repeating it, or doing it on several replicas at
        once, does no harm.

        Parameters
        ----------
        meta
            Of the collection.
        items
            At most `chunks.CHUNK_ITEMS`; `record` is as `layout.pack_expire` made it.
        deadline_s
            The longest to wait, in seconds.
        known_seq
            As for `put`.

        Raises
        ------
        PreconditionError
            Redis has another epoch of the collection, or none, or it has lost writes.
        NotFoundError
            The collection is being dropped.
        """
        keys = Keys(meta.spec.name)
        buckets, body = body_of(keys, items, meta.n_buckets)
        reply = self._script(
            scripts.EXPIRE,
            [keys.meta, keys.log, *buckets],
            [meta.epoch, body, known_seq],
            deadline_s,
        )
        check_status(meta.spec.name, reply)
        return Written(int(reply[1]), int(reply[2]))

    def trim(
        self,
        meta: Meta,
        replica_id: str,
        seq: int,
        budget_entries: int,
        deadline_s: float,
        *,
        silence_s: float = SILENCE_S,
        forget_s: float = FORGET_S,
    ) -> str:
        """Move a replica's checkpoint and trim the log behind the slowest; return the status.

        Parameters
        ----------
        meta
            Of the collection.
        replica_id, seq
            Which replica, and up to where its files are safe.
        budget_entries
            Most entries to keep for slower replicas.
        deadline_s
            The longest to wait, in seconds.
        silence_s, forget_s
            The log does not wait for a replica that was silent for longer, and one that was silent
            for much longer is forgotten, in seconds.
        """
        keys = Keys(meta.spec.name)
        arguments = [meta.epoch, replica_id, seq, budget_entries]
        arguments += [int(silence_s * 1000), int(forget_s * 1000)]
        names = [keys.meta, keys.log, keys.replicas, keys.seen]
        return text(self._script(scripts.TRIM, names, arguments, deadline_s)[0])

    def _write(
        self,
        script: str,
        meta: Meta,
        items: Sequence[Raw],
        request_id: str,
        deadline_s: float,
        known_seq: int,
        content: bytes | None = None,
    ) -> Written:
        """Send a write in chunks, each of them atomic and repeatable."""
        give_up = time.monotonic() + deadline_s
        keys = Keys(meta.spec.name)
        # Over all chunks, so that a request that merely begins like another is not taken for it.
        hasher = hashlib.blake2b(content or b"", digest_size=16)
        for item in items if content is None else ():
            hasher.update(item.record)
        digest = hasher.digest()
        code_bytes = codes.n_bytes(meta.spec.n_bits)
        seq, count = 0, 0
        for number, chunk in enumerate(chunks_of(items)):
            if number and time.monotonic() > give_up:
                raise DeadlineError(
                    f"The time was over after {count} of {len(items)} items. To write the rest, "
                    "repeat the call with the same request id and more time, or send fewer at once."
                )
            buckets, body = body_of(keys, chunk, meta.n_buckets)
            request = keys.request(meta.epoch, f"{request_id}:{number}")
            reply = self._script(
                script,
                [keys.meta, keys.log, request, *buckets],
                [meta.epoch, digest, REQUEST_TTL_S, body, code_bytes, max(known_seq, seq)],
                give_up - time.monotonic(),
            )
            try:
                check_status(meta.spec.name, reply)
            except PreconditionError:
                if self.dropped([meta.epoch], give_up - time.monotonic()):
                    raise NotFoundError(f"The collection {meta.spec.name} was dropped.") from None
                raise
            seq, count = int(reply[1]), count + int(reply[2])
        return Written(seq, count)

    def _add_name(self, name: str, deadline_s: float) -> None:
        self._caller.run(lambda client: client.sadd(COLLECTIONS, name), deadline_s)

    def _remove_name(self, name: str, deadline_s: float) -> None:
        """Take a name out, unless the collection is there again."""

        def remove(client: redis.Redis) -> None:
            client.srem(COLLECTIONS, name)
            if client.exists(Keys(name).meta):
                client.sadd(COLLECTIONS, name)

        self._caller.run(remove, deadline_s)

    def _script(
        self, source: str, keys: Sequence[str], arguments: Sequence[Any], deadline_s: float
    ) -> Any:
        return self._caller.run(
            lambda client: run_script(client, source, keys, arguments), deadline_s
        )


def _server_version(client: redis.Redis) -> tuple[int, ...] | None:
    """Return the version that the server is compatible with, or None if it does not say."""
    try:
        version = str(client.info("server")["redis_version"])
        return tuple(int(part) for part in version.split(".")[:2])
    except (redis.ResponseError, KeyError, ValueError):
        return None
