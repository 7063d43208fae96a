"""Every query ranks every image, in each of several ways; each ranking is scored on the spot.

One ranking of a query is one sort of 64-bit keys. From the top, a key holds what is ranked by, then
the image's row, which breaks ties as ids do where they are numbered by row, and in the lowest bit
whether the image is relevant. So sorting the keys gives order and relevance at once: a full ranking
of 60,000 images takes well under a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from encoder_service.evaluation import baselines, near_ties
from encoder_service.evaluation.encodings import Encodings
from hashlens import codes, evaluation
from hashlens.cpus import usable_cpus
from hashlens.ties import TieGroups

RANKINGS: Final = {
    "coarse": "Hamming distance of the codes, ties in the order of the images",
    "coarse_soft": "the same, ties by how sure the query is of the bits that differ",
    "two_stage": "F7 within the smallest complete Hamming ball of at least 1000 images; "
    "over the full list, the images outside follow in coarse order",
    "exhaustive": "Euclidean distance of F7 to every image: the ceiling",
    "lsh": "Hamming distance of as many random hyperplanes on the same F7: the floor",
    "itq": "Hamming distance of as many bits that ITQ learns from the same F7, without labels",
}
"""Name -> what it ranks by, in the order they are shown."""

MIN_POOL = 1000
"""Images the automatic threshold gathers: fewer than the search service does by default, so that
sets of a few thousand images are not searched exhaustively."""

DEPTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""The k of precision@k."""

AP_DEPTH = 1000
"""Ranks of mAP@1000."""

RADIUS_BITS = 2
"""Radius of the ball within which precision is taken, in bits."""

RECALLS = np.linspace(0, 1, 21)
"""Where precision is taken for the precision-recall curve."""

OnProgress = Callable[[int, int], None]
"""Called with queries done and queries in all."""

# A key of the two-stage ranking is full: outside (1), distance, Hamming, row (21), relevant (1).
_FINE_BITS = 31  # a float32 that is not negative
_HAMMING_BITS = 10  # at most 512
_SOFT_BITS = 17  # at most 512 * 255

_OWN_BITS = (1 << _HAMMING_BITS) - 1
"""The Hamming distance of a query to itself where it is left out: after all others."""

_SETTLED_BEYOND = 64
"""Ranks after the first `AP_DEPTH` that are settled too, as some may move up."""

