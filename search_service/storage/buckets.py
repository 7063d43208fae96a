"""Reading all items of a collection from Redis, a few buckets at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import redis

from hashlens import codes
from hashlens.errors import CancelledError, DataLossError
from search_service.storage import layout, scripts
from search_service.storage.connection import Caller, run_script
from search_service.storage.keys import Keys, Meta, check_status

ID_END: Final = 0xFF
"""Stands behind each id; UTF-8 has no such byte."""

_ITEMS_AT_ONCE: Final = 2048
"""A script reads so many items, a millisecond or two: others wait for Redis meanwhile."""

_BUCKETS_AT_ONCE: Final = 48
_EXTRAS_AT_ONCE: Final = 64
"""Extras that one command reads, at most 5 MB."""

_CALLS_AT_ONCE: Final = 16


class Batch(NamedTuple):
    """The items of some buckets, in no order."""

    first_bucket: int
    counts: list[int]
    """Items of each bucket, from `first_bucket` on."""
    ids: bytes
    """UTF-8, `ID_END` behind each."""
    values: bytes
    """Sequence number (u64) and code of each."""
    extras: list[tuple[int, bytes]]
    """Position in the batch, and extras, of those that have any. They are read after the rest, so
    they may be of a later write than the item's sequence number says."""


class Looked(NamedTuple):
    """Some items at one moment."""

    seq: int
    """The collection's sequence number then."""
    n_items: int
    """How many items there were, as Redis counts."""
    items: list[tuple[bytes, bytes]]
    """Value and extras of each; empty where there are none."""


class BucketReader:
    """Reads the buckets of one collection. Thread-safe.

    Parameters
    ----------
    url
        Where Redis is.
    meta
        Of the collection.
    timeout_s
        The longest wait for one reply.
    """

    def __init__(self, url: str, meta: Meta, *, timeout_s: float) -> None:
        self._caller = Caller(url, timeout_s)
        self._meta = meta
        self._keys = Keys(meta.spec.name)
        self._value_bytes = 8 + codes.n_bytes(meta.spec.n_bits)
        self._deadline_s = 2 * timeout_s

    def batches(self, stop: threading.Event) -> Iterator[Batch]:
        """Read all buckets, each at a moment of its own; the next while one is worked on.

        Raises
        ------
        PreconditionError, NotFoundError
            Redis has another collection of the name, or none.
        UnavailableError
            Redis is away.
        DataLossError
            A bucket does not hold what this collection's buckets do.
        CancelledError
            `stop` was set.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="buckets") as ahead:
            bucket = 0
            coming = ahead.submit(self._read, bucket)
            while True:
                batch = coming.result()
                bucket += len(batch.counts)
                if stop.is_set():
                    raise CancelledError("Reading the buckets was stopped.")
                if bucket < self._meta.n_buckets:
                    coming = ahead.submit(self._read, bucket)
                yield batch
                if bucket >= self._meta.n_buckets:
                    return

    def look(self, ids: Sequence[bytes]) -> Looked:
        """Return what a few items are at one moment; raises as `batches`."""
        keys = [self._keys.meta]
        for item_id in ids:
            keys += self._keys.buckets(layout.bucket_of(item_id, self._meta.n_buckets))
        arguments = [self._meta.epoch, *ids]
        reply = self._caller.run(
            lambda client: run_script(client, scripts.LOOK, keys, arguments), self._deadline_s
        )
        check_status(self._meta.spec.name, reply)
        seq, n_items, *found = reply[1:]
        return Looked(int(seq), int(n_items), list(zip(found[::2], found[1::2], strict=True)))

    def close(self) -> None:
        """Close all connections."""
        self._caller.close()

    def _read(self, first: int) -> Batch:
        numbers = range(first, min(first + _BUCKETS_AT_ONCE, self._meta.n_buckets))
        keys = [self._keys.meta]
        for number in numbers:
            keys += self._keys.buckets(number)
        arguments = [self._meta.epoch, _ITEMS_AT_ONCE]
        reply = self._caller.run(
            lambda client: run_script(client, scripts.SCAN, keys, arguments), self._deadline_s
        )
        check_status(self._meta.spec.name, reply)
        counts, n_extras, ids, values = reply[1:]
        n = sum(counts)
        if ids.count(ID_END) != n or len(values) != n * self._value_bytes:
            raise DataLossError(
                f"Redis holds what is no item of {self._meta.spec.name} in its buckets {first} to "
                f"{first + len(counts) - 1}. Drop the collection and index again."
            )
        extras = self._extras(first, counts, n_extras, ids) if any(n_extras) else []
        return Batch(first, counts, ids, values, extras)

    def _extras(
        self, first: int, counts: Sequence[int], n_extras: Sequence[int], ids: bytes
    ) -> list[tuple[int, bytes]]:
        """Read what the items of some buckets have beside their embedding."""
        listed = ids.split(bytes((ID_END,)))
        calls: list[tuple[str, int, int]] = []
        for i, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0))):
            if n_extras[i]:
                key = self._keys.buckets(first + i)[1]
                calls += [
                    (key, lo, min(lo + _EXTRAS_AT_ONCE, stop))
                    for lo in range(start, stop, _EXTRAS_AT_ONCE)
                ]
        found: list[tuple[int, bytes]] = []
        for at in range(0, len(calls), _CALLS_AT_ONCE):
            some = calls[at : at + _CALLS_AT_ONCE]

            def ask(client: redis.Redis, some: Any = some) -> Any:
                with client.pipeline(transaction=False) as pipeline:
                    for key, lo, hi in some:
                        pipeline.hmget(key, listed[lo:hi])
                    return pipeline.execute()

            for (_, lo, _), replies in zip(
                some, self._caller.run(ask, self._deadline_s), strict=True
            ):
                found += [(lo + i, more) for i, more in enumerate(replies) if more]
        return found
