"""What a benchmark found: as a table, as JSON, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from hashlens.errors import HashlensError

if TYPE_CHECKING:  # It imports Numba, and `hashlens --help` reads this module.
    from search_service.bench.machine import Machine


class WrongAnswerError(HashlensError):
    """A benchmark's answer is not what brute force says, so its time means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of a benchmark."""

    case: str
    """What was asked, in a few words."""
    rows: int
    bits: int
    """Code length."""
    k: int
    """Answers wanted of each query; 0 where that has no meaning."""
    ours_ms: float
    """Median for one query, of a batch its share."""
    peer_ms: Mapping[str, float] = field(default_factory=dict)
    """Peer -> its median for the same."""
    gb_per_s: float | None = None
    """Bytes that the definition of the work has to read, by the time it took."""
    recall: float | None = None
    """Share of brute force's answer that ours has; anything below 1 must be of a form that says
    so."""
    peer_recall: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What this benchmark measures besides, by name with its unit: ``p99_ms``, ``calls_per_s``."""

    @property
    def ratio(self) -> dict[str, float]:
        """How many times faster than each peer."""
        return {name: ms / self.ours_ms for name, ms in self.peer_ms.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "case": self.case,
            "rows": self.rows,
            "bits": self.bits,
            "k": self.k,
            "ours_ms": self.ours_ms,
            "peer_ms": dict(self.peer_ms),
            "ratio": self.ratio,
            "gb_per_s": self.gb_per_s,
            "recall": self.recall,
            "peer_recall": dict(self.peer_recall),
            **self.extra,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's lines and where they were measured."""

    bench: str
    machine: Machine
    results: Sequence[Measured]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was told, for who repeats it."""

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "bench": self.bench,
            "machine": self.machine.to_json(),
            "settings": dict(self.settings),
            "results": [result.to_json() for result in self.results],
        }

    def shown(self) -> RenderableType:
        """Return the table, ready to print."""
        peers = _names(result.peer_ms for result in self.results)
        table = Table(box=None, pad_edge=False)
        table.add_column("case", overflow="fold")
        for heading in ("rows", "bits", "k", "ours ms", *peers, "GB/s", "recall"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("besides", overflow="fold")
        for result in self.results:
            cells = [f"{result.rows:,}", str(result.bits), f"{result.k:,}", _number(result.ours_ms)]
            for peer in peers:
                ratio = result.ratio.get(peer)
                cells.append(
                    "-" if ratio is None else f"{_number(result.peer_ms[peer])} {ratio:.2f}x"
                )
            besides = ", ".join(f"{name} {_number(value)}" for name, value in result.extra.items())
            cells += [_number(result.gb_per_s), _number(result.recall), besides]
            table.add_row(result.case, *cells)
        return Group(
            f"bench {self.bench} on {self.machine.summary()}",
            "",
            table,
            "",
            "ms x: a peer's time, and how many times longer that is. Medians of one query; of a "
            "batch its share.",
        )


def drawn(report: Report) -> bytes:
    """Draw the lines as bars, ours beside each peer's, and return a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = ["ours", *_names(result.peer_ms for result in report.results)]
    height = max(3.0, 0.9 + 0.22 * (len(names) + 1) * len(report.results))
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.add_subplot()
    # Okabe and Ito's colours, told apart with any colour vision.
    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999"]
    step = 1 / (len(names) + 1)
    for number, name in enumerate(names):
        places, widths = [], []
        for line, result in enumerate(report.results):
            ms = result.ours_ms if name == "ours" else result.peer_ms.get(name)
            if ms is not None:
                places.append(line + number * step)
                widths.append(ms)
        bars = axes.barh(places, widths, 0.9 * step, color=colours[number % 7], label=name)
        axes.bar_label(bars, [_number(width) for width in widths], padding=3, fontsize="x-small")
    labels = [f"{result.case}\n{result.rows:,} x {result.bits} bits" for result in report.results]
    axes.set_yticks([line + step * (len(names) - 1) / 2 for line in range(len(labels))], labels)
    axes.tick_params(axis="y", labelsize="small")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="milliseconds for one query, median (logarithmic)")
    axes.margins(x=0.15)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.legend()
    figure.suptitle(f"bench {report.bench}\n{report.machine.summary()}", fontsize="x-small")
    out = BytesIO()
    figure.savefig(
        out, format="png", dpi=120, metadata={"Software": f"matplotlib {mpl.__version__}"}
    )
    return out.getvalue()


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return all keys, in the order in which they appear."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _number(value: Any) -> str:
    """Return a number for people, three digits of it."""
    if value is None:
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"
