"""`hashlens evaluate`."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import click

from encoder_service.evaluation.config import EvaluateConfig
from hashlens.cli.connect import secured
from hashlens.cli.processes import interruptible
from hashlens.cli.progress import Advance, step
from hashlens.cli.text import console, printable
from hashlens.config import options
from hashlens.errors import HashlensError, PreconditionError

KEPT_LOG_LINES = 40


@click.command()
@secured
@options(EvaluateConfig, "evaluate")
def evaluate(config: EvaluateConfig) -> None:
    """Measure what codes are worth, on any labelled images.

    Encodes the images, stores and searches them through both services, which it starts unless it
    is told where they are, or with --local in this process. Compares the coarse and the two-stage
    search with exhaustive search by F7 (the ceiling) and with LSH and ITQ (the floor).

    \b
    --protocol split            test images among themselves (the default)
               lin2015          test images among the training images: the paper's
               unseen-classes   test images of classes that training left out
    """
    from encoder_service.evaluation.run import evaluate_model
    from encoder_service.evaluation.table import meaning, shown

    _check_outputs(config)
    log = console(stderr=True)
    lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
    try:
        with interruptible(), _steps() as on_progress:
            found = evaluate_model(
                config, on_progress, lambda name, line: lines.append(f"{name:<7} | {line}")
            )
    except HashlensError:
        for line in lines:
            log.print(printable(line), soft_wrap=True)
        raise
    plain = json.dumps(found.evaluation.to_json(), indent=2, ensure_ascii=False)
    if config.json == Path("-"):
        click.echo(plain)
    else:
        out = console()
        out.print(shown(found.evaluation))
        out.print(meaning(found.evaluation))
    if config.json is not None and config.json != Path("-"):
        config.json.write_text(plain + "\n", "utf-8")
        log.print(f"json    {printable(str(config.json))}")
    if config.plot is not None:
        from encoder_service.evaluation.plots import write_plots

        for path in write_plots(found.evaluation, config.plot):
            log.print(f"plot    {printable(str(path))}")
    if config.html is not None:
        from encoder_service.evaluation.page import report_page

        config.html.write_text(report_page(found), "utf-8")
        log.print(f"report  {printable(str(config.html))}")


def _check_outputs(config: EvaluateConfig) -> None:
    """Find out now, not after minutes, that a result cannot be written."""
    if (config.plot or config.html) and find_spec("matplotlib") is None:
        raise PreconditionError("plots need matplotlib: pip install 'hashlens[train]'")
    for path in (config.json, config.html):
        if path is not None and path != Path("-") and not path.parent.is_dir():
            raise click.UsageError(f"there is no folder {path.parent} to write {path.name} into")
    if config.plot is not None:
        config.plot.mkdir(parents=True, exist_ok=True)


@contextmanager
def _steps() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show one step after the other; a step that reports nothing is not shown."""
    log = console(stderr=True)
    with ExitStack() as open_step:

        def begin(what: str) -> Callable[[int, int], None]:
            open_step.close()
            advance: Advance | None = None
            seen = 0

            def tell(done: int, total: int) -> None:
                nonlocal advance, seen
                if advance is None:
                    unit = "queries" if what.startswith(("Ranking", "Searching")) else "images"
                    advance = open_step.enter_context(step(log, what, total, unit))
                advance(done - seen)
                seen = done

            return tell

        yield begin
