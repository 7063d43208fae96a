"""What `hashlens search --audit` shows beside the answer."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from hashlens.cli.text import printable, short_path
from hashlens.types import AuditResult, Hit

AUDIT_DEADLINE_S = 600.0
"""Time for an audit: the server reads every feature, if need be from disk."""

_SHOWN_HITS = 10


def audit_table(result: AuditResult, names: list[str]) -> Table:
    """Return the beginning of the exhaustive answer, for a terminal.

    Parameters
    ----------
    result
        What was found.
    names
        Of the exhaustive hits, to show.
    """
    places = {hit.id: n for n, hit in enumerate(result.answer.hits, 1)}
    table = Table(box=None, pad_edge=False, title="exhaustive search", title_justify="left")
    table.add_column("#", justify="right", style="dim")
    table.add_column("distance", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("answered", justify="right")
    table.add_column("image", overflow="fold")
    for n, hit in enumerate(result.exhaustive_hits[:_SHOWN_HITS]):
        place = places.get(hit.id)
        table.add_row(
            str(n + 1),
            f"{hit.distance:.3f}",
            str(hit.hamming_bits),
            "missed" if place is None else f"as {place}",
            short_path(names[n]),
        )
    return table


def audit_line(result: AuditResult) -> str:
    """Return the verdict in one line."""
    n = len(result.exhaustive_hits)
    n_found = round(result.recall * n)
    line = f"recall {result.recall:.3f} · {n_found:,} of the {n:,} nearest"
    if result.first_miss is None:
        return f"{line}, none missed"
    missed = result.exhaustive_hits[result.first_miss]
    return f"{line} · first miss at {result.first_miss + 1}: {printable(missed.id)}"


def audit_dict(result: AuditResult) -> dict[str, Any]:
    """Return an audit as ``--json`` prints it; ranks begin at 1, as those of hits."""
    answered = {hit.id for hit in result.answer.hits}
    return {
        "recall": result.recall,
        "first_miss_rank": None if result.first_miss is None else result.first_miss + 1,
        "exhaustive_hits": [
            {
                "rank": n,
                "id": hit.id,
                "hamming_bits": hit.hamming_bits,
                "distance": _finite(hit),
                "answered": hit.id in answered,
            }
            for n, hit in enumerate(result.exhaustive_hits, 1)
        ],
    }


def _finite(hit: Hit) -> float | None:
    """JSON has no infinity: a distance too large for float32 is null."""
    return hit.distance if math.isfinite(hit.distance or 0) else None
