"""Learning codes: `hashlens train` and `hashlens sweep`."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

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

from encoder_service.inspection.tables import print_facts
from encoder_service.training.recipe import RECIPES, TrainConfig
from encoder_service.training.sweep import (
    SweepConfig,
    cells,
    is_done,
    read_results,
    run_cell,
    table,
)
from hashlens.cli.text import console, printable
from hashlens.config import options

# torch takes seconds to import, and `hashlens --help` reads this module: so what needs it is
# imported in the commands.
if TYPE_CHECKING:
    from encoder_service.data.types import OnProgress
    from encoder_service.training.fit import StepReport
    from encoder_service.training.history import EpochReport


@click.command()
@options(TrainConfig, "train", preset_field="recipe", presets=RECIPES)
def train(config: TrainConfig) -> None:
    """Learn codes from labelled images.

    Trains on the train split, measures on the test split, writes one checkpoint. Interrupted, it
    goes on where it was when it is started again. On several devices: torchrun
    --nproc-per-node N --no-python -- hashlens train ...

    \b
    --recipe orthohash       orthogonal targets, cosine with a margin: the default
             csq             a centre for each class, bit by bit
             ssdh            classes, a push away from 0.5, half of the bits at 1
             lin2015-modern  the network and the loss of 2015, trained from scratch
             lin2015         the author's, from ImageNet's AlexNet
    """
    from encoder_service.training.run import train_model

    leads = os.environ.get("RANK", "0") == "0"
    with _ProgressObserver(Console(stderr=True, quiet=not leads)) as observer:
        checkpoint = train_model(config, observer)
    if leads:
        print_facts(console(), {"file": str(config.output), **checkpoint.describe()})


@click.command()
@options(SweepConfig, "sweep")
def sweep(config: SweepConfig) -> None:
    """Train and evaluate recipes, backbones and code lengths; print the table.

    Each combination leaves a JSON file in --output; those that are there are not made again, and an
    interrupted training goes on where it was. So the table can be made in many sittings.
    """
    from encoder_service.data.source import open_split

    terminal = Console(stderr=True)
    todo = cells(config)
    config.output.mkdir(parents=True, exist_ok=True)
    classes = open_split(config, "test").classes
    for number, cell in enumerate(todo, 1):
        if is_done(config, cell, classes):
            continue
        name = cell.path(config.output).stem
        terminal.print(f"{number} of {len(todo)}: {name}", highlight=False)
        with _ProgressObserver(terminal) as observer:
            run_cell(config, cell, classes, observer)
    click.echo(table(read_results(config.output)), nl=False)


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
            f"hold-out {report.holdout_accuracy:.4f}  mAP {report.holdout_map:.4f}  "
            f"{report.images_per_s:,.0f} images/s"
        )

    def note(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False)
