"""Encodings -> an evaluation. Pure: no model, no service, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder_service.evaluation.encodings import Encodings, n_distinct
from encoder_service.evaluation.rankings import (
    AP_DEPTH,
    DEPTHS,
    OnProgress,
    Scores,
    Task,
    score,
)
from encoder_service.evaluation.results import ClassSummary, Evaluation, RankingSummary
from hashlens import evaluation
from hashlens.errors import InvalidInputError

SEED = 1
"""Of everything drawn here: hyperplanes, ITQ's beginning, bootstrap."""

_SERVED_QUERIES = 512


def evaluate_encodings(
    database: Encodings,
    queries: Encodings | None = None,
    *,
    protocol: str,
    classes: Sequence[str],
    checkpoint: Mapping[str, Any] | None = None,
    query_rows: NDArray[np.int64] | None = None,
    rankings: Sequence[str] | None = None,
    served: Mapping[str, NDArray[np.int32]] | None = None,
    seed: int = SEED,
    on_progress: OnProgress = lambda done, total: None,
) -> Evaluation:
    """Rank, score, and sum up.

    Parameters
    ----------
    database
        What is searched.
    queries
        What is searched by. None: the database's own images, each left out of its own ranking.
    protocol
        Key of `PROTOCOLS`, for the record.
    classes
        Names of the labels.
    checkpoint
        Facts about the model, for the record.
    query_rows
        Which of the queries to ask with, int64, distinct; None for all.
    rankings
        Which of `rankings.RANKINGS`; None for all that there are data for.
    served
        Ranking -> rows of the database as the search service returned them, best first, shape
        ``[n_queries, min(AP_DEPTH, images ranked)]``: metrics of the first ranks are then computed
        from these. Those over the full list stay local.
    seed
        Of everything random; the same seed gives the same numbers.
    on_progress
        Told of queries ranked.

    Returns
    -------
    Evaluation

    Raises
    ------
    InvalidInputError
        There are too few images, or queries and database do not belong together.
    """
    task = _task(database, queries, query_rows)
    rng = np.random.default_rng(seed)
    notes = []
    if rankings is None or {"lsh", "itq"} & set(rankings):
        task, n_filled = task.with_floors(rng)
        if n_filled:
            notes.append(
                f"F7 spreads in fewer directions than the code has bits: {n_filled} of the "
                f"{database.n_bits} ITQ bits are random hyperplanes."
            )
    if task.n_ranked < AP_DEPTH:
        notes.append(
            f"Each query ranks only {task.n_ranked:,} images: metrics at greater depths are left "
            "out."
        )
    scores = score(task, rankings, n_nearest=AP_DEPTH if served else 10, on_progress=on_progress)
    if n_alone := int((next(iter(scores.values())).n_relevant == 0).sum()):
        notes.append(f"Queries without a relevant image, whose precision counts as 0: {n_alone:,}.")
    agreement = {}
    for name, rows in (served or {}).items():
        agreement[name] = float((rows == scores[name].nearest).mean())
        scores[name] = _with_served(scores[name], rows, task)
    summaries = _summaries(scores, task.n_ranked, rng)
    shown = scores["two_stage" if "two_stage" in scores else next(iter(scores))]
    predicted = task.queries.predicted
    return Evaluation(
        protocol=protocol,
        backend="served" if served else "local",
        n_queries=len(task.queries),
        n_database=task.n_ranked,
        checkpoint=checkpoint or {},
        rankings=summaries,
        distinct_codes=n_distinct(database.codes),
        accuracy=None
        if predicted is None or task.queries.labels.ndim != 1
        else float((predicted == task.queries.labels).mean()),
        classes=tuple(classes),
        by_class=_by_class(scores, task, classes),
        confusion=_confusion(shown.nearest[:, :10], task, len(classes)),
        query_rows=np.arange(len(task.queries)) if query_rows is None else query_rows,
        nearest={name: found.nearest for name, found in scores.items()},
        served_agreement=agreement,
        notes=tuple(notes),
    )


def _task(
    database: Encodings, queries: Encodings | None, query_rows: NDArray[np.int64] | None
) -> Task:
    asked = database if queries is None else queries
    if asked.n_bits != database.n_bits or asked.features.shape[1] != database.features.shape[1]:
        raise InvalidInputError(
            f"the queries have {asked.n_bits} bits and {asked.features.shape[1]} features, the "
            f"database has {database.n_bits} and {database.features.shape[1]}. Encode both with "
            "the same model.",
            field="queries",
        )
    rows = np.arange(len(asked)) if query_rows is None else query_rows
    if len(rows) < 2 or len(database) < 2:
        raise InvalidInputError(
            f"{len(rows)} queries and {len(database)} images: an evaluation takes 2 of each or "
            "more.",
            field="queries",
        )
    chosen = asked if query_rows is None else asked.take(rows)
    return Task(database, chosen, rows if queries is None else None)


