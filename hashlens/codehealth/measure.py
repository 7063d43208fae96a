"""How well codes use their bits, and whether the coarse stage can select by them.

Two things make codes healthy: rows are spread over many codes, so that a small Hamming ball holds
about as many rows as were asked for, and each bit says something of its own. Neither says that
near codes mean similar images: that is `hashlens.evaluation`'s, and needs labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError

WANTED_ROWS = 1000
"""Rows that a pool is to hold: fewer than a search asks for by default, so that tables of a few
thousand rows show how crowded their codes are."""

DEAD_RATE = 0.01
"""A bit that is set, or clear, in less than this share of the rows is dead."""

COPY_CORRELATION = 0.95
"""Two bits whose correlation is above this, by magnitude, say the same."""

UNSURE_MARGIN = 0.1
"""Below this margin an activation is near its threshold: a small change would flip the bit."""

MARGIN_BINS = 20
"""Bins of the histogram of margins, from 0 to 0.5."""

_BLOCK_ROWS = 1 << 16
"""Rows that are unpacked at a time: float32 counts them exactly."""


@dataclass(frozen=True, slots=True, eq=False)
class Margins:
    """How far activations are from the threshold: ``|H - 0.5|``, 0 to 0.5."""

    histogram: NDArray[np.int64]
    """Activations in each of `MARGIN_BINS` equal bins from 0 to 0.5."""
    mean: float
    unsure_share: float
    """Share of the activations whose margin is below `UNSURE_MARGIN`."""
    mean_by_bit: NDArray[np.float64]
    """Shape ``[n_bits]``."""


@dataclass(frozen=True, slots=True, eq=False)
class CodeHealth:
    """What was found in a set of codes. Pools are those of its own rows as queries."""

    n_rows: int
    n_bits: int
    fire_rates: NDArray[np.float64]
    """By bit, the share of rows in which it is set, shape ``[n_bits]``."""
    entropies: NDArray[np.float64]
    """By bit, its entropy in bits: 1 if it is set in half of the rows, 0 if in none or all."""
    correlations: NDArray[np.float64]
    """Pearson's r between bits, shape ``[n_bits, n_bits]``; 0 for a bit that never changes, but 1
    on the diagonal."""
    bucket_sizes: NDArray[np.int64]
    """Rows of each distinct code, largest first."""
    n_queries: int
    """Rows that were drawn as queries for the pools."""
    pool_mean: NDArray[np.float64]
    """Rows within t bits of a row, itself included, for t from 0: shape ``[n_bits + 1]``."""
    pool_median: NDArray[np.float64]
    pool_p95: NDArray[np.float64]
    """The 95th percentile."""
    wanted_rows: int
    """Rows that the pool of a search is to hold; at most `n_rows`."""
    automatic_pools: NDArray[np.int64]
    """By query, ascending: rows of the smallest ball that holds `wanted_rows`, which is what the
    fine stage of a search with automatic threshold looks at. Shape ``[n_queries]``."""
    margins: Margins | None
    """None where there are no activations."""

    @property
    def distinct_codes(self) -> int:
        """How many different codes there are."""
        return int(self.bucket_sizes.shape[0])

    @property
    def largest_bucket(self) -> int:
        """Rows of the most common code."""
        return int(self.bucket_sizes[0])

    @property
    def effective_codes(self) -> float:
        """The exponential of the entropy of the rows over the codes.

        As many codes with equal shares of the rows would be as spread.
        """
        shares = self.bucket_sizes / self.n_rows
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def collision_share(self) -> float:
        """The chance that two different rows have the same code; 0 for one row.

        Simpson's index without its bias: a table and a sample of it have the same, on average.
        """
        pairs = (self.bucket_sizes * (self.bucket_sizes - 1)).sum()
        return float(pairs / max(self.n_rows * (self.n_rows - 1), 1))

    @property
    def threshold_bits(self) -> int:
        """The smallest threshold at which the median row's ball holds `wanted_rows`."""
        return int(np.searchsorted(self.pool_median, self.wanted_rows))

    @property
    def dead_bits(self) -> tuple[int, ...]:
        """Bits that (almost) never change, see `DEAD_RATE`."""
        is_dead = np.minimum(self.fire_rates, 1 - self.fire_rates) < DEAD_RATE
        return tuple(np.flatnonzero(is_dead).tolist())

    @property
    def copied_bits(self) -> tuple[tuple[int, int], ...]:
        """Pairs of bits that say the same, or the opposite, see `COPY_CORRELATION`."""
        high = np.abs(np.triu(self.correlations, 1)) > COPY_CORRELATION
        return tuple((int(i), int(j)) for i, j in np.argwhere(high))

    @property
    def wasted_bits(self) -> int:
        """Bits that add nothing: dead ones, and copies of an earlier bit."""
        return len({*self.dead_bits, *(copy for _, copy in self.copied_bits)})

    @property
    def max_correlation(self) -> float:
        """The largest ``|r|`` between two bits; 0 for a code of one bit."""
        return float(np.abs(np.triu(self.correlations, 1)).max())

    @property
    def mean_correlation(self) -> float:
        """The mean ``|r|`` over the pairs of bits; 0 for a code of one bit."""
        n_pairs = self.n_bits * (self.n_bits - 1) // 2
        return float(np.abs(np.triu(self.correlations, 1)).sum() / max(n_pairs, 1))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the correlation matrix and all but the largest buckets."""
        margins = self.margins
        return {
            **summary(self),
            "fire_rates": self.fire_rates.tolist(),
            "entropies": self.entropies.tolist(),
            "dead_bit_positions": list(self.dead_bits),
            "copied_bit_pairs": [list(pair) for pair in self.copied_bits],
            "largest_buckets": self.bucket_sizes[:20].tolist(),
            "n_queries": self.n_queries,
            "pool_mean": self.pool_mean.tolist(),
            "pool_median": self.pool_median.tolist(),
            "pool_p95": self.pool_p95.tolist(),
            "margin_histogram": None if margins is None else margins.histogram.tolist(),
            "margin_mean_by_bit": None if margins is None else margins.mean_by_bit.tolist(),
        }


def health_of(
    packed: NDArray[np.uint8],
    n_bits: int,
    activations: NDArray[np.floating[Any]] | None = None,
    *,
    random: np.random.Generator,
    n_queries: int = 1000,
    wanted_rows: int = WANTED_ROWS,
) -> CodeHealth:
    """Measure a set of codes.

    Parameters
    ----------
    packed
        uint8, shape ``[n, n_bytes(n_bits)]``, see `hashlens.codes`; at least one row.
    n_bits
        Code length, in bits.
    activations
        H before the threshold, in 0..1, shape ``[n, n_bits]``; None if it was not kept.
    random
        Draws the rows that serve as queries, without replacement.
    n_queries
        At most so many. With all rows as queries the answer does not depend on `random`.
    wanted_rows
        Rows that a pool is to hold. For a sample of a larger table, take the same share of the
        pool: a tenth of the rows, a tenth of the pool.

    Returns
    -------
    CodeHealth

    Raises
    ------
    InvalidInputError
        There are no rows, shapes or dtypes do not fit, padding bits are set, or an activation is
        not in 0..1.
    """
    _check(packed, n_bits, activations, n_queries, wanted_rows)
    n = packed.shape[0]
    fires, together = _count(packed, n_bits)
    distinct, sizes = _buckets(codes.as_words(packed))
    wanted_rows = min(wanted_rows, n)
    queries = np.sort(random.choice(n, size=min(n_queries, n), replace=False))
    pools = _pools(codes.as_words(packed[queries]), distinct, sizes, n_bits)
    thresholds = (pools < wanted_rows).sum(axis=1)
    rates = fires / n
    return CodeHealth(
        n_rows=n,
        n_bits=n_bits,
        fire_rates=rates,
        entropies=_entropy(rates),
        correlations=_correlations(n, fires, together),
        bucket_sizes=np.sort(sizes)[::-1].copy(),
        n_queries=queries.shape[0],
        pool_mean=pools.mean(axis=0),
        pool_median=np.median(pools, axis=0),
        pool_p95=np.percentile(pools, 95, axis=0),
        wanted_rows=wanted_rows,
        automatic_pools=np.sort(pools[np.arange(queries.shape[0]), thresholds]),
        margins=None if activations is None else _margins(activations),
    )


def summary(health: CodeHealth) -> dict[str, float]:
    """Return the numbers that say most, flat, to log and to compare.

    Parameters
    ----------
    health
        What was found.

    Returns
    -------
    dict
        Every value a float; the margins' only where there are activations.
    """
    pools = health.automatic_pools
    numbers: dict[str, float] = {
        "n_rows": health.n_rows,
        "n_bits": health.n_bits,
        "distinct_codes": health.distinct_codes,
        "effective_codes": health.effective_codes,
        "largest_bucket": health.largest_bucket,
        "collision_share": health.collision_share,
        "entropy_mean_bits": float(health.entropies.mean()),
        "entropy_min_bits": float(health.entropies.min()),
        "correlation_mean": health.mean_correlation,
        "correlation_max": health.max_correlation,
        "dead_bits": len(health.dead_bits),
        "wasted_bits": health.wasted_bits,
        "wanted_rows": health.wanted_rows,
        "threshold_bits": health.threshold_bits,
        "automatic_pool_mean": float(pools.mean()),
        "automatic_pool_median": float(np.median(pools)),
        "automatic_pool_p95": float(np.percentile(pools, 95)),
    }
    if health.margins is not None:
        numbers["margin_mean"] = health.margins.mean
        numbers["margin_unsure_share"] = health.margins.unsure_share
    return {name: float(value) for name, value in numbers.items()}


def _check(
    packed: NDArray[np.uint8],
    n_bits: int,
    activations: NDArray[np.floating[Any]] | None,
    n_queries: int,
    wanted_rows: int,
) -> None:
    if not 1 <= n_bits <= codes.MAX_BITS:
        raise InvalidInputError(
            f"n_bits is {n_bits}; codes have 1 to {codes.MAX_BITS}.", field="n_bits"
        )
    width = codes.n_bytes(n_bits)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != width:
        raise InvalidInputError(
            f"codes of {n_bits} bits are uint8 [n, {width}], not {packed.dtype} "
            f"{list(packed.shape)}.",
            field="packed",
        )
    if packed.shape[0] == 0:
        raise InvalidInputError("there are no codes to look at.", field="packed")
    if n_bits % 8 and (packed[:, -1] >> n_bits % 8).any():
        raise InvalidInputError("padding bits of the codes are set.", field="packed")
    if n_queries < 1 or wanted_rows < 1:
        raise InvalidInputError("n_queries and wanted_rows are at least 1.", field="n_queries")
    if activations is None:
        return
    if activations.shape != (packed.shape[0], n_bits):
        raise InvalidInputError(
            f"the activations have shape {list(activations.shape)}; these codes need "
            f"{[packed.shape[0], n_bits]}.",
            field="activations",
        )
    # Written so that NaN fails, too.
    if not (activations.min() >= 0 and activations.max() <= 1):
        raise InvalidInputError("activations are numbers in 0..1.", field="activations")


def _count(
    packed: NDArray[np.uint8], n_bits: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return in how many rows each bit is set, and each pair of bits together; whole numbers."""
    together = np.zeros((n_bits, n_bits), dtype=np.float64)
    for lo in range(0, packed.shape[0], _BLOCK_ROWS):
        block = codes.unpack(packed[lo : lo + _BLOCK_ROWS], n_bits).astype(np.float32)
        together += block.T @ block
    return together.diagonal().copy(), together


