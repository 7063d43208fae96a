"""`hashlens bench growth`: how time and memory grow with the table."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import click
import numba

from hashlens.cli.text import console
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from search_service.bench import machine, peers, timing
from search_service.bench.asker import Asker, check_same, planted, snapshot_of
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import make_codes
from search_service.bench.report import Measured, Report
from search_service.multi_index import MultiIndex

_SMALL_RADIUS_BITS = 4
_QUERIES = 16
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


@dataclass(frozen=True, kw_only=True)
class GrowthConfig(BenchConfig):
    """Options of `hashlens bench growth`."""

    from_rows: int = setting(10_000, "Smallest table.")
    to_rows: int = setting(10_000_000, "Largest table; each is ten times the one before.")
    bits: int = setting(64, "Code length.")
    k: int = setting(1000, "Nearest rows that are asked for.")
    codes: Literal["uniform", "trained"] = setting("uniform", "How codes are drawn.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.from_rows <= self.to_rows:
            raise InvalidInputError("from_rows is 1 to to_rows", field="from_rows")


@click.command()
@options(GrowthConfig, "bench")
def growth(config: GrowthConfig) -> None:
    """Measure one query over tables of growing size, and the memory that they take.

    \b
    nearest        the k nearest by scan
    within, scan   all rows within 4 bits by scan; a neighbour is planted
    within, index  the same by multi-index hashing, whether or not it would be chosen
    """
    check_outputs(config)
    names = config.peers(peers.COARSE)
    if config.threads:
        numba.set_num_threads(config.threads)
    log = console(stderr=True)
    results: list[Measured] = []
    rows = config.from_rows
    while rows <= config.to_rows:
        log.print(f"{rows:,} rows ...")
        results += _measure(config, rows, names)
        rows *= 10
    publish(Report("growth", machine.describe(), results, {"codes": config.codes}), config, drawn)


def _measure(config: GrowthConfig, rows: int, names: list[str]) -> list[Measured]:
    table = make_codes(config.codes, rows, config.bits, n_queries=_QUERIES, seed=config.seed)
    snapshot = snapshot_of(table)
    k, radius = min(config.k, rows), min(_SMALL_RADIUS_BITS, config.bits)
    near = planted(table, _QUERIES, config.seed)
    asker, small = Asker(snapshot, table), Asker(snapshot, near)
    index = MultiIndex().extended(snapshot)
    asker.check(0, k=k, radius_bits=radius)
    for query in range(_QUERIES):
        small.check_index(index, query, radius)
    contenders = {
        "nearest": lambda i: asker.nearest(i, k),
        "within, scan": lambda i: small.pool(i, radius_bits=radius),
        "within, index": lambda i: small.by_index(index, i, radius),
    }
    for name in names:
        nearest = peers.open_peer(name, table.packed, numba.get_num_threads()).nearest
        if nearest is not None:
            check_same(name, nearest(table.queries[:1], k)[0], asker.nearest(0, k)[1])
            contenders[name] = lambda i, of=nearest: of(table.queries[i % _QUERIES :][:1], k)  # type: ignore[misc]
    times = timing.interleaved(contenders, repeats=config.repeats)
    code_mb = sum(word.nbytes for word in snapshot.words) / 1e6
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    memory = {"codes_mb": code_mb, "index_mb": index.nbytes / 1e6, "peak_rss_mb": peak_mb}
    return [
        Measured(
            case=case,
            rows=rows,
            bits=config.bits,
            k=k if case == "nearest" else 0,
            ours_ms=times[case].median_ms,
            peer_ms={n: times[n].median_ms for n in names if n in times and case == "nearest"},
            gb_per_s=None if case == "within, index" else code_mb / times[case].median_ms,
            recall=1.0,
            extra=memory if case == "nearest" else {},
        )
        for case in ("nearest", "within, scan", "within, index")
    ]


def drawn(report: Report) -> bytes:
    """Draw time and memory over the rows, and return a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    lines: dict[str, tuple[list[int], list[float]]] = {}
    memory: dict[str, tuple[list[int], list[float]]] = {}
    for result in report.results:
        _add(lines, result.case, result.rows, result.ours_ms)
        for peer, ms in result.peer_ms.items():
            _add(lines, f"{peer}, {result.case}", result.rows, ms)
        for name in ("codes_mb", "index_mb"):
            if name in result.extra:
                _add(memory, name.removesuffix("_mb"), result.rows, result.extra[name])
    for axes, shown in ((time_axes, lines), (memory_axes, memory)):
        for number, (name, (rows, values)) in enumerate(shown.items()):
            axes.plot(rows, values, "o-", color=_COLOURS[number % len(_COLOURS)], label=name)
        axes.set(xscale="log", yscale="log", xlabel="rows (logarithmic)")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    time_axes.set(ylabel="milliseconds for one query, median (logarithmic)", title="Time")
    memory_axes.set(ylabel="megabytes (logarithmic)", title="Memory")
    figure.suptitle(f"bench growth\n{report.machine.summary()}", fontsize="x-small")
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _add(
    lines: dict[str, tuple[list[int], list[float]]], name: str, rows: int, value: float
) -> None:
    xs, ys = lines.setdefault(name, ([], []))
    xs.append(rows)
    ys.append(value)
