"""`hashlens bench`: a group of benchmarks, each in a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import click

from hashlens.cli import bench as outputs
from hashlens.cli.bench import BENCHES_GROUP, OutputConfig
from hashlens.cli.bench import check_outputs as check_outputs
from hashlens.config import setting
from hashlens.errors import InvalidInputError
from search_service.bench.report import Report, drawn

_BENCHES = {
    "coarse": "Hamming distance: single queries, balls, batches, beside faiss, usearch, NumPy.",
    "fine": "Euclidean distance inside a pool: f32, f16, int8, warm and cold.",
    "search": "Both stages in this process.",
    "growth": "Time and memory from 10^4 to 10^8 rows, as a plot.",
    "pool": "Recall against exhaustive F7 for several pool policies, on real codes.",
    "serve": "Searching over gRPC, closed and open loop, beside an empty echo.",
    "cancel": "How long work goes on after its caller has left.",
    "overload": "A service at three times what it can do, and how it comes back.",
    "ingest": "Writing items through the service.",
    "restart": "From start to ready, by rows.",
    "size": "What a row takes on disks and in memory, beside the formulas.",
    "claim": "2.5 million images, top-1000: the paper's claim, end to end.",
}
"""Name -> what it measures. Each is the click command of its name in a module of that name."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(OutputConfig):
    """Options of every benchmark of the search side."""

    peer: str = setting("", "Whom to time in the same run, comma-separated; 'all' for all.")
    repeats: int = setting(25, "Rounds of which medians are taken.")
    threads: int = setting(0, "Threads of ours and of the peers; 0: as many as there are CPUs.")
    seed: int = setting(1, "Of the data.")

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise InvalidInputError("repeats is at least 1", field="repeats")

    def peers(self, known: tuple[str, ...]) -> list[str]:
        """Return the peers that were asked for, InvalidInputError for one that is not known."""
        if self.peer == "all":
            return list(known)
        asked = [name for name in self.peer.split(",") if name]
        for name in asked:
            if name not in known:
                raise InvalidInputError(
                    f"{name} is no peer here: choose of {', '.join(known)}", field="peer"
                )
        return asked


def publish(report: Report, config: OutputConfig, draw: Callable[[Report], bytes] = drawn) -> None:
    """Print a report, and write the files that were asked for."""
    outputs.publish(report, config, draw)


class _Benches(click.Group):
    """Imports a benchmark when it is asked for: Numba alone takes a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names, ours first."""
        return [*_BENCHES, *sorted(entry_points(group=BENCHES_GROUP).names)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one."""
        if cmd_name in _BENCHES:
            module = importlib.import_module(f"search_service.bench.{cmd_name}")
            command = getattr(module, cmd_name)
        else:
            added = entry_points(group=BENCHES_GROUP, name=cmd_name)
            if not added:
                return None
            command = added[cmd_name].load()
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them; ours without importing any."""
        lines = list(_BENCHES.items())
        for name in self.list_commands(ctx)[len(lines) :]:
            command = self.get_command(ctx, name)
            assert command is not None
            lines.append((name, command.get_short_help_str(100)))
        with formatter.section("Benchmarks"):
            formatter.write_dl(lines)


@click.group(cls=_Benches)
def bench() -> None:
    """Measure both services on this machine, beside peers or bare loops.

    Answers are checked before a number is printed, the search side's against brute force: a wrong
    one fails the run.
    """