_BLOCK_KEYS = 1 << 20
"""Keys that one thread works on, 8 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One ranking's metrics, a row per query. All are float64 but `nearest`."""

    ap_full: NDArray[np.float64]
    ap_at_1000: NDArray[np.float64]
    """Over the relevant images found in the first 1000 ranks, as the author's script has it."""
    ap_at_1000_over_all: NDArray[np.float64]
    """Over ``min(1000, relevant images)``."""
    n_relevant: NDArray[np.float64]
    precision: NDArray[np.float64]
    """Shape ``[n, len(DEPTHS)]``."""
    precision_radius_2: NDArray[np.float64]
    """NaN where the ranking has no codes."""
    tie_aware_ap_full: NDArray[np.float64]
    tie_aware_ap_at_1000: NDArray[np.float64]
    tie_aware_precision_at_10: NDArray[np.float64]
    recall_precision: NDArray[np.float64]
    """Shape ``[n, len(RECALLS)]``."""
    nearest: NDArray[np.int32]
    """The first rows of the database, best first, shape ``[n, n_nearest]``."""

    @classmethod
    def empty(cls, n: int, n_nearest: int) -> Scores:
        """Make room for `n` queries."""
        widths = {"precision": len(DEPTHS), "recall_precision": len(RECALLS)}
        arrays = {
            field.name: np.full((n, widths[field.name]) if field.name in widths else n, np.nan)
            for field in fields(cls)
            if field.name != "nearest"
        }
        return cls(nearest=np.full((n, n_nearest), -1, dtype=np.int32), **arrays)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Who ranks whom."""

    database: Encodings
    queries: Encodings
    own_rows: NDArray[np.int64] | None = None
    """Where the queries are images of the database: their rows there, shape ``[n_queries]``. Each
    is left out of its own ranking."""
    floors: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]] | None = None
    """``lsh`` and ``itq`` -> packed codes of the database and of the queries."""

    @property
    def n_ranked(self) -> int:
        """Images in each ranking."""
        return len(self.database) - (self.own_rows is not None)

    @property
    def rankings(self) -> tuple[str, ...]:
        """Those of `RANKINGS` that there is all for."""
        lacking = set() if self.floors else {"lsh", "itq"}
        if self.queries.activations is None:
            lacking.add("coarse_soft")
        return tuple(name for name in RANKINGS if name not in lacking)

    def with_floors(self, rng: np.random.Generator) -> tuple[Task, int]:
        """Add codes by LSH and ITQ, fitted to the database, as long as the learned ones.

        Returns
        -------
        task, n_filled
            `n_filled`: bits of the ITQ codes that are random, for want of directions.
        """
        stored, asked = self.database.features, self.queries.features
        planes = baselines.lsh(stored, self.database.n_bits, rng)
        rotated = baselines.itq(stored, self.database.n_bits, rng)
        floors = {
            name: (chosen.encode(stored), chosen.encode(asked))
            for name, chosen in (("lsh", planes), ("itq", rotated))
        }
        return replace(self, floors=floors), rotated.n_filled


def score(
    task: Task,
    rankings: Sequence[str] | None = None,
    *,
    n_nearest: int = 10,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Scores]:
    """Rank and score.

    Parameters
    ----------
    task
        Who ranks whom.
    rankings
        Some of ``task.rankings``; None for all of them.
    n_nearest
        Rows to keep of each ranking.
    on_progress
        Told how far it is.

    Returns
    -------
    dict
        By name, in the order of `RANKINGS`.
    """
    names = [name for name in task.rankings if rankings is None or name in rankings]
    n = len(task.queries)
    scores = {name: Scores.empty(n, min(n_nearest, task.n_ranked)) for name in names}
    ranker = _Ranker(task, names, n_nearest)
    size = max(1, _BLOCK_KEYS // len(task.database))
    blocks = [np.arange(lo, min(lo + size, n)) for lo in range(0, n, size)]

    def work(block: NDArray[np.int64]) -> int:
        for name, ranked in ranker.rank(block):
            _fill(scores[name], block, ranked)
        return len(block)

    done = 0
    # NumPy lets go of the interpreter while it sorts and multiplies.
    with ThreadPoolExecutor(usable_cpus(), thread_name_prefix="rank") as pool:
        for n_done in pool.map(work, blocks):
            done += n_done
            on_progress(done, n)
    return scores


@dataclass(frozen=True, slots=True, eq=False)
class _Ranked:
    """Rankings of a block of queries, ``[m, n_ranked]``."""

    relevant: NDArray[np.bool_]
    rows: NDArray[np.int32]
    """The nearest, ``[m, n_nearest]``."""
    primary: NDArray[np.uint64]
    """What is ranked by; equal where tied."""
    radius_precision: NDArray[np.float64] | float


def _fill(scores: Scores, block: NDArray[np.int64], ranked: _Ranked) -> None:
    relevant = ranked.relevant
    n_relevant = relevant.sum(axis=1)
    groups = TieGroups.of_ranking(ranked.primary, relevant)
    scores.ap_full[block] = evaluation.average_precision(relevant)
    scores.ap_at_1000[block] = evaluation.average_precision(relevant, AP_DEPTH)
    scores.ap_at_1000_over_all[block] = evaluation.average_precision(relevant, AP_DEPTH, n_relevant)
    scores.n_relevant[block] = n_relevant
    scores.precision[block] = evaluation.precision_curve(relevant, DEPTHS)
    scores.precision_radius_2[block] = ranked.radius_precision
    scores.tie_aware_ap_full[block] = groups.average_precision()
    scores.tie_aware_ap_at_1000[block] = groups.average_precision(AP_DEPTH)
    scores.tie_aware_precision_at_10[block] = groups.precision_at(10)
    scores.recall_precision[block] = evaluation.precision_at_recall(relevant, RECALLS)
    scores.nearest[block] = ranked.rows


class _Ranker:
    """Holds what every block needs: codes as words, features as float64, bits as float32."""

    def __init__(self, task: Task, names: Sequence[str], n_nearest: int) -> None:
        self._task = task
        self._n_nearest = n_nearest
        self._names = names
        n = len(task.database)
        self._row_bits = max(1, (n - 1).bit_length())
        self._rows = np.arange(n, dtype=np.uint64) << np.uint64(1)
        packed = {"learned": (task.database.codes, task.queries.codes), **(task.floors or {})}
        self._words = {
            name: (codes.as_words(stored), codes.as_words(asked))
            for name, (stored, asked) in packed.items()
            if name in names or name == "learned"
        }
        if "coarse_soft" in names:
            bits = codes.unpack(task.database.codes, task.database.n_bits)
            self._bits = np.ascontiguousarray(bits.T, dtype=np.float32)
        # In float64 the expansion of the square loses nothing that float32 would show.
        by_feature = "two_stage" in names or "exhaustive" in names
        self._features = task.database.features[: n if by_feature else 0].astype(np.float64)
        self._squares = np.einsum("ij,ij->i", self._features, self._features)

    def rank(self, block: NDArray[np.int64]) -> Iterator[tuple[str, _Ranked]]:
        """Yield each ranking of the queries in `block`."""
        task = self._task
        relevant = evaluation.shares_label(task.queries.labels[block], task.database.labels)
        if task.own_rows is not None:
            relevant[np.arange(len(block)), task.own_rows[block]] = False
        learned = self._hamming("learned", block)
        fine = self._distances(block) if self._features.size else np.empty(0, np.uint32)
        for name in self._names:
            hamming = self._hamming(name, block) if name in self._words else learned
            within: NDArray[np.float64] | float = np.nan
            if name != "exhaustive":
                within = evaluation.precision_within(hamming, relevant, RADIUS_BITS)
            primary: NDArray[np.unsignedinteger[Any]] = hamming
            if name == "coarse_soft":
                primary = self._softened(learned, block)
            elif name == "two_stage":
                primary = self._two_stage(learned, fine)
            elif name == "exhaustive":
                primary = fine
            keys = self._sorted(primary, relevant)
            if name == "two_stage":
                self._settle(keys, block)
            yield name, self._ranked(keys, within)

    def _sorted(
        self, primary: NDArray[np.unsignedinteger[Any]], relevant: NDArray[np.bool_]
    ) -> NDArray[np.uint64]:
        keys = primary.astype(np.uint64)
        keys <<= np.uint64(self._row_bits + 1)
        keys |= self._rows
        keys |= relevant
        keys.sort(axis=1)
        return keys[:, : self._task.n_ranked]

    def _ranked(
        self, keys: NDArray[np.uint64], radius_precision: NDArray[np.float64] | float
    ) -> _Ranked:
        return _Ranked(
            relevant=(keys & np.uint64(1)).astype(np.bool_),
            rows=self._rows_of(keys[:, : self._n_nearest]).astype(np.int32),
            primary=keys >> np.uint64(self._row_bits + 1),
            radius_precision=radius_precision,
        )

    def _rows_of(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (keys >> np.uint64(1)) & np.uint64((1 << self._row_bits) - 1)

    def _settle(self, keys: NDArray[np.uint64], block: NDArray[np.int64]) -> None:
        """Order near ties among the first ranks by the distances that the service computes."""
        below = np.uint64(_HAMMING_BITS + self._row_bits + 1)
        first = keys[:, : AP_DEPTH + _SETTLED_BEYOND]
        distances = (first >> below).astype(np.uint32)  # drops the bit above: outside the pool
        fine = (distances & np.uint32((1 << _FINE_BITS) - 1)).view(np.float32)
        near = np.diff(fine, axis=1) <= near_ties.tolerance(self._features.shape[1]) * fine[:, 1:]
        near &= (distances[:, 1:] >> np.uint32(_FINE_BITS)) == 0
        chosen = np.zeros(first.shape, dtype=np.bool_)
        chosen[:, 1:] = near
        chosen[:, :-1] |= near
        query, rank = np.nonzero(chosen)
        exact = near_ties.served_distances(
            self._task.database.features[self._rows_of(first[query, rank])],
            self._task.queries.features[block[query]],
        )
        others = ~np.uint64(((1 << _FINE_BITS) - 1) << int(below))
        bits = exact.view(np.uint32).astype(np.uint64) << below
        first[query, rank] = (first[query, rank] & others) | bits
        first.sort(axis=1)

    def _hamming(self, name: str, block: NDArray[np.int64]) -> NDArray[np.uint16]:
        stored, asked = self._words[name]
        distances = np.zeros((len(block), stored.shape[1]), dtype=np.uint16)
        for ours, theirs in zip(stored, asked[:, block], strict=True):
            distances += np.bitwise_count(ours ^ theirs[:, np.newaxis])
        self._put_own_last(distances, _OWN_BITS, block)
        return distances

    def _softened(
        self, hamming: NDArray[np.uint16], block: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """Append the asymmetric distance to the Hamming distance."""
        queries = self._task.queries
        assert queries.activations is not None
        weights = soft_weights(queries.activations[block])
        ours = codes.unpack(queries.codes[block], queries.n_bits)
        # A bit that differs costs its weight: w where ours is 0 and theirs 1, and the other way
        # round. All are integers below 2**24, so float32 adds them exactly, in any order.
        signed = np.where(ours, -weights, weights).astype(np.float32)
        base = (weights * ours).sum(axis=1, dtype=np.float32)
        asymmetric = signed @ self._bits
        asymmetric += base[:, np.newaxis]
        joined = hamming.astype(np.uint64)
        joined <<= np.uint64(_SOFT_BITS)
        joined |= asymmetric.astype(np.uint64)
        return joined

    def _distances(self, block: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return Euclidean distances as the bits of float32, which are in the same order."""
        queries = self._task.queries.features[block].astype(np.float64)
        norms = np.einsum("ij,ij->i", queries, queries)[:, np.newaxis] + self._squares
        squared = queries @ self._features.T
        squared *= -2
        squared += norms
        # What rounding leaves between equal features is not to order them.
        squared[squared < 1e-12 * norms] = 0
        np.sqrt(squared, out=squared)
        bits = squared.astype(np.float32).view(np.uint32)
        self._put_own_last(bits, (1 << _FINE_BITS) - 1, block)
        return bits

    def _two_stage(
        self, hamming: NDArray[np.uint16], fine: NDArray[np.uint32]
    ) -> NDArray[np.uint64]:
        wanted = min(MIN_POOL, self._task.n_ranked) - 1
        threshold = np.partition(hamming, wanted, axis=1)[:, wanted, np.newaxis]
        before = np.where(hamming <= threshold, fine, np.uint64(1 << _FINE_BITS))
        before <<= np.uint64(_HAMMING_BITS)
        before |= hamming
        return before

    def _put_own_last(self, distances: NDArray[Any], last: int, block: NDArray[np.int64]) -> None:
        """Put each query that is in the database behind all others in its own ranking."""
        if self._task.own_rows is not None:
            distances[np.arange(len(block)), self._task.own_rows[block]] = last


def soft_weights(activations: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return what a bit that differs costs: 255 times how sure the query is of it, rounded.

    Parameters
    ----------
    activations
        H, in 0..1, any shape.

    Returns
    -------
    ndarray
        int64, 0 to 255, same shape: ``2 |H - 0.5| * 255``, halves to even, in float64.
    """
    certainty = np.abs(activations.astype(np.float64) - 0.5)
    return np.asarray(np.rint(certainty * 2 * 255), dtype=np.int64)
