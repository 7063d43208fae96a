"""Timing several contenders in turn, so that a machine's moods meet them all alike.

Each turn is a short burst of calls whose first few do not count: they find the caches as the one
before left them, which says more about the neighbour than about the contender. Steady traffic does
not meet that. The very first call of each turn is reported by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_REPEATS = 5
"""Rounds of which a median is taken, whatever the budget."""

BURST = 5
"""Calls of one turn that count."""

SETTLING = 3
"""Calls of one turn before those."""

_PAUSE_S = 0.01
"""Between two turns: OpenMP's threads spin for a while before they sleep, and each library has
threads of its own that would take the cores from the next."""


@dataclass(frozen=True, slots=True)
class Times:
    """What one contender took, in milliseconds."""

    samples_ms: tuple[float, ...]
    first_ms: tuple[float, ...] = ()
    """The first call of each turn, in caches full of others' data."""

    @property
    def median_ms(self) -> float:
        """The number to quote."""
        return float(np.median(self.samples_ms))

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile, between the two nearest ranks in proportion."""
        return float(np.percentile(self.samples_ms, percent))


def interleaved(
    contenders: Mapping[str, Callable[[int], Any]],
    *,
    repeats: int,
    warmups: int = 1,
    budget_s: float = 60.0,
) -> dict[str, Times]:
    """Time contenders in turn: a burst of A, a burst of B, a burst of A, ...

    Parameters
    ----------
    contenders
        Name -> what to time. It gets the number of the call, to take another query each time; all
        get the same.
    repeats
        Rounds, in each of which every contender has a turn.
    warmups
        Rounds before, which do not count.
    budget_s
        No round begins after so many seconds, once there are `MIN_REPEATS`.

    Returns
    -------
    dict
        By name, in the order given.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    firsts: dict[str, list[float]] = {name: [] for name in contenders}
    began_s = time.monotonic()
    for number in range(-warmups, repeats):
        if number >= MIN_REPEATS and time.monotonic() - began_s > budget_s:
            break
        for name, contender in contenders.items():
            time.sleep(_PAUSE_S)
            for turn in range(SETTLING + BURST):
                began_ns = time.perf_counter_ns()
                contender((number + warmups) * (SETTLING + BURST) + turn)
                took_ms = (time.perf_counter_ns() - began_ns) / 1e6
                if number >= 0 and turn == 0:
                    firsts[name].append(took_ms)
                if number >= 0 and turn >= SETTLING:
                    samples[name].append(took_ms)
    return {name: Times(tuple(samples[name]), tuple(firsts[name])) for name in contenders}
