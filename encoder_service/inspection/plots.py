"""Code health as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hashlens.codehealth import DEAD_RATE, MARGIN_BINS, UNSURE_MARGIN, CodeHealth

_DPI = 120


def write_plots(health: CodeHealth, folder: Path) -> list[Path]:
    """Write a PNG for each thing that was found.

    Parameters
    ----------
    health
        What was found.
    folder
        Where; made if it is missing. Files of the same names are replaced.

    Returns
    -------
    list of Path
        The files: `fire_rates`, `correlations`, `pools`, `buckets` and, where there are
        activations, `margins`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = {
        "fire_rates": _fire_rates,
        "correlations": _correlations,
        "pools": _pools,
        "buckets": _buckets,
    }
    if health.margins is not None:
        draw["margins"] = _margins
    paths = []
    for name, drawing in draw.items():
        # No pyplot: it would keep every figure, and choose a window system.
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        drawing(health, figure.add_subplot())
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DPI)
        paths.append(path)
    return paths


def _fire_rates(health: CodeHealth, axes: Axes) -> None:
    axes.bar(np.arange(health.n_bits), health.fire_rates, width=0.9)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--", label="says most")
    axes.axhspan(0, DEAD_RATE, color="tab:red", alpha=0.5, label="dead")
    axes.axhspan(1 - DEAD_RATE, 1, color="tab:red", alpha=0.5)
    axes.set(
        xlabel="bit",
        ylabel="share of rows in which it is set",
        ylim=(0, 1),
        title=f"Fire rates: {len(health.dead_bits)} of {health.n_bits} bits are dead",
    )
    axes.legend()


def _correlations(health: CodeHealth, axes: Axes) -> None:
    shown = axes.imshow(health.correlations, vmin=-1, vmax=1, cmap="RdBu")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(shown, ax=axes, label="Pearson's r")
    axes.set(
        xlabel="bit",
        ylabel="bit",
        title=f"Correlation of bits: |r| {health.mean_correlation:.2f} on average, "
        f"{health.max_correlation:.2f} at most",
    )


def _pools(health: CodeHealth, axes: Axes) -> None:
    thresholds = np.arange(health.n_bits + 1)
    for sizes, style, label in (
        (health.pool_p95, ":", "95th percentile"),
        (health.pool_mean, "-", "mean"),
        (health.pool_median, "--", "median"),
    ):
        axes.plot(thresholds, sizes, style, label=label)
    axes.axhline(
        health.wanted_rows,
        color="black",
        linewidth=0.8,
        label=f"wanted: {health.wanted_rows:,} rows",
    )
    axes.set(
        xlabel="Hamming threshold, bits",
        ylabel="rows in the pool",
        yscale="log",
        title=f"Pool size by threshold, {health.n_rows:,} rows",
    )
    axes.legend()


def _buckets(health: CodeHealth, axes: Axes) -> None:
    sizes = health.bucket_sizes
    axes.step(np.arange(1, sizes.shape[0] + 1), sizes, where="mid")
    axes.set(
        xlabel="code, most common first",
        ylabel="rows that have it",
        xscale="log",
        yscale="log",
        title=f"{health.distinct_codes:,} distinct codes, as spread as "
        f"{health.effective_codes:,.0f} of equal size",
    )


def _margins(health: CodeHealth, axes: Axes) -> None:
    assert health.margins is not None
    edges = np.linspace(0, 0.5, MARGIN_BINS + 1)
    axes.stairs(health.margins.histogram / health.margins.histogram.sum(), edges, fill=True)
    axes.axvline(UNSURE_MARGIN, color="tab:red", label=f"unsure below {UNSURE_MARGIN}")
    axes.set(
        xlabel="margin |H - 0.5|",
        ylabel="share of activations",
        title=f"{100 * health.margins.unsure_share:.3g}% of the bits are unsure",
    )
    axes.legend()
