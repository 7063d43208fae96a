"""Code health: whether codes use their bits, and whether the coarse stage can select by them."""

from hashlens.codehealth.measure import (
    COPY_CORRELATION,
    DEAD_RATE,
    MARGIN_BINS,
    UNSURE_MARGIN,
    WANTED_ROWS,
    CodeHealth,
    Margins,
    health_of,
    summary,
)
from hashlens.codehealth.verdict import (
    COLLAPSED_COLLISION_SHARE,
    CROWDED_COLLISION_SHARE,
    CROWDED_POOL_RATIO,
    FEW_ROWS,
    WASTED_SHARE,
    Level,
    Verdict,
    verdict,
)

__all__ = [
    "COLLAPSED_COLLISION_SHARE",
    "COPY_CORRELATION",
    "CROWDED_COLLISION_SHARE",
    "CROWDED_POOL_RATIO",
    "DEAD_RATE",
    "FEW_ROWS",
    "MARGIN_BINS",
    "UNSURE_MARGIN",
    "WANTED_ROWS",
    "WASTED_SHARE",
    "CodeHealth",
    "Level",
    "Margins",
    "Verdict",
    "health_of",
    "summary",
    "verdict",
]
