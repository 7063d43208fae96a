"""Pool policies, and what each of them finds: counted over all rows, not as the engine does it.

The fine stage orders its pool as exhaustive search orders everything. So an answer has exactly
those of the `k` nearest that are in the pool, and recall can be counted without a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import Embedding, Receipt, SearchOptions
from search_service import margins
from search_service.bench.report import Measured
from search_service.cancel import Cancel
from search_service.snapshot import Snapshot

K = (10, 100, 1000)
"""Depths at which recall is counted."""

PRECISION_K = 100
"""Depth at which answers of the query's class are counted, and orders compared."""

ORDERS = ("margins", "age", "odds", "whole")
"""Who is kept when a pool is cut: the first by Hamming distance and then by |H - 0.5|, as the
engine has it; then by age, as without the margins; then by |log(H / (1 - H))|; or, of the whole
ball, the first by |H - 0.5| alone."""

_LOG_ODDS_CAP = 8.0
"""H beyond 0.9997 counts as that: else one bit would outweigh all others."""


@dataclass(frozen=True, slots=True, eq=False)
class Coarse:
    """What a query's code says of every row."""

    hamming_bits: NDArray[np.uint16]
    """Shape ``[n]``."""
    within: NDArray[np.int64]
    """Rows within each Hamming distance, shape ``[n_bits + 1]``."""
    places: Mapping[str, NDArray[np.int64]]
    """By order, each row's place in it, shape ``[n]``."""

    @classmethod
    def of(cls, snapshot: Snapshot, query: Embedding) -> Coarse:
        """Compare a query that has activations with all rows of a snapshot without dead ones."""
        words = codes.as_words(np.frombuffer(query.code, dtype=np.uint8)[np.newaxis])[:, 0]
        bits = np.zeros(snapshot.rows, dtype=np.uint64)
        for column, word in zip(snapshot.words, words, strict=True):
            bits += np.bitwise_count(column ^ word)
        assert query.activations is not None
        soft = _weighted(snapshot, words, margins.bit_weights(query.activations))
        odds = _weighted(snapshot, words, _log_odds(query.activations))
        far = np.uint64(32)
        keys = {
            "margins": (bits << far) | soft,
            "age": bits,
            "odds": (bits << far) | odds,
            "whole": (soft << far) | bits,
        }
        return cls(
            hamming_bits=bits.astype(np.uint16),
            within=np.cumsum(np.bincount(bits.astype(np.int64), minlength=snapshot.n_bits + 1)),
            places={name: _places(keys[name]) for name in ORDERS},
        )


def _weighted(
    snapshot: Snapshot, words: NDArray[np.uint64], weights: NDArray[np.uint8]
) -> NDArray[np.uint64]:
    rows = np.arange(snapshot.rows, dtype=np.int64)
    return margins.distances_to(snapshot, rows, words, weights, Cancel()).astype(np.uint64)


def _log_odds(activations: NDArray[np.float32]) -> NDArray[np.uint8]:
    with np.errstate(divide="ignore"):
        odds = np.abs(np.log(activations.astype(np.float64)) - np.log1p(-activations))
    weights: NDArray[np.uint8] = np.rint(
        255 / _LOG_ODDS_CAP * np.minimum(odds, _LOG_ODDS_CAP)
    ).astype(np.uint8)
    return weights


