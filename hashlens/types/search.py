"""Questions to a collection, and the answers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from hashlens.types.model import Embedding, EncodeTimings

MAX_K = 100_000
"""The most hits one query may ask for."""


class Rank(enum.Enum):
    """What orders the answer."""

    AUTO = "auto"
    """Euclidean where the collection has features, else Hamming."""
    EUCLIDEAN = "euclidean"
    """Two stages: Euclidean distance inside the pool, ties by Hamming distance, then id."""
    HAMMING = "hamming"
    """The coarse stage alone: Hamming distance, ties by asymmetric distance, then id."""


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
