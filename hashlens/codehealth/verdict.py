"""What code health means for a search, in plain words, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hashlens.codehealth.measure import DEAD_RATE, UNSURE_MARGIN, CodeHealth

Level = Literal["healthy", "crowded", "collapsed"]

COLLAPSED_COLLISION_SHARE = 0.04
"""Codes are collapsed where two rows have the same code with this chance, or more.

No threshold selects less than this share of a table. It is what 25 equal heaps would give. The
plain cross-entropy codes that this measure was made for have at least 0.047: of 60,000 rows in ten
classes, half share their code with 9.5% of the table or more. It is a share and not a number of
rows, so that a table and a sample of it get the same verdict.
"""

CROWDED_COLLISION_SHARE = 0.005
"""Codes are crowded where two rows have the same code with this chance, or more.

From 200,000 rows on, a row's own code then holds the 1000 rows of a search's default pool, on
average, and no threshold selects fewer.
"""

CROWDED_POOL_RATIO = 3.0
"""Codes are crowded where automatic pools hold, on average, so many times what they are to hold.

The fine stage then reads so many times the features that were asked for, mostly from disk. Codes
without any structure stay below 2 where they are long, because a ball grows by about that factor
from one threshold to the next.
"""

WASTED_SHARE = 0.5
"""Codes are crowded where this share of the bits is dead or a copy: a shorter code would do."""

FEW_ROWS = 1000
"""With fewer rows, collisions and pools say little about a larger table."""

_POOL_SHARE = 0.1
"""A pool that is to hold more than this share of the table is hardly a selection, so its size is no
evidence of health."""

_RETRAIN = (
    "Train codes that keep apart what a class holds together: `hashlens train --recipe orthohash` "
    "or `--recipe ssdh`, with batch norm on H."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement of codes."""

    level: Level
    """``healthy``: the coarse stage selects. ``crowded``: it lets through several times what was
    asked for, or will in a larger table. ``collapsed``: the codes say little more than the class.
    """
    sentences: tuple[str, ...]
    """What is seen."""
    advice: tuple[str, ...]
    """What to do; empty if nothing."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"level": self.level, "seen": list(self.sentences), "advice": list(self.advice)}


def verdict(health: CodeHealth) -> Verdict:
    """Judge codes by the thresholds named in this module.

    Parameters
    ----------
    health
        What was found.

    Returns
    -------
    Verdict
        The worst level that a threshold gives, with a sentence for everything that was weighed.
        It says whether the coarse stage can select, not whether it selects what is similar: that
        needs labels.
    """
    pool = float(health.automatic_pools.mean())
    pool_ratio = pool / health.wanted_rows
    wasted_share = health.wasted_bits / health.n_bits
    collapsed = health.collision_share >= COLLAPSED_COLLISION_SHARE
    crowded = pool_ratio >= CROWDED_POOL_RATIO or health.collision_share >= CROWDED_COLLISION_SHARE
    wasted = wasted_share >= WASTED_SHARE

    seen = [
        f"{health.n_rows:,} rows have {health.distinct_codes:,} distinct codes, as spread as "
        f"{health.effective_codes:,.0f} codes of equal size. The most common holds "
        f"{_percent(health.largest_bucket / health.n_rows)} of the rows.",
        f"Two rows have the same code with a chance of {_percent(health.collision_share)}: in a "
        f"table of a million, a row would share its code with {1e6 * health.collision_share:,.0f} "
        "others, on average.",
        f"A search that wants a pool of {health.wanted_rows:,} rows gets {pool:,.0f} on average.",
    ]
    if health.wasted_bits:
        seen.append(
            f"{health.wasted_bits} of {health.n_bits} bits add nothing: {len(health.dead_bits)} "
            f"change in fewer than {_percent(DEAD_RATE)} of the rows, the others repeat a bit."
        )
    if health.margins is not None:
        seen.append(
            f"{_percent(health.margins.unsure_share)} of the bits are unsure, their activation "
            f"within {UNSURE_MARGIN} of the threshold."
        )
    if health.n_rows < FEW_ROWS:
        seen.append("So few rows say little about a larger table.")
    elif health.wanted_rows > _POOL_SHARE * health.n_rows:
        seen.append("The pool is a large part of this table: its size says little here.")
    return Verdict(
        level="collapsed" if collapsed else "crowded" if crowded or wasted else "healthy",
        sentences=tuple(seen),
        advice=tuple(_advice(collapsed=collapsed, crowded=crowded, wasted=wasted)),
    )


def _advice(*, collapsed: bool, crowded: bool, wasted: bool) -> list[str]:
    advice = []
    if collapsed:
        advice.append(_RETRAIN)
    elif crowded:
        advice.append(
            "Use a recipe that spreads the codes further, or more bits. A table of a few thousand "
            "rows does not need it: the fine stage ranks all of them in no time."
        )
    if wasted:
        advice.append(
            "Use fewer bits, or a recipe that makes each bit fire for half of the images: more of "
            "the same bits cost memory and select nothing."
        )
    if collapsed or crowded:
        advice.append(
            "Until then, cap the work of a search with max_pool; the receipt's pool_truncated "
            "says when it cut."
        )
    return advice


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
