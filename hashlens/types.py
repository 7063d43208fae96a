"""The values that both services and their users speak of, as frozen dataclasses.

Nothing here knows protobuf: `hashlens.convert` maps these to and from `hashlens.v1`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import HashlensError

MAX_K = 100_000
"""The most hits one query may ask for."""

MAX_ID_BYTES = 1024
"""The longest id, in bytes of UTF-8."""

MAX_PAYLOAD_BYTES = 65_536
"""The largest payload of one item, in bytes."""

MAX_TAGS = 64
"""Most tags of one item, and of one condition of a filter."""

MAX_TAG_BYTES = 255
"""The longest tag, in bytes of UTF-8."""

MAX_DIM = 65_536
"""The widest feature, in numbers."""


_F32, _F16 = np.dtype("<f4"), np.dtype("<f2")


class FeatureDtype(enum.Enum):
    """How the numbers of a feature are stored and sent; always little-endian."""

    F32 = "f32"
    F16 = "f16"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype, little-endian."""
        return _F32 if self is FeatureDtype.F32 else _F16

    @property
    def n_bytes(self) -> int:
        """Bytes per number."""
        return self.numpy.itemsize

    @classmethod
    def of(cls, array: NDArray[Any]) -> FeatureDtype:
        """Return the member for an array's dtype; ValueError for any other."""
        for member in cls:
            if array.dtype == member.numpy:
                return member
        raise ValueError(f"a feature is float32 or float16, not {array.dtype}")


class Rank(enum.Enum):
    """What orders the answer."""

    AUTO = "auto"
    """Euclidean where the collection has features, else Hamming."""
    EUCLIDEAN = "euclidean"
    """Two stages: Euclidean distance inside the pool, ties by Hamming distance, then id."""
    HAMMING = "hamming"
    """The coarse stage alone: Hamming distance, ties by asymmetric distance, then id."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """An image as the model sees it: its code and, unless the use is codes only, its F7 feature."""

    code: bytes
    """Packed bits, see `hashlens.codes`; ``ceil(n_bits / 8)`` bytes."""
    n_bits: int
    """Code length, in bits."""
    model_id: str
    """Which weights and preprocessing made it."""
    feature: NDArray[Any] | None = None
    """F7: float32 or float16, shape ``[dim]``."""
    activations: NDArray[np.float32] | None = None
    """H before the threshold, shape ``[n_bits]``, in 0..1; |H - 0.5| is how sure each bit is."""

    @property
    def dim(self) -> int:
        """Width of the feature; 0 without one."""
        return 0 if self.feature is None else int(self.feature.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A model's last layer: the class scores are ``weights @ H + bias``."""

    weights: NDArray[np.float32]
    """Shape ``[n_classes, n_bits]``."""
    bias: NDArray[np.float32]
    """Shape ``[n_classes]``."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Classifier)
            and np.array_equal(self.weights, other.weights)
            and np.array_equal(self.bias, other.bias)
        )

    def __hash__(self) -> int:
        return hash((self.weights.tobytes(), self.bias.tobytes()))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an encoder says of its model."""

    model_id: str
    backbone: str
    n_bits: int
    dim: int
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    metrics: Mapping[str, float]
    licence: str
    """Licence of the data that the weights were trained on."""
    max_image_bytes: int
    max_image_pixels: int
    max_batch_items: int
    max_message_bytes: int
    feature_dtype: FeatureDtype
    """Number format of features when a request does not say."""
    device: str
    classifier: Classifier | None = None
    """Its last layer; None where it takes more than a megabyte."""


@dataclass(frozen=True, slots=True)
class EncodeTimings:
    """Where an encoder call spent its time, in nanoseconds."""

    decode_ns: int = 0
    """Bytes to pixels to tensor."""
    queue_ns: int = 0
    """Waiting for a batch."""
    inference_ns: int = 0
    """The batch's forward pass."""
    total_ns: int = 0
    batch_items: int = 0
    """How many images shared the forward pass."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image's embedding and what it cost."""

    embedding: Embedding
    timings: EncodeTimings


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


@dataclass(frozen=True, slots=True)
class TagFilter:
    """Which items count, by their tags; those that do not pass are not there for the search.

    All conditions must hold; one without tags does. Each takes at most `MAX_TAGS` tags, whose order
    means nothing.
    """

    any: tuple[str, ...] = ()
    """At least one of these."""
    all: tuple[str, ...] = ()
    """Every one of these."""
    none: tuple[str, ...] = ()
    """Not one of these."""

    @property
    def is_empty(self) -> bool:
        """Whether every item passes."""
        return not (self.any or self.all or self.none)


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to answer a query; the defaults suit a first look."""

    k: int = 10
    """Hits wanted, 1 to `MAX_K`."""
    max_hamming_bits: int | None = None
    """Pool = all rows within this Hamming distance. None: the smallest distance whose complete
    ball holds at least ``max(k, min_pool)`` rows."""
    min_pool: int = 5000
    """Rows the automatic threshold must gather, if there are as many: tables up to that size are
    searched exhaustively. For the order of F7 within crowded classes, a pool has to hold about a
    class, see ``docs/adr/0005``; `Client.audit` tells."""
    max_pool: int | None = None
    """Most rows the fine stage may look at; None for no cap. At least `k`. The first by (Hamming
    distance, asymmetric distance, age) stay, and the answer is no longer exact."""
    rank: Rank = Rank.AUTO
    with_payload: bool = True
    with_code: bool = False
    with_feature: bool = False
    with_explanation: bool = False
    min_version: int = 0
    """Wait until the replica has applied this version."""
    ignore_margins: bool = False
    """Leave the query's margins |H - 0.5| out of the order, as if it came without H."""
    packed: bool = False
    """Return the hits as `hashlens.packed.PackedHits`, which for many hits is several times faster.
    Not with `with_feature` or `with_explanation`."""
    filter: TagFilter | None = None
    """Search only among items that pass; None: among all."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model's classifier says of an activation or of a code."""

    class_index: int
    """Position of the likeliest class in `ReplyExplanation.classes`."""
    probability: float
    """Its share of the softmax, 0 to 1."""