def _with_served(scores: Scores, rows: NDArray[np.int32], task: Task) -> Scores:
    """Replace the metrics of the first ranks by those of what the search service returned."""
    precision = np.empty_like(scores.precision)
    found, over_all = np.empty_like(scores.ap_full), np.empty_like(scores.ap_full)
    for lo in range(0, len(rows), _SERVED_QUERIES):
        part = slice(lo, lo + _SERVED_QUERIES)
        asked, answers = task.queries.labels[part, np.newaxis], task.database.labels[rows[part]]
        relevant = asked == answers if asked.ndim == 2 else (asked & answers).any(axis=2)
        n_relevant = scores.n_relevant[part].astype(np.int64)
        precision[part] = evaluation.precision_curve(relevant, DEPTHS)
        found[part] = evaluation.average_precision(relevant, AP_DEPTH)
        over_all[part] = evaluation.average_precision(relevant, AP_DEPTH, n_relevant)
    return replace(
        scores, precision=precision, ap_at_1000=found, ap_at_1000_over_all=over_all, nearest=rows
    )


def _summaries(
    scores: Mapping[str, Scores], n_ranked: int, rng: np.random.Generator
) -> dict[str, RankingSummary]:
    deep_enough = n_ranked >= AP_DEPTH
    columns = {"map_full": True, "map_at_1000": deep_enough, "precision_at_10": n_ranked >= 10}
    intervals = [name for name, possible in columns.items() if possible]
    values = [
        {
            "map_full": found.ap_full,
            "map_at_1000": found.ap_at_1000,
            "precision_at_10": found.precision[:, DEPTHS.index(10)],
        }[name]
        for found in scores.values()
        for name in intervals
    ]
    # All rankings on the same resampled queries.
    low, high = evaluation.bootstrap_interval(np.stack(values, axis=1), rng)
    bounds = iter(zip(low.tolist(), high.tolist(), strict=True))
    return {
        name: _summary(found, n_ranked, {metric: next(bounds) for metric in intervals})
        for name, found in scores.items()
    }


def _summary(
    scores: Scores, n_ranked: int, intervals: Mapping[str, tuple[float, float]]
) -> RankingSummary:
    curve = {
        k: float(mean)
        for k, mean in zip(DEPTHS, scores.precision.mean(axis=0), strict=True)
        if k <= n_ranked
    }

    def if_deep(values: NDArray[np.float64], depth: int) -> float | None:
        return float(values.mean()) if depth <= n_ranked else None

    within = float(scores.precision_radius_2.mean())
    return RankingSummary(
        map_full=float(scores.ap_full.mean()),
        map_at_1000=if_deep(scores.ap_at_1000, AP_DEPTH),
        map_at_1000_over_all=if_deep(scores.ap_at_1000_over_all, AP_DEPTH),
        precision_at_10=curve.get(10),
        precision_at_100=curve.get(100),
        precision_at_1000=curve.get(1000),
        precision_curve=curve,
        precision_radius_2=None if np.isnan(within) else within,
        tie_aware_map_full=float(scores.tie_aware_ap_full.mean()),
        tie_aware_map_at_1000=if_deep(scores.tie_aware_ap_at_1000, AP_DEPTH),
        tie_aware_precision_at_10=if_deep(scores.tie_aware_precision_at_10, 10),
        recall_precision=tuple(scores.recall_precision.mean(axis=0).tolist()),
        ci95=dict(intervals),
    )


def _by_class(
    scores: Mapping[str, Scores], task: Task, classes: Sequence[str]
) -> dict[str, ClassSummary]:
    labels = task.queries.labels
    at_10 = DEPTHS.index(10)
    found = {}
    for position, name in enumerate(classes):
        members = labels == position if labels.ndim == 1 else labels[:, position]
        if not members.any():
            continue
        found[name] = ClassSummary(
            int(members.sum()),
            {key: float(one.ap_full[members].mean()) for key, one in scores.items()},
            {key: float(one.precision[members, at_10].mean()) for key, one in scores.items()}
            if task.n_ranked >= 10
            else {},
        )
    return found


def _confusion(nearest: NDArray[np.int32], task: Task, n_classes: int) -> NDArray[np.int64] | None:
    if task.queries.labels.ndim != 1:
        return None
    answers = task.database.labels[nearest]
    pairs = task.queries.labels[:, np.newaxis] * n_classes + answers
    counts = np.bincount(pairs.ravel(), minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes)
