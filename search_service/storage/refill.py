"""Filling Redis with a collection that comes from a backup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hashlens import codes
from hashlens.errors import DataLossError
from hashlens.types import CollectionSpec
from search_service.storage import layout, scripts
from search_service.storage.connection import Caller, run_script
from search_service.storage.keys import COLLECTIONS, Keys, check_status

FILL_ITEMS: Final = 512
"""Most items that one script call puts in."""

FILL_BYTES: Final = 4 << 20
"""Most bytes that one script call puts in, but for a single item that is larger."""


class Refill:
    """Puts a collection into Redis that nobody sees before `finish`.

    Until then its state is ``restoring``: nobody reads, writes or creates it. What a crash leaves
    is removed by `Catalog.drop`. Every call may be repeated.

    Parameters
    ----------
    url
        Where Redis is.
    spec, epoch, n_buckets
        Of the collection; the epoch must be a new one.
    attempt_timeout_s
        The longest wait for one reply.
    deadline_s
        The longest that one call may take.
    """

    def __init__(
        self,
        url: str,
        spec: CollectionSpec,
        *,
        epoch: str,
        n_buckets: int,
        attempt_timeout_s: float,
        deadline_s: float,
    ) -> None:
        self._caller = Caller(url, attempt_timeout_s)
        self._spec = spec
        self._keys = Keys(spec.name)
        self._epoch = epoch
        self._n_buckets = n_buckets
        self._deadline_s = deadline_s
        self._code_bytes = codes.n_bytes(spec.n_bits)

    def close(self) -> None:
        """Close all connections."""
        self._caller.close()

    def begin(self) -> None:
        """Take the name.

        Raises
        ------
        PreconditionError
            Redis has a collection of the name.
        """
        spec = self._spec
        fields = {
            "format": layout.FORMAT_VERSION,
            "model_id": spec.model_id,
            "n_bits": spec.n_bits,
            "dim": spec.dim,
            "feature_dtype": spec.feature_dtype.value,
            "expected_rows": spec.expected_rows,
            "n_buckets": self._n_buckets,
        }
        self._add_name()
        arguments = [self._epoch, *[part for item in fields.items() for part in item]]
        self._run(scripts.RESTORE_BEGIN, [self._keys.meta], arguments)

    def fill(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Put items in: ids, and entries as they are in the export.

        Raises
        ------
        PreconditionError, NotFoundError
            Somebody else has taken the name, or removes it.
        """
        keys = [self._keys.meta]
        ordinals: dict[int, bytes] = {}
        parts: list[bytes] = []
        for item_id, raw in items:
            bucket = layout.bucket_of(item_id, self._n_buckets)
            ordinal = ordinals.get(bucket)
            if ordinal is None:
                ordinal = ordinals[bucket] = len(ordinals).to_bytes(4, "little")
                keys += self._keys.buckets(bucket)
            parts += (ordinal, raw)
        arguments = [self._epoch, self._code_bytes, b"".join(parts)]
        self._run(scripts.RESTORE_FILL, keys, arguments)

    def finish(self, seq: int, n_items: int) -> None:
        """Let everyone see it.

        Raises
        ------
        DataLossError
            Not all items are there.
        """
        arguments = [self._epoch, seq, n_items, first_record(self._epoch, seq)]
        reply = self._run(scripts.RESTORE_END, [self._keys.meta, self._keys.log], arguments)
        if int(reply[1]) != n_items:
            raise DataLossError(
                f"Redis has {int(reply[1])} items of {self._spec.name}, not {n_items}."
            )
        # Before and after, as `Catalog.create` does.
        self._add_name()

    def _add_name(self) -> None:
        name = self._spec.name
        self._caller.run(lambda client: client.sadd(COLLECTIONS, name), self._deadline_s)

    def _run(self, source: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        reply = self._caller.run(
            lambda client: run_script(client, source, keys, arguments), self._deadline_s
        )
        check_status(self._spec.name, reply)
        return reply


def first_record(epoch: str, seq: int) -> bytes:
    """Return the log record by which a replica knows a restored log for its own.

    It removes an item that never was, its id is the epoch's text: no two logs begin alike.
    """
    return layout.pack_delete(epoch.encode()) if seq else b""
