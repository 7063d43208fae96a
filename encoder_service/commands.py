"""The encoder's own commands: `hashlens train` and `hashlens inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from encoder_service.training.recipe import TrainConfig
from hashlens.config import options

# torch takes seconds to import, and `hashlens --help` reads this module: so what needs it is
# imported in the commands.
if TYPE_CHECKING:
    from encoder_service.training.datasets import OnProgress
    from encoder_service.training.fit import EpochReport, StepReport


@click.command()
@options(TrainConfig, "train")
def train(config: TrainConfig) -> None:
    """Learn codes from labelled images.

    Trains on the train split, measures on the test split, writes one checkpoint.
    """
    from encoder_service.training.run import train_model

    with _ProgressObserver(Console(stderr=True)) as observer:
        checkpoint = train_model(config, observer)
    _print_table(checkpoint.describe(), config.output)


@click.command()
@click.argument(
    "checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(checkpoint: Path | None, as_json: bool) -> None:
    """Show what a checkpoint says about itself, after checking its weights.

    Without a file: the checkpoint that comes with the package.
    """
    from encoder_service.model.checkpoint import default_checkpoint_path, load_checkpoint

    path = checkpoint or default_checkpoint_path()
    loaded = load_checkpoint(path)
    facts = {
        **loaded.describe(),
        "dim": loaded.dim,
        "parameters": sum(tensor.numel() for tensor in loaded.network.parameters()),
        "file_bytes": path.stat().st_size,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_table(facts, path)


class _ProgressObserver:
    """Shows a training on the terminal; off a terminal, one line per epoch."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._training: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, what: str) -> OnProgress:
        task = self._progress.add_task(what, total=None, note="")
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def step(self, report: StepReport) -> None:
        if self._training is None:
            self._training = self._progress.add_task("train", total=report.steps, note="")
        note = (
            f"loss {report.loss:.4f}, accuracy {report.accuracy:.4f}, "
            f"{report.images_per_s:,.0f} images/s"
        )
        self._progress.update(self._training, completed=report.step, note=note)

    def epoch(self, report: EpochReport) -> None:
        self._progress.console.print(
            f"epoch {report.epoch:3d}  loss {report.loss:.4f}  train {report.train_accuracy:.4f}  "
            f"holdout {report.holdout_accuracy:.4f}  {report.images_per_s:,.0f} images/s"
        )


def _print_table(facts: dict[str, Any], path: Path) -> None:
    table = Table("what", "value")
    table.add_row("file", str(path))
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, part in value.items():
                table.add_row(f"{name}.{key}", _text(part))
        else:
            table.add_row(name, _text(value))
    Console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
