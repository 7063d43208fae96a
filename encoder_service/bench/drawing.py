"""The plots of the encoder's benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

_COLOURS = ("#E69F00", "#0072B2")


def paired_bars(
    title: str,
    labels: Sequence[str],
    pairs: tuple[tuple[str, Sequence[float]], tuple[str, Sequence[float]]],
    number_format: str,
    **axis: Any,
) -> bytes:
    """Draw two bars for each label, and return a PNG.

    Parameters
    ----------
    title
        Above all.
    labels
        One for each pair of bars, from the top.
    pairs
        Name and values of either, in the order of `labels`.
    number_format
        What is written beside a bar.
    axis
        Of the values, as `matplotlib.axes.Axes.set` takes it.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    figure, (axes,) = new_figure(1, title, 1.5 + 0.8 * len(labels))
    for number, ((name, values), colour) in enumerate(zip(pairs, _COLOURS, strict=True)):
        places = [place + 0.4 * number for place in range(len(values))]
        bars = axes.barh(places, values, 0.36, color=colour, label=name)
        shown = [format(value, number_format) for value in values]
        axes.bar_label(bars, shown, padding=3, fontsize="small")
    axes.set_yticks([place + 0.2 for place in range(len(labels))], labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(**axis)
    axes.margins(x=0.2)
    axes.legend()
    return png(figure)


def new_figure(n_axes: int, title: str, height: float) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, height), layout="constrained")
    axes = figure.subplots(1, n_axes, squeeze=False)[0]
    for one in axes:
        one.grid(visible=True, alpha=0.3)
    figure.suptitle(title, fontsize="x-small")
    return figure, axes


def png(figure: Any) -> bytes:
    """Return a figure's file."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
