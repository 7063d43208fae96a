"""Is it flat? Samples and calls to a table, and what in it is not as it should be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.soak.samples import Sample

WARM_SHARE = 0.25
"""Of a process's life, in which caches fill and allocators settle: not judged."""
GROWTH_MIB = 24.0
GROWTH_SHARE = 0.05
"""Memory may grow by this much, or by this share of itself, from the warm-up's end to the last. The
first compaction alone leaves about 14 MiB with the allocator."""
MORE_DESCRIPTORS = 8
MORE_THREADS = 4
P99_TIMES = 2.0
P99_MS = 20.0
"""The 99th percentile of a call may become this many times, or this much, longer."""
MIN_CALLS = 50
"""A third with fewer calls has no 99th percentile to speak of."""
POINTS = 200
"""Slopes are taken through at most this many points."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the traffic."""

    at_s: float
    call: str
    ms: float
    error: str


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One process, after its warm-up."""

    role: str
    pid: int
    life_s: float
    memory_mib: float
    """Median."""
    slope_mib_per_h: float
    growth_mib: float
    """The slope times the time that it was taken over."""
    more_descriptors: float
    more_threads: float

    def faults(self) -> list[str]:
        """Return what is not flat."""
        found = []
        allowed_mib = max(GROWTH_MIB, GROWTH_SHARE * self.memory_mib)
        if self.growth_mib > allowed_mib:
            found.append(
                f"{self.role}: memory grew by {self.growth_mib:.1f} MiB, allowed {allowed_mib:.1f}"
            )
        if self.more_descriptors > MORE_DESCRIPTORS:
            found.append(f"{self.role}: {self.more_descriptors:g} more descriptors")
        if self.more_threads > MORE_THREADS:
            found.append(f"{self.role}: {self.more_threads:g} more threads")
        return found


@dataclass(frozen=True, slots=True)
class CallRow:
    """One kind of call; times in milliseconds."""

    call: str
    n: int
    n_failed: int
    p50_ms: float
    p99_ms: tuple[float, float, float]
    """Of the three thirds of the run."""
    n_fewest: int
    """Calls in the smallest third."""

    def faults(self) -> list[str]:
        """Return what is not flat, or failed."""
        found = []
        if self.n_failed:
            found.append(f"{self.call}: {self.n_failed} of {self.n} calls failed")
        first, last = self.p99_ms[0], self.p99_ms[2]
        if self.n_fewest >= MIN_CALLS and last > max(P99_TIMES * first, first + P99_MS):
            found.append(f"{self.call}: p99 went from {first:.0f} to {last:.0f} ms")
        return found


def process_rows(samples: Iterable[Sample]) -> list[ProcessRow]:
    """Judge each process by itself; one that lived too shortly for a slope is left out."""
    lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for taken in samples:
        lives[taken.role, taken.pid].append(taken)
    rows = []
    for (role, pid), life in sorted(lives.items()):
        warm = life[int(len(life) * WARM_SHARE) :]
        if len(warm) < 9:
            continue
        at_s = np.array([taken.at_s for taken in warm])
        memory = np.array([taken.anonymous_mib for taken in warm])
        per_s = slope(at_s, memory)
        rows.append(
            ProcessRow(
                role=role,
                pid=pid,
                life_s=life[-1].at_s - life[0].at_s,
                memory_mib=float(np.median(memory)),
                slope_mib_per_h=per_s * 3600,
                growth_mib=per_s * float(at_s[-1] - at_s[0]),
                more_descriptors=_more([taken.descriptors for taken in warm]),
                more_threads=_more([taken.threads for taken in warm]),
            )
        )
    return rows


def call_rows(calls: Sequence[Call], began_s: float, ended_s: float) -> list[CallRow]:
    """Summarise each kind of call."""
    kinds: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        kinds[call.call].append(call)
    rows = []
    for kind, made in sorted(kinds.items()):
        thirds: list[list[float]] = [[], [], []]
        for call in made:
            third = int(3 * (call.at_s - began_s) / (ended_s - began_s))
            thirds[min(max(third, 0), 2)].append(call.ms)
        first, second, third_ = (_p99(part) for part in thirds)
        rows.append(
            CallRow(
                call=kind,
                n=len(made),
                n_failed=sum(bool(call.error) for call in made),
                p50_ms=float(np.median([call.ms for call in made])),
                p99_ms=(first, second, third_),
                n_fewest=min(len(part) for part in thirds),
            )
        )
    return rows


def errors(calls: Iterable[Call]) -> Counter[str]:
    """Count what went wrong, by kind of call and first words."""
    return Counter(f"{call.call}: {call.error[:160]}" for call in calls if call.error)


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the median slope through all pairs (Theil-Sen): a few outliers do not turn it."""
    if len(x) > POINTS:
        chosen = np.linspace(0, len(x) - 1, POINTS).astype(int)
        x, y = x[chosen], y[chosen]
    i, j = np.triu_indices(len(x), 1)
    apart = x[j] != x[i]
    return float(np.median((y[j] - y[i])[apart] / (x[j] - x[i])[apart]))


def _more(counts: Sequence[int]) -> float:
    """Return by how much the last third is above the first."""
    third = len(counts) // 3
    return float(np.median(counts[-third:]) - np.median(counts[:third]))


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else float("nan")
