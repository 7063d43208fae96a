"""A write cut into calls, each in the form that the scripts read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from search_service.storage import layout
from search_service.storage.keys import Keys

CHUNK_ITEMS: Final = 256
"""Most items that one script call writes."""

CHUNK_BYTES: Final = 8 << 20
"""Most bytes that one script call writes, but for a single item that is larger."""


class Raw(NamedTuple):
    """One item of a write."""

    id: bytes
    record: bytes
    """As `layout.pack_put` or `layout.pack_delete` made it."""


def chunks_of(items: Sequence[Raw]) -> Iterator[Sequence[Raw]]:
    """Cut a write into calls; the same write is always cut in the same places."""
    first, size = 0, 0
    for position, item in enumerate(items):
        if position > first and (
            position - first == CHUNK_ITEMS or size + len(item.record) > CHUNK_BYTES
        ):
            yield items[first:position]
            first, size = position, 0
        size += len(item.record)
    if first < len(items):
        yield items[first:]


def body_of(keys: Keys, chunk: Sequence[Raw], n_buckets: int) -> tuple[list[str], bytes]:
    """Return the bucket keys of a chunk, and its items in the form that the scripts read."""
    ordinals: dict[int, bytes] = {}
    bucket_keys: list[str] = []
    parts: list[bytes] = []
    for item in chunk:
        bucket = layout.bucket_of(item.id, n_buckets)
        ordinal = ordinals.get(bucket)
        if ordinal is None:
            ordinal = ordinals[bucket] = len(ordinals).to_bytes(4, "little")
            bucket_keys += keys.buckets(bucket)
        parts += (ordinal, item.record)
    return bucket_keys, b"".join(parts)