def _places(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    places = np.empty(keys.shape[0], dtype=np.int64)
    places[np.argsort(keys, kind="stable")] = np.arange(keys.shape[0])
    return places


@dataclass(frozen=True, slots=True)
class Policy:
    """Which rows the fine stage ranks."""

    name: str
    options: SearchOptions
    """As the engine is timed; of the depths only the first is asked for."""
    depths: tuple[int, ...] = K
    """Where recall is counted: the pool is the same for all of them."""

    def threshold_bits(self, coarse: Coarse) -> int:
        """Return the ball's radius."""
        options = self.options
        if options.max_hamming_bits is not None:
            return options.max_hamming_bits
        n_wanted = min(max(options.k, options.min_pool), int(coarse.within[-1]))
        return int(np.searchsorted(coarse.within, n_wanted))

    def is_cut(self, coarse: Coarse) -> bool:
        """Tell whether `max_pool` cuts the ball."""
        max_pool = self.options.max_pool
        return max_pool is not None and coarse.within[self.threshold_bits(coarse)] > max_pool

    def pool(self, coarse: Coarse, order: str = "margins") -> NDArray[np.bool_]:
        """Return whether each row is in the pool, shape ``[n]``."""
        pool: NDArray[np.bool_] = coarse.hamming_bits <= self.threshold_bits(coarse)
        if self.options.max_pool is not None:
            places = coarse.places[order]
            if order == "whole":  # the first of the ball: places among its rows, not among all
                kept = np.sort(places[pool])[: self.options.max_pool]
                pool &= places <= kept.max(initial=-1)
                return pool
            pool &= places < self.options.max_pool
        return pool


def policies(n_rows: int) -> list[Policy]:
    """Return those that mean something for a table of so many rows."""
    found = [Policy(f"min_pool k = {k}", SearchOptions(k=k, min_pool=0), (k,)) for k in K]
    sizes = [size for size in (1000, 2000, 5000, 10_000, 20_000) if size < n_rows]
    found += [Policy(f"min_pool {size:,}", SearchOptions(k=K[0], min_pool=size)) for size in sizes]
    found += [
        Policy(
            f"min_pool {wanted:,}, max_pool {most:,}",
            SearchOptions(k=K[0], min_pool=wanted, max_pool=most),
        )
        for wanted in sizes
        for most in sizes
        if wanted <= most <= 2.5 * wanted
    ]
    found += [
        Policy(f"radius {radius}", SearchOptions(k=K[0], max_hamming_bits=radius))
        for radius in (0, 1, 2, 4, 8)
    ]
    return found


@dataclass(slots=True)
class Tally:
    """What one policy came to, query by query."""

    recalls: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """By order and depth."""
    precisions: list[float] = field(default_factory=list)
    pool_rows: list[int] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)

    def count(
        self,
        policy: Policy,
        coarse: Coarse,
        nearest: NDArray[np.int64],
        is_right: NDArray[np.bool_],
    ) -> None:
        """Count one query.

        Parameters
        ----------
        policy
            Whose tally this is.
        coarse
            Of the query.
        nearest
            All rows in the order of exhaustive search.
        is_right
            Whether each of `nearest` is of the query's class.
        """
        for order in ORDERS if policy.options.max_pool is not None else ORDERS[:1]:
            found = policy.pool(coarse, order)[nearest]
            for depth in policy.depths:
                self.recalls.setdefault((order, depth), []).append(float(found[:depth].mean()))
            if order == ORDERS[0]:
                self.pool_rows.append(int(np.count_nonzero(found)))
                # Fewer than asked for are as if the rest were wrong.
                n_right = np.count_nonzero(is_right[found][:PRECISION_K])
                self.precisions.append(float(n_right) / PRECISION_K)
        self.cut.append(policy.is_cut(coarse))

    def measured(self, database: str, policy: Policy, snapshot: Snapshot) -> Measured:
        """Return the line."""
        extra: dict[str, Any] = {
            "fine_ms": float(np.median([r.timings.fine_ns for r in self.receipts])) / 1e6,
            "pool": round(float(np.mean(self.pool_rows))),
            "pool_p95": round(float(np.percentile(self.pool_rows, 95))),
            "cut": float(np.mean(self.cut)),
        }
        for depth in policy.depths:
            extra[f"recall@{depth}"] = float(np.mean(self.recalls[ORDERS[0], depth]))
        if max(policy.depths) >= PRECISION_K:
            extra[f"class@{PRECISION_K}"] = float(np.mean(self.precisions))
        for order in ORDERS[1:]:
            if (order, PRECISION_K) in self.recalls and policy.options.max_pool is not None:
                recall = float(np.mean(self.recalls[order, PRECISION_K]))
                extra[f"{order}@{PRECISION_K}"] = recall
        return Measured(
            case=f"{database}: {policy.name}",
            rows=snapshot.rows,
            bits=snapshot.n_bits,
            k=policy.options.k,
            ours_ms=float(np.median([r.timings.total_ns for r in self.receipts])) / 1e6,
            extra=extra,
        )
