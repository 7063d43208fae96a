"""What an evaluation found, as values and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder_service.evaluation.rankings import RANKINGS, RECALLS
from hashlens.codehealth import CodeHealth, Verdict, verdict

PROTOCOLS = {
    "lin2015": "every test image is a query; the database is the training images, which the model "
    "has learned from. The paper's protocol: it rewards what was memorised",
    "split": "every test image is a query for all the other test images: training has seen neither "
    "queries nor database",
    "unseen-classes": "test images of classes that training left out are queries for each other: "
    "whether the codes carry more than the classes they were taught (Sablayrolles, Douze, Usunier, "
    "Jegou, ICASSP 2017)",
}
"""Name -> what it asks."""


@dataclass(frozen=True, slots=True)
class RankingSummary:
    """One ranking's means over the queries; None where the database has fewer images than ranks
    are counted, or the ranking has no codes."""

    map_full: float
    map_at_1000: float | None
    """Each query's sum divided by the relevant images *found*, as the author's script does."""
    map_at_1000_over_all: float | None
    """Divided by ``min(1000, relevant images)``."""
    precision_at_10: float | None
    precision_at_100: float | None
    precision_at_1000: float | None
    precision_curve: Mapping[int, float]
    precision_radius_2: float | None
    """An empty ball counts as 0."""
    tie_aware_map_full: float
    tie_aware_map_at_1000: float | None
    tie_aware_precision_at_10: float | None
    recall_precision: tuple[float, ...]
    """Precision at each of `RECALLS`."""
    ci95: Mapping[str, tuple[float, float]]
    """Metric -> 95% confidence interval of the mean, by bootstrap over the queries."""

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["precision_curve"] = {str(k): p for k, p in self.precision_curve.items()}
        plain["precision_recall"] = {
            f"{recall:.2f}": p for recall, p in zip(RECALLS, self.recall_precision, strict=True)
        }
        del plain["recall_precision"]
        plain["ci95"] = {name: list(interval) for name, interval in self.ci95.items()}
        return plain


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """The queries of one class."""

    n_queries: int
    average_precision: Mapping[str, float]
    """Ranking -> mean average precision over the full list."""
    precision_at_10: Mapping[str, float]
    """Ranking -> mean; empty if the database has fewer than 10 images."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a model's codes and features are worth, by one protocol on one set of images."""

    protocol: str
    """Key of `PROTOCOLS`."""
    backend: str
    """``local`` or ``served``."""
    n_queries: int
    n_database: int
    """Images that each query ranks."""
    checkpoint: Mapping[str, Any]
    rankings: Mapping[str, RankingSummary]
    """By name, in the order of `RANKINGS`."""
    distinct_codes: int
    """How many different codes the database has."""
    accuracy: float | None
    """Share of the queries whose class the classifier names; None if that has no meaning."""
    classes: tuple[str, ...]
    """Those of the data."""
    by_class: Mapping[str, ClassSummary]
    """Classes without a query are left out."""
    confusion: NDArray[np.int64] | None
    """Labels of the first ten answers of `shown_ranking`, ``[query's class, answer's class]``;
    None where images have several labels."""
    query_rows: NDArray[np.int64]
    """Which images of the queries' split were asked with, ``[n_queries]``."""
    nearest: Mapping[str, NDArray[np.int32]]
    """Ranking -> the first rows of the database for each query, ``[n_queries, >= 10]``."""
    served_agreement: Mapping[str, float] = field(default_factory=dict)
    """Ranking -> share of the served ranks that hold the image which the local ranking has
    there."""
    health: CodeHealth | None = None
    """Of the database's codes; None if nobody looked."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers has to know, a sentence each."""

    @property
    def shown_ranking(self) -> str:
        """The ranking that users get, or the first one there is."""
        return "two_stage" if "two_stage" in self.rankings else next(iter(self.rankings))

    @property
    def verdict(self) -> Verdict | None:
        """What `health` means."""
        return None if self.health is None else verdict(self.health)

    def to_json(self) -> dict[str, Any]:
        """Return the plain form; rankings are keys of the top level."""
        return {
            "protocol": self.protocol,
            "protocol_means": PROTOCOLS[self.protocol],
            "backend": self.backend,
            "n_queries": self.n_queries,
            "n_database": self.n_database,
            "checkpoint": dict(self.checkpoint),
            **{name: summary.to_json() for name, summary in self.rankings.items()},
            "distinct_codes": self.distinct_codes,
            "accuracy": self.accuracy,
            "by_class": {
                name: {
                    "n_queries": summary.n_queries,
                    "map_full": dict(summary.average_precision),
                    "precision_at_10": dict(summary.precision_at_10),
                }
                for name, summary in self.by_class.items()
            },
            "confusion_at_10": None if self.confusion is None else self.confusion.tolist(),
            "served_agreement": dict(self.served_agreement),
            "rankings": {name: RANKINGS[name] for name in self.rankings},
            "health": None if self.health is None else self.health.to_json(),
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "notes": list(self.notes),
        }