def _entropy(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    entropy = np.zeros_like(rates)
    for share in (rates, 1 - rates):
        present = share > 0
        entropy[present] -= share[present] * np.log2(share[present])
    return entropy


def _correlations(
    n: int, fires: NDArray[np.float64], together: NDArray[np.float64]
) -> NDArray[np.float64]:
    spread = np.sqrt(fires * (n - fires))
    scale = np.outer(spread, spread)
    covariance = n * together - np.outer(fires, fires)
    r = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
    np.fill_diagonal(r, 1.0)
    clipped: NDArray[np.float64] = r.clip(-1.0, 1.0)
    return clipped


def _buckets(words: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the distinct codes as words, ``[n_words, n_distinct]``, and the rows of each."""
    ordered = words[:, np.lexsort(words)]
    is_first = np.r_[True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)]
    firsts = np.flatnonzero(is_first)
    return ordered[:, firsts], np.diff(firsts, append=words.shape[1])


def _pools(
    queries: NDArray[np.uint64],
    distinct: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    n_bits: int,
) -> NDArray[np.int64]:
    """Return how many rows are within t bits of each query: ``[n_queries, n_bits + 1]``."""
    pools = np.empty((queries.shape[1], n_bits + 1), dtype=np.int64)
    for pool, query in zip(pools, queries.T, strict=True):
        differing = np.bitwise_count(distinct ^ query[:, np.newaxis])
        distances = differing.sum(axis=0, dtype=np.int64)
        # Whole numbers far below 2**53: exact as float64.
        at_distance = np.bincount(distances, weights=sizes, minlength=n_bits + 1)
        np.cumsum(at_distance.astype(np.int64), out=pool)
    return pools


def _margins(activations: NDArray[np.floating[Any]]) -> Margins:
    n, n_bits = activations.shape
    histogram = np.zeros(MARGIN_BINS, dtype=np.int64)
    sums = np.zeros(n_bits, dtype=np.float64)
    n_unsure = 0
    for lo in range(0, n, _BLOCK_ROWS):
        margins = np.abs(activations[lo : lo + _BLOCK_ROWS].astype(np.float64) - 0.5)
        histogram += np.histogram(margins, MARGIN_BINS, range=(0.0, 0.5))[0]
        sums += margins.sum(axis=0)
        n_unsure += int(np.count_nonzero(margins < UNSURE_MARGIN))
    return Margins(
        histogram=histogram,
        mean=float(sums.sum() / activations.size),
        unsure_share=n_unsure / activations.size,
        mean_by_bit=sums / n,
    )
