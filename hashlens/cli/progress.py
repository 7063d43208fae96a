"""Progress of one step: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hashlens.cli.text import duration

PLAIN_INTERVAL_S = 10.0
"""Least time between two plain lines of one step, in seconds."""

Advance = Callable[[int], None]
"""Takes how many units were done since the last call."""


@contextmanager
def step(console: Console, description: str, total: int, unit: str = "") -> Iterator[Advance]:
    """Show one step's progress on `console`.

    Parameters
    ----------
    console
        Usually that of standard error.
    description
        Few words.
    total
        Units to do.
    unit
        Plural of what is counted; shows a rate per second. Empty: no rate.
    """
    shown = _bar if console.is_terminal else _plain
    with shown(console, description, total, unit) as advance:
        yield advance


@contextmanager
def _bar(console: Console, description: str, total: int, unit: str) -> Iterator[Advance]:
    # Together at most 80 columns wide.
    columns = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=14),
        TextColumn("{task.completed:,.0f} / {task.total:,.0f}"),
    ]
    if unit:
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        columns += [_RateColumn(unit), left]
    else:
        columns.append(TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


class _RateColumn(TextColumn):
    """Units per second over the whole step."""

    def __init__(self, unit: str) -> None:
        super().__init__("")
        self._unit = unit
        self.max_refresh = 0.5

    def render(self, task: Task) -> str:  # type: ignore[override]
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        return f"{rate:,.0f} {self._unit}/s"


@contextmanager
def _plain(console: Console, description: str, total: int, unit: str) -> Iterator[Advance]:
    begun = said = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        if done < total and now - said >= PLAIN_INTERVAL_S:
            said = now
            elapsed_s = now - begun
            left = f", {duration(elapsed_s / done * (total - done))} left" if unit and done else ""
            console.print(
                f"{description}: {done:,} of {total:,}{_rate(done, elapsed_s, unit)}{left}"
            )

    console.print(f"{description} ...")
    yield advance
    elapsed_s = time.monotonic() - begun
    console.print(
        f"{description}: {done:,} of {total:,} in {duration(elapsed_s)}"
        f"{_rate(done, elapsed_s, unit)}"
    )


def _rate(done: int, elapsed_s: float, unit: str) -> str:
    return f", {done / elapsed_s:,.0f} {unit}/s" if unit and elapsed_s > 0 else ""