@dataclass(frozen=True, slots=True)
class ExplainedBit:
    """What one bit says, by the classifier's weights from it, centred over the classes."""

    bit: int
    """Position in the code."""
    fires_for: tuple[int, ...]
    """Classes that the set bit speaks clearly for, strongest first; the first eight."""
    silent_for: tuple[int, ...]
    """Classes that the clear bit speaks for, likewise."""


@dataclass(frozen=True, slots=True)
class ReplyExplanation:
    """What is known of a query's code; hits have an `Explanation` each."""

    code: bytes
    """The query's code, packed."""
    certainty: tuple[float, ...] = ()
    """|H - 0.5| of the query for each bit, 0 to 0.5; empty if the query came without H."""
    prediction: Prediction | None = None
    """What the classifier says of the query: of H where it is there, else of the code. None where
    the classifier is not known."""
    bits: tuple[ExplainedBit, ...] = ()
    """Every bit of the code, ascending; empty where the classifier is not known."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty where the classifier is not known."""
    detail: str = ""
    """Why the classifier is not known; empty if it is."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a hit's code is as far as it is."""

    differing_bits: tuple[int, ...]
    """Positions where the codes differ, ascending."""
    certainty: tuple[float, ...]
    """|H - 0.5| of the query at those positions, 0 to 0.5; empty if the query came without H."""
    prediction: Prediction | None = None
    """What the classifier says of the hit's code; None where the classifier is not known."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer."""

    id: str
    hamming_bits: int
    distance: float | None
    """Euclidean distance between features; None when the coarse stage alone ranked."""
    payload: bytes = b""
    code: bytes | None = None
    feature: NDArray[Any] | None = None
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Where a search spent its time, in nanoseconds. Stages that did not run are 0."""

    wait_version_ns: int = 0
    """Until the replica had applied `min_version`."""
    encode: EncodeTimings = field(default_factory=EncodeTimings)
    """The encoder's share, for a query by image."""
    encode_call_ns: int = 0
    """The whole call to the encoder, as the search service saw it."""
    queue_ns: int = 0
    """Waiting for the kernels' executor."""
    coarse_ns: int = 0
    fine_ns: int = 0
    fetch_ns: int = 0
    """Ids, payloads, codes and features of the hits."""
    total_ns: int = 0
    batch_queries: int = 0
    """How many queries shared one pass over the codes."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """How an answer came about."""

    rows_scanned: int
    """Codes compared in the coarse stage: those of all alive rows, or fewer by an index."""
    threshold_bits: int
    """The Hamming distance within which rows formed the pool."""
    pool_size: int
    """Rows of the pool, after `max_pool`; the fine stage ranked those that have a feature."""
    pool_histogram: tuple[int, ...]
    """Alive rows at each Hamming distance 0..threshold_bits, before any cut."""
    pool_truncated: bool
    """Whether `max_pool` cut the ball."""
    rows_without_feature: int
    """Rows in the pool that could not be ranked because their feature is missing."""
    exact: bool
    """Whether the answer provably equals the two-stage definition with that threshold."""
    version: int
    """The version of the data that was searched."""
    timings: StageTimings = field(default_factory=StageTimings)
    margins_used: bool = False
    """Whether the query's margins |H - 0.5| had a say: they ordered rows of equal Hamming distance,
    or chose among them whom `max_pool` kept."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer to one query, best hit first."""

    hits: Sequence[Hit]
    """A tuple, or `hashlens.packed.PackedHits` if they were asked for."""
    receipt: Receipt
    explanation: ReplyExplanation | None = None
    """Present when it was asked for."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """A query answered twice, in two stages and exhaustively, on one version of the data."""

    answer: SearchResult
    """The two-stage answer."""
    exhaustive_hits: tuple[Hit, ...]
    """The `k` nearest, by (Euclidean distance, Hamming distance, id), of all items that have a
    feature; all of them if they are fewer. With payloads if asked for, and nothing else."""
    recall: float
    """Share of `exhaustive_hits` that `answer` has; 1 if there are none."""
    first_miss: int | None
    """Position in `exhaustive_hits` of the first that `answer` lacks; None if it lacks none."""


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
class BallPart:
    """A part of a ball, as it is streamed."""

    hits: tuple[Hit, ...]
    """In the order in which they were written; without distances between features."""
    receipt: Receipt | None
    """With the last part, and only then; its pool is the whole ball."""


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for: exactly one of the three."""

    image: bytes | None = None
    embedding: Embedding | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """Answer of a health probe."""

    target: str
    serving: bool
    detail: str
