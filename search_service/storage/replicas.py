"""Which replicas a collection has, where they stand, and what the log is kept for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import redis

from hashlens.types import ReplicaInfo
from search_service.storage import scripts
from search_service.storage.connection import Caller, run_script
from search_service.storage.keys import Keys, Meta, check_status, text
from search_service.storage.log import Position, position_of, seq_of

SILENCE_S: Final = 300.0
"""The log waits for a replica that was silent for at most so long, in seconds."""

FORGET_S: Final = 86_400.0
"""A replica that was silent for longer is not a replica any more, in seconds."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a replica is to the others."""

    id: str
    """UUID of its data directory."""
    address: str = ""
    """host:port where others reach it; empty if they cannot."""


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How long the log is kept for others."""

    budget_bytes: int
    """Most bytes for slower replicas."""
    silence_s: float = SILENCE_S
    """It waits for a replica that was silent for at most so long, in seconds."""
    forget_s: float = FORGET_S
    """A replica that was silent for longer is forgotten, in seconds."""


class Replicas(NamedTuple):
    """All replicas of a collection, as Redis knows them."""

    seq: int
    """The newest write in Redis."""
    first: int | None
    """The oldest entry that is left of the log, or None if there is none."""
    infos: list[ReplicaInfo]
    """By id."""


class ReplicaList:
    """Reads and writes what Redis knows of replicas. Thread-safe.

    Every method takes `deadline_s` and raises what `connection.Caller.run` raises; and
    PreconditionError or NotFoundError if the collection is another one, gone, or about to be.

    Parameters
    ----------
    caller
        Runs the calls.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def hello(self, meta: Meta, replica: Identity, erased_seq: int, deadline_s: float) -> None:
        """Say that a replica is alive."""
        keys = Keys(meta.spec.name)
        arguments = [meta.epoch, replica.id, erased_seq, replica.address]
        self._run(meta, scripts.HELLO, [keys.meta, keys.seen], arguments, deadline_s)

    def register(self, meta: Meta, replica: Identity, seq: int, deadline_s: float) -> Position:
        """Have the log kept from a version on for a replica that is about to have it."""
        keys = Keys(meta.spec.name)
        arguments = [meta.epoch, replica.id, seq, seq]
        names = [keys.meta, keys.log, keys.replicas, keys.seen]
        return position_of(self._run(meta, scripts.REGISTER, names, arguments, deadline_s))

    def look(self, meta: Meta, deadline_s: float, *, silence_s: float = SILENCE_S) -> Replicas:
        """Return all replicas; those that were silent for longer than `silence_s` are not live."""
        keys = Keys(meta.spec.name)
        names = [keys.meta, keys.log, keys.replicas, keys.seen]
        reply = self._run(meta, scripts.REPLICAS, names, [meta.epoch], deadline_s)
        _, seq, first_id, seconds, microseconds, replicas, seen = reply
        now_ms = int(seconds) * 1000 + int(microseconds) // 1000
        first = seq_of(first_id) if first_id else None
        positions = _pairs(replicas)
        heard = _pairs(seen)
        infos = []
        for replica_id in sorted(positions | heard):
            checkpoint = int(positions.get(replica_id, "0"))
            when, erased, address = heard.get(replica_id, "0 0 ").split(" ", 2)
            silent_ms = max(now_ms - int(when), 0)
            has_place = first is None or max(checkpoint, 1) >= first
            infos.append(
                ReplicaInfo(
                    id=replica_id,
                    address=address,
                    checkpoint_version=checkpoint,
                    erased_version=int(erased),
                    silent_ms=silent_ms,
                    live=has_place and silent_ms <= silence_s * 1000,
                )
            )
        return Replicas(int(seq), first, infos)

    def _run(
        self, meta: Meta, script: str, keys: list[str], arguments: list[Any], deadline_s: float
    ) -> Any:
        def run(client: redis.Redis) -> Any:
            return run_script(client, script, keys, arguments)

        reply = self._caller.run(run, deadline_s)
        check_status(meta.spec.name, reply)
        return reply


def _pairs(flat: list[bytes]) -> dict[str, str]:
    """Return a hash from its flat form."""
    return {text(key): text(value) for key, value in zip(flat[::2], flat[1::2], strict=True)}
