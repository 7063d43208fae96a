"""What Redis has to do with erasing: the request to all replicas, the log, Redis' own file."""

from __future__ import annotations

import contextlib
import time
from typing import Final

import redis

from hashlens.errors import DeadlineError, HashlensError
from search_service.storage import layout, scripts
from search_service.storage.connection import Caller, run_script
from search_service.storage.keys import Keys, Meta, check_status, text

_DEFAULT_FILLING_BYTES: Final = 1 << 16
_MAX_FILLING_BYTES: Final = 1 << 20
_NODE_BYTES: Final = "stream-node-max-bytes"
_POLL_S: Final = 0.05
_MAX_POLL_S: Final = 1.0


class Eraser:
    """Erases from the log and from Redis' own file. Thread-safe.

    Every method takes `deadline_s` and raises what `connection.Caller.run` raises.

    Parameters
    ----------
    caller
        Runs the calls.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def ask(self, meta: Meta, known_seq: int, deadline_s: float) -> int:
        """Ask all replicas to erase what is dead by now; return the version that this is.

        A stream keeps the bytes of trimmed entries as long as their node has others. So the mark is
        as long as a node: what comes before is never in one node with it.

        Parameters
        ----------
        meta
            Of the collection.
        known_seq
            What Redis has had already.
        deadline_s
            The longest to wait, in seconds.

        Raises
        ------
        PreconditionError, NotFoundError
            Redis has another collection of the name, or none, or it has lost writes.
        """
        give_up = time.monotonic() + deadline_s
        node_bytes = self._node_bytes(deadline_s)
        filling = node_bytes or _DEFAULT_FILLING_BYTES
        keys = Keys(meta.spec.name)
        arguments = [meta.epoch, layout.pack_mark(filling), known_seq]

        def ask(client: redis.Redis) -> int:
            reply = run_script(client, scripts.MARK, [keys.meta, keys.log], arguments)
            check_status(meta.spec.name, reply)
            return int(reply[1])

        return self._caller.run(ask, give_up - time.monotonic())

    def asked(self, names: list[str], deadline_s: float) -> dict[str, tuple[str, int]]:
        """Return, for each collection that is there, its epoch and what was asked for last."""

        def look(client: redis.Redis) -> list[list[bytes | None]]:
            with client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.hmget(Keys(name).meta, ["epoch", "erase_seq"])
                return list(pipeline.execute())

        found = self._caller.run(look, deadline_s) if names else []
        return {
            name: (text(epoch), int(seq or 0))
            for name, (epoch, seq) in zip(names, found, strict=True)
            if epoch is not None
        }

    def rewrite(self, deadline_s: float) -> bool:
        """Have Redis write its append-only file anew; tell whether it has, and holds no old bytes.

        False where there is none, where the server does not let itself be asked, where it takes
        longer than `deadline_s`, and where a stream's nodes are so long that trimmed entries may
        live on in them.
        """
        give_up = time.monotonic() + deadline_s
        try:
            if self._node_bytes(deadline_s) is None:
                return False
            # One that was under way when the log was trimmed may have read the log before.
            while not self._caller.run(_begin_rewrite, give_up - time.monotonic()):
                self._wait_rewritten(give_up)
            return self._wait_rewritten(give_up)
        except (HashlensError, redis.ResponseError):
            return False

    def _wait_rewritten(self, give_up: float) -> bool:
        """Wait until no rewriting is under way; tell whether the last went well."""
        pause_s = _POLL_S
        while True:
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                raise DeadlineError("Redis still rewrites its append-only file.")
            found = self._caller.run(lambda client: client.info("persistence"), left_s)
            if not found.get("aof_enabled"):
                return False
            if not (found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"]):
                return bool(found["aof_last_bgrewrite_status"] == "ok")
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_POLL_S)

    def _node_bytes(self, deadline_s: float) -> int | None:
        """Return how long a stream's node gets, in bytes; None if not known, or too long."""

        def ask(client: redis.Redis) -> int:
            with contextlib.suppress(redis.ResponseError):
                reply = client.config_get(_NODE_BYTES)
                return int({text(k): text(v) for k, v in reply.items()}.get(_NODE_BYTES, 0))
            return 0

        found = self._caller.run(ask, deadline_s)
        return found if 0 < found <= _MAX_FILLING_BYTES else None


def _begin_rewrite(client: redis.Redis) -> bool:
    """Ask for a rewriting that begins now or later; tell whether it will."""
    try:
        client.bgrewriteaof()
    except redis.ResponseError as error:
        if "in progress" in str(error):
            return False
        raise
    return True
