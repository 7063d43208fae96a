"""What a soak found, for people and for machines."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

from tests.soak.samples import Sample
from tests.soak.verdict import Call, CallRow, ProcessRow

WINDOWS = 60
"""Windows of a run whose 99th percentiles are drawn."""


def show(
    console: Console,
    processes: Sequence[ProcessRow],
    kinds: Sequence[CallRow],
    errors: Counter[str],
    faults: Sequence[str],
) -> None:
    """Print the tables and what is wrong."""
    table = Table("process", *("MiB", "MiB/h", "grew by", "fds", "threads", "seconds"), box=None)
    for process in processes:
        table.add_row(
            process.role,
            f"{process.memory_mib:.0f}",
            f"{process.slope_mib_per_h:+.1f}",
            f"{process.growth_mib:+.1f}",
            f"{process.more_descriptors:+g}",
            f"{process.more_threads:+g}",
            f"{process.life_s:.0f}",
        )
    console.print(table)
    table = Table("call", "n", "failed", "p50 ms", "p99 ms, by thirds", box=None)
    for kind in kinds:
        table.add_row(
            kind.call,
            f"{kind.n:,}",
            str(kind.n_failed),
            f"{kind.p50_ms:.1f}",
            "  ".join(f"{ms:.0f}" for ms in kind.p99_ms),
        )
    console.print(table)
    for text, n in errors.most_common(20):
        console.print(f"{n} x {text}", markup=False)
    console.print("\n".join(f"NOT FLAT: {fault}" for fault in faults) or "flat", markup=False)


def write(
    processes: Sequence[ProcessRow],
    kinds: Sequence[CallRow],
    faults: Sequence[str],
    minutes: float,
    path: Path,
) -> None:
    """Write the tables as JSON."""
    content = {
        "minutes": minutes,
        "processes": [asdict(row) for row in processes],
        "calls": [asdict(row) for row in kinds],
        "faults": list(faults),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(
    samples: Sequence[Sample],
    calls: Sequence[Call],
    events: Sequence[tuple[float, str]],
    began_s: float,
    path: Path,
) -> None:
    """Draw memory, descriptors, threads and latencies over time."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for taken in samples:
        lives[taken.role, taken.pid].append(taken)
    roles = sorted({role for role, _ in lives})
    colours = {role: f"C{n}" for n, role in enumerate(roles)}
    figure, axes = plt.subplots(4, 1, figsize=(10, 12), sharex=True, layout="constrained")
    for (role, _), life in lives.items():
        minutes = [(taken.at_s - began_s) / 60 for taken in life]
        for axis, field in zip(axes, ("anonymous_mib", "descriptors", "threads"), strict=False):
            values = [getattr(taken, field) for taken in life]
            axis.plot(minutes, values, color=colours[role], lw=1, label=role)
    for axis, title in zip(axes, ("own memory, MiB", "descriptors", "threads"), strict=False):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    firsts = dict(zip(labels, handles, strict=True))
    axes[0].legend(firsts.values(), firsts.keys(), fontsize=8, ncols=3)
    _plot_latencies(axes[3], calls, began_s)
    for axis in axes:
        for at_s, name in events:
            axis.axvline((at_s - began_s) / 60, color="grey", lw=0.8, ls=":")
            if axis is axes[0]:
                axis.text((at_s - began_s) / 60, axis.get_ylim()[1], name, fontsize=7, va="bottom")
    axes[3].set_xlabel("minutes")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_latencies(axis: mpl.axes.Axes, calls: Sequence[Call], began_s: float) -> None:
    axis.set_title("99th percentile of a call, ms", loc="left", fontsize=10)
    axis.set_yscale("log")
    if not calls:
        return
    last_s = max(call.at_s for call in calls) - began_s
    edges_s = np.linspace(0, last_s, WINDOWS + 1)
    kinds: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        kinds[call.call].append(call)
    busiest = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:6]
    for kind in busiest:
        at_s = np.array([call.at_s - began_s for call in kinds[kind]])
        ms = np.array([call.ms for call in kinds[kind]])
        window = np.clip(np.searchsorted(edges_s, at_s) - 1, 0, WINDOWS - 1)
        present = [n for n in range(WINDOWS) if (window == n).any()]
        p99 = [float(np.percentile(ms[window == n], 99)) for n in present]
        axis.plot([edges_s[n + 1] / 60 for n in present], p99, lw=1, label=kind)
    axis.legend(fontsize=8, ncols=3)
