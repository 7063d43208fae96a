"""What every benchmark has, whichever service it measures: its files, and the machine's name."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from rich.console import RenderableType

from hashlens.cli.text import console, printable
from hashlens.config import setting
from hashlens.errors import PreconditionError

BENCHES_GROUP = "hashlens.bench"
"""Entry points that name further commands of `hashlens bench`; a service registers its own."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a benchmark's numbers go."""

    json: Path | None = setting(None, "Write the numbers there; - for standard output.")
    plot: Path | None = setting(None, "Draw them there, as PNG.")


class Found(Protocol):
    """What a benchmark found."""

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""

    def shown(self) -> RenderableType:
        """Return the table, ready to print."""


F = TypeVar("F", bound=Found)


def check_outputs(config: OutputConfig) -> None:
    """Find out now, not after minutes, that a result cannot be written."""
    if config.plot and find_spec("matplotlib") is None:
        raise PreconditionError("plots need matplotlib: pip install 'hashlens[bench]'")
    for path in (config.json, config.plot):
        if path is not None and path != Path("-") and not path.parent.is_dir():
            raise click.UsageError(f"there is no folder {path.parent} to write {path.name} into")


def publish(report: F, config: OutputConfig, draw: Callable[[F], bytes]) -> None:
    """Print a report, and write the files that were asked for."""
    if config.json == Path("-"):
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        console().print(report.shown())
    log = console(stderr=True)
    if config.json is not None and config.json != Path("-"):
        config.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", "utf-8")
        log.print(f"json  {printable(str(config.json))}")
    if config.plot is not None:
        config.plot.write_bytes(draw(report))
        log.print(f"plot  {printable(str(config.plot))}")


def cpu_name() -> str:
    """Return what the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has taken, in seconds; NaN where that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
