"""An evaluation on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from encoder_service.evaluation.results import PROTOCOLS, Evaluation, RankingSummary

COLUMNS = {
    "mAP full": "map_full",
    "mAP@1000": "map_at_1000",
    "P@10": "precision_at_10",
    "P@100": "precision_at_100",
    "P@1000": "precision_at_1000",
    "P radius 2": "precision_radius_2",
    "mAP full, tied": "tie_aware_map_full",
    "mAP@1000, tied": "tie_aware_map_at_1000",
    "P@10, tied": "tie_aware_precision_at_10",
}
"""Heading -> field of `RankingSummary`."""

LEGEND = (
    "± half of the 95% interval over the queries (bootstrap). mAP@1000 divides by the relevant "
    "images found, as Lin et al. 2015 do. P radius 2 counts an empty ball as 0. tied: expected "
    "over all orders of equal distances."
)


def shown(evaluation: Evaluation) -> RenderableType:
    """Return the numbers, ready to print."""
    table = Table(title=headline(evaluation), title_justify="left", box=None, pad_edge=False)
    table.add_column("ranking")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for name, summary in evaluation.rankings.items():
        table.add_row(name, *(cell(summary, field) for field in COLUMNS.values()))
    facts = f"{evaluation.distinct_codes:,} different codes in the database"
    if evaluation.accuracy is not None:
        facts += f"; the classifier is right about {evaluation.accuracy:.1%} of the queries"
    lines = [facts + ".", LEGEND, *evaluation.notes]
    if evaluation.verdict is not None:
        lines.append(f"The codes are {evaluation.verdict.level}; `hashlens inspect` says more.")
    if evaluation.served_agreement:
        agreed = ", ".join(f"{k} {v:.2%}" for k, v in evaluation.served_agreement.items())
        lines.append(f"Served ranks that hold the image of the local ranking: {agreed}.")
    return Group(table, "", *lines)


def headline(evaluation: Evaluation) -> str:
    """Return one line that says what was measured."""
    model = evaluation.checkpoint
    return (
        f"{evaluation.protocol}: {evaluation.n_queries:,} queries among "
        f"{evaluation.n_database:,} images, {model.get('backbone', '?')} with "
        f"{model.get('n_bits', '?')} bits, {evaluation.backend}"
    )


def meaning(evaluation: Evaluation) -> str:
    """Return the protocol's definition as a sentence."""
    text = PROTOCOLS[evaluation.protocol]
    return f"{text[:1].upper()}{text[1:]}."


def cell(summary: RankingSummary, field: str) -> str:
    """Return a number for people, with its interval if there is one."""
    value = getattr(summary, field)
    if value is None:
        return "-"
    if field not in summary.ci95:
        return f"{value:.3f}"
    low, high = summary.ci95[field]
    return f"{value:.3f} ±{(high - low) / 2:.3f}"
