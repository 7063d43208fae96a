"""An evaluation as pictures."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from encoder_service.evaluation.rankings import RECALLS
from encoder_service.evaluation.results import Evaluation
from encoder_service.evaluation.table import headline

_DPI = 110
_WIDTH, _HEIGHT = 7.0, 4.5  # inches

# Okabe and Ito's colours, told apart with any colour vision; markers and dashes besides.
_STYLES: dict[str, tuple[str, str, str]] = {
    "coarse": ("#0072B2", "-", "o"),
    "coarse_soft": ("#56B4E9", "--", "s"),
    "two_stage": ("#D55E00", "-", "D"),
    "exhaustive": ("#000000", ":", "^"),
    "lsh": ("#999999", "-.", "v"),
    "itq": ("#009E73", "--", "x"),
}

_MAX_CLASSES = 40
"""Classes that bars have room for; of more, the worst are shown."""

_MAX_CELLS = 30
"""Classes that a confusion matrix is drawn for."""


def write_plots(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write a PNG for each view of the numbers.

    Parameters
    ----------
    evaluation
        The numbers.
    folder
        Where; made if it is missing. Files of the same names are replaced.

    Returns
    -------
    list of Path
        ``precision_at_k``, ``precision_recall``, ``classes`` and, for images of one label each and
        up to 30 classes, ``confusion``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in drawn(evaluation).items():
        path = folder / f"{name}.png"
        path.write_bytes(data)
        paths.append(path)
    return paths


def drawn(evaluation: Evaluation) -> dict[str, bytes]:
    """Return the pictures of `write_plots`: name -> PNG."""
    views: dict[str, Callable[[Evaluation, Axes], None]] = {
        "precision_at_k": _precision_at_k,
        "precision_recall": _precision_recall,
        "classes": _classes,
    }
    if evaluation.confusion is not None and len(evaluation.classes) <= _MAX_CELLS:
        views["confusion"] = _confusion
    pictures = {}
    for name, view in views.items():
        height = _HEIGHT
        if name == "classes":
            height = max(_HEIGHT, 0.34 * min(len(evaluation.by_class), _MAX_CLASSES) + 1.4)
        # No pyplot: it would keep every figure, and choose a window system.
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        view(evaluation, axes)
        figure.suptitle(headline(evaluation), fontsize="small")
        out = BytesIO()
        figure.savefig(out, format="png", dpi=_DPI)
        pictures[name] = out.getvalue()
    return pictures


def _precision_at_k(evaluation: Evaluation, axes: Axes) -> None:
    for name, summary in evaluation.rankings.items():
        curve = summary.precision_curve
        _line(axes, name, list(curve), list(curve.values()))
    axes.set(
        xscale="log",
        xlabel="k, nearest images",
        ylabel="precision@k, relevant share",
        title="Precision at k, mean over the queries",
    )
    _finish(axes)


def _precision_recall(evaluation: Evaluation, axes: Axes) -> None:
    for name, summary in evaluation.rankings.items():
        _line(axes, name, RECALLS.tolist(), list(summary.recall_precision))
    axes.set(
        xlabel="recall, share of the relevant images found",
        ylabel="precision where it is reached",
        xlim=(0, 1),
        title="Precision by recall, mean over the queries",
    )
    _finish(axes)


def _line(axes: Axes, name: str, x: list[int] | list[float], y: list[float]) -> None:
    colour, dashes, marker = _STYLES[name]
    axes.plot(x, y, dashes, color=colour, marker=marker, markersize=4, label=name)


def _finish(axes: Axes) -> None:
    axes.grid(visible=True, alpha=0.3)
    low, _ = axes.get_ylim()
    axes.set_ylim(max(0.0, low), 1.0)
    axes.legend()


def _classes(evaluation: Evaluation, axes: Axes) -> None:
    """Draw the two stages' precision@10 beside the coarse mAP, worst class first."""
    shown = evaluation.shown_ranking
    ordered = sorted(
        evaluation.by_class.items(), key=lambda item: item[1].average_precision[shown]
    )[:_MAX_CLASSES]
    places = np.arange(len(ordered))
    at_10 = [one.precision_at_10.get(shown, np.nan) for _, one in ordered]
    mean = [one.average_precision["coarse"] for _, one in ordered]
    axes.barh(places - 0.2, at_10, 0.4, color=_STYLES[shown][0], label=f"{shown}: precision@10")
    axes.barh(
        places + 0.2, mean, 0.4, color=_STYLES["coarse"][0], hatch="//", label="coarse: mAP, full"
    )
    axes.set_yticks(places, [f"{name} ({one.n_queries:,})" for name, one in ordered])
    axes.invert_yaxis()
    cut = "" if len(ordered) == len(evaluation.by_class) else f", the worst {len(ordered)}"
    axes.set(
        xlim=(0, 1),
        xlabel="mean over the queries of the class, 0 to 1",
        ylabel="class (queries)",
        title=f"By class{cut}",
    )
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(loc="outside lower center", ncols=2)


def _confusion(evaluation: Evaluation, axes: Axes) -> None:
    counts = evaluation.confusion
    assert counts is not None
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label="share of the first ten answers")
    places = np.arange(len(evaluation.classes))
    axes.set_xticks(places, evaluation.classes, rotation=60, ha="right", fontsize="small")
    axes.set_yticks(places, evaluation.classes, fontsize="small")
    if len(places) <= 12:
        for row, column in np.argwhere(shares >= 0.005):
            value = shares[row, column]
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize="xx-small",
                color="black" if value > 0.5 else "white",
            )
    axes.set(
        xlabel="class of the answer",
        ylabel="class of the query",
        title=f"What the first ten answers are: {evaluation.shown_ranking}",
    )
