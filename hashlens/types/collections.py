"""Collections, the items in them, and what becomes of both."""

from __future__ import annotations

from dataclasses import dataclass

from hashlens.errors import HashlensError
from hashlens.types.model import Embedding, FeatureDtype

MAX_ID_BYTES = 1024
"""The longest id, in bytes of UTF-8."""

MAX_PAYLOAD_BYTES = 65_536
"""The largest payload of one item, in bytes."""

MAX_TAG_BYTES = 255
"""The longest tag, in bytes of UTF-8."""

MAX_TAGS = 64
"""Most tags of one item, and of one condition of a filter."""


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What a collection is bound to when it is made; never changed after."""

    name: str
    """1 to 64 of a-z, 0-9, ``_`` and ``-``, beginning with a letter or digit."""
    model_id: str
    n_bits: int
    dim: int
    """Width of the feature; 0 for a collection of codes only."""
    feature_dtype: FeatureDtype = FeatureDtype.F16
    expected_rows: int = 1_000_000
    """Sizes the Redis buckets; more rows still work, they take more memory each."""


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """A collection as one search replica sees it."""

    spec: CollectionSpec
    epoch: str
    """UUID of this incarnation; a new one after drop and create."""
    version: int
    """Sequence number of the last write this replica has applied."""
    n_items: int
    """Items that a search can find."""
    n_dead_rows: int
    """Rows of replaced and deleted items, not yet compacted away."""
    checkpoint_version: int
    """Everything up to here is safe in this replica's files."""
    durability: str
    """What Redis does before it acknowledges: ``always``, ``everysec``, ``no``, ``none``, or
    ``unknown`` while Redis is away."""
    writable: bool
    detail: str
    """Why it is not writable; else empty."""
    replica_id: str = ""
    """Of the replica that answered, a UUID."""
    n_missing_features: int = 0
    """Items that only coarse searches find, because this replica lacks their feature."""
    erased_version: int = 0
    """Rows that were dead at this version are gone from this replica's files."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One replica of a collection, as Redis knows it."""

    id: str
    """UUID of its data directory."""
    address: str
    """host:port where others reach it; empty if it said none."""
    checkpoint_version: int
    """Everything up to here is safe in its files; the log is kept from here on."""
    erased_version: int
    """Rows that were dead at this version are gone from its files."""
    silent_ms: int
    """How long ago it was heard of, in milliseconds."""
    live: bool
    """Whether the log still waits for it; one that was silent for too long copies files anew."""


@dataclass(frozen=True, slots=True)
class ErasedFile:
    """A file that held rows of replaced or deleted items."""

    path: str
    """Below the replica's data directory."""
    length_bytes: int
    gone: bool
    """Whether its bytes are. Those that a search still reads go when that search ends."""


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What became of the bytes of replaced and deleted items."""

    version: int
    """Rows that were dead at this version are gone from the files of the answering replica."""
    n_rows_erased: int
    files: tuple[ErasedFile, ...]
    """Those that held them."""
    log_begins_after: int
    """What was written up to here is not in the log in Redis any more."""
    redis_rewritten: bool
    """Whether Redis has rewritten its own file since; false where that cannot be told."""
    replicas: tuple[ReplicaInfo, ...]
    """All that Redis knows, each with what it has erased."""
    complete: bool
    """Whether all of this holds for every live replica and for Redis."""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a comparison of Redis with a replica's files found."""

    version: int
    """At which both were compared; after a repair, the one at which they were compared again."""
    n_catalog_items: int
    """Items in Redis."""
    n_array_items: int
    """Items in the files."""
    differences: tuple[str, ...]
    """A line for each, the first thousand."""
    n_differences: int
    n_repaired: int
    """How many of them are gone since."""
    digest: bytes
    """Of all items of the replica, 16 bytes: two replicas at one version have the same. Empty where
    the files do not hold together."""


@dataclass(frozen=True, slots=True)
class Item:
    """What a collection holds: exactly one of `embedding` and `image` when it is written."""

    id: str
    embedding: Embedding | None = None
    image: bytes | None = None
    payload: bytes = b""
    tags: tuple[str, ...] = ()
    """Words to filter by; their order means nothing."""
    expires_unix_ms: int = 0
    """When it removes itself, in milliseconds since 1970-01-01 UTC; 0: never."""


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """One item of a batch that was refused."""

    index: int
    """Its position in the batch."""
    id: str
    error: HashlensError


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What became of a write."""

    version: int
    """The collection's sequence number after it; pass it as `min_version` to read it."""
    n_written: int
    failures: tuple[ItemFailure, ...] = ()

    def raise_for_failures(self) -> None:
        """Raise the first failure's error, if there is one."""
        if self.failures:
            raise self.failures[0].error


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """What became of a delete."""

    version: int
    n_deleted: int
    """How many of the ids were there."""
