"""`hashlens bench`: a group of benchmarks, each in a module of its own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click

from hashlens.cli.text import console, printable
from hashlens.config import setting
from hashlens.errors import InvalidInputError, PreconditionError
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
    "claim": "2.5 million images, top-1000: the paper's claim, end to end.",
}
"""Name -> what it measures. Each is the click command of its name in a module of that name."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Options of every benchmark."""

    json: Path | None = setting(None, "Write the numbers there; - for standard output.")
    plot: Path | None = setting(None, "Draw them there, as PNG.")
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


def check_outputs(config: BenchConfig) -> None:
    """Find out now, not after minutes, that a result cannot be written."""
    if config.plot and find_spec("matplotlib") is None:
        raise PreconditionError("plots need matplotlib: pip install 'hashlens[bench]'")
    for path in (config.json, config.plot):
        if path is not None and path != Path("-") and not path.parent.is_dir():
            raise click.UsageError(f"there is no folder {path.parent} to write {path.name} into")


def publish(report: Report, config: BenchConfig, draw: Callable[[Report], bytes] = drawn) -> None:
    """Print a report, and write the files that were asked for."""
    if config.json == Path("-"):
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        console().print(report.shown())
    log = console(stderr=True)
    if config.json is not None and config.json != Path("-"):
        report.write_json(config.json)
        log.print(f"json  {printable(str(config.json))}")
    if config.plot is not None:
        config.plot.write_bytes(draw(report))
        log.print(f"plot  {printable(str(config.plot))}")


class _Benches(click.Group):
    """Imports a benchmark when it is asked for: Numba alone takes a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        return list(_BENCHES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one."""
        if cmd_name not in _BENCHES:
            return None
        command = getattr(importlib.import_module(f"search_service.bench.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without importing any."""
        with formatter.section("Benchmarks"):
            formatter.write_dl(list(_BENCHES.items()))


@click.group(cls=_Benches)
def bench() -> None:
    """Measure the search side, beside its peers, on this machine.

    Answers are checked against brute force before a number is printed: a wrong one fails the run.
    """
