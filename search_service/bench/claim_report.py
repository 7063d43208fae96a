"""The claim's numbers, for people: cases, stages, memory, and which targets are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from search_service.bench.claim_ask import IN_FLIGHT, STAGES
from search_service.bench.report import Measured, Report

PAPER = (
    "the claim to beat: 2.5 million images, the 1000 most similar in about 1 s "
    "(Lin et al. 2015, section 4)"
)
_CLAIM_ROWS = 2_500_000
_CLAIM_DIM = 4096


def targets(rows: int, dim: int, warm: Sequence[Measured], ready_s: float) -> list[dict[str, Any]]:
    """Return each target with what was measured and whether it is met."""
    by_case = {line.case: line for line in warm}
    small = by_case["embedding, automatic ball, warm"]
    large = by_case["embedding, a tenth of the rows, warm"]
    is_whole = rows >= _CLAIM_ROWS and dim >= _CLAIM_DIM
    return [
        {
            "target": name,
            "limit": limit,
            "measured": value,
            "met": value <= limit,
            "at_full_size": is_whole,
        }
        for name, limit, value in (
            ("automatic ball, warm, p50 in ms", 15.0, small.ours_ms),
            ("automatic ball, warm, p99 in ms", 50.0, small.extra["p99_ms"]),
            ("a tenth of the rows, warm, p50 in ms", 1000.0, large.ours_ms),
            ("restart to ready in s", 5.0, ready_s),
        )
    ]


class ClaimReport(Report):
    """A report with stages and targets."""

    def shown(self) -> RenderableType:
        """Return the tables, ready to print."""
        return Group(
            f"bench claim on {self.machine.summary()}",
            "",
            *self._facts(),
            "",
            self._cases(),
            "",
            self._stages(),
            "",
            self._targets(),
            "",
            PAPER,
            "wall: at the caller, over gRPC. Warm: every query was asked before. Cold: no feature",
            "in memory; what was read from disk shows it. Answers were checked by brute force.",
        )

    def _facts(self) -> list[str]:
        settings = self.settings
        facts = []
        for name, built in settings["build"].items():
            if built is not None:
                facts.append(
                    f"built {name}: {built['items']:,} rows in {built['seconds']:,.0f} s, "
                    f"{built['items_per_s']:,.0f} items/s; then in memory: search "
                    f"{built['search_anonymous_mb']:,.0f} MB, store {built['server_mb']:,.0f} MB"
                )
        restart, memory = settings["restart"], settings["memory_mb"]
        parts = ", ".join(f"{name} {took_s:.2f}" for name, took_s in restart["stages_s"].items())
        facts.append(
            f"restart to ready {restart['ready_s']:.2f} s (slowest {restart['slowest_s']:.2f}), "
            f"to writable {restart['writable_s']:.2f} s; of that in s: {parts}"
        )
        facts.append(
            f"resident memory at the end: search {memory['search_anonymous']:,.0f} MB of its own, "
            f"{memory['search_files']:,.0f} MB of mapped files; store {memory['server']:,.0f} MB"
        )
        return facts

    def _cases(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("case", no_wrap=True)
        headings = ("rows", "bits", "dim", "pool", "cut", "p50 ms", "p95", "p99")
        for heading in (*headings, "queries/s", f"with {IN_FLIGHT}", "MB read"):
            table.add_column(heading, justify="right")
        for line in self.results:
            extra = line.extra
            pool = extra["pool_rows"]
            table.add_row(
                line.case,
                f"{line.rows:,}",
                str(line.bits),
                str(extra["dim"]),
                f"{pool['least']:,}-{pool['most']:,}",
                f"{extra['truncated']}/{extra['asks']}",
                *(f"{ms:,.1f}" for ms in (line.ours_ms, extra["p95_ms"], extra["p99_ms"])),
                _rate(extra.get("queries_per_s")),
                _rate(extra.get("queries_per_s_8_in_flight")),
                _rate(extra.get("read_mb")),
            )
        return table

    def _stages(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("p50/p95/p99 in ms", no_wrap=True)
        for stage in STAGES:
            table.add_column(stage, justify="right")
        for line in self.results:
            stages: Mapping[str, Mapping[str, float]] = line.extra["stages_ms"]
            table.add_row(
                line.case,
                *(
                    "/".join(_short(stages[name][p]) for p in ("p50", "p95", "p99"))
                    for name in STAGES
                ),
            )
        return table

    def _targets(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("target")
        for heading in ("at most", "measured", "met"):
            table.add_column(heading, justify="right")
        for target in self.settings["targets"]:
            met = "yes" if target["met"] else "NO"
            if not target["at_full_size"]:
                met += " (smaller than the claim)"
            table.add_row(
                target["target"], f"{target['limit']:g}", f"{target['measured']:.3g}", met
            )
        return table


def _short(ms: float) -> str:
    return f"{ms:.2f}" if ms < 9.995 else f"{ms:,.0f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
