"""`hashlens top`: look, show, wait; until somebody has seen enough."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import click
from rich.live import Live

from hashlens.cli.connect import ENCODER_METRICS, SEARCH_METRICS
from hashlens.cli.processes import interruptible
from hashlens.cli.text import console
from hashlens.cli.top.view import view
from hashlens.cli.top.watch import Watch

_LOOK_S = 2.0
"""Longest for one look at a service, in seconds."""

_MIN_INTERVAL_S = 0.1

_ADVICE = (
    "Services have metrics where their --metrics-listen says (`hashlens up` prints where): say so "
    "here with --encoder-metrics and --search-metrics."
)


@click.command()
@click.option(
    "--search-metrics",
    default=SEARCH_METRICS,
    show_default=True,
    envvar="HASHLENS_SEARCH_METRICS",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Where the search service has its metrics (its --metrics-listen).",
)
@click.option(
    "--encoder-metrics",
    default=ENCODER_METRICS,
    show_default=True,
    envvar="HASHLENS_ENCODER_METRICS",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Where the encoder service has them.",
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=_MIN_INTERVAL_S),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds over which rates and quantiles are taken.",
)
@click.option("--once", is_flag=True, help="Look twice, an interval apart, print, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")
@click.pass_context
def top(
    ctx: click.Context,
    search_metrics: str,
    encoder_metrics: str,
    interval_s: float,
    window_s: float,
    once: bool,
    as_json: bool,
) -> None:
    """Watch both services: calls, latency, queues, versions, Redis, memory.

    Ends with q or Ctrl-C. A service that is away is shown as that, and again when it is back. With
    --once the exit status is 0 only if both were there.
    """
    watches = [
        Watch("encoder", encoder_metrics, window_s),
        Watch("search", search_metrics, window_s),
    ]
    with ThreadPoolExecutor(len(watches)) as pool, interruptible():

        def look() -> dict[str, dict[str, Any]]:
            list(pool.map(lambda watch: watch.look(_LOOK_S), watches))
            return {watch.name: watch.describe() for watch in watches}

        try:
            if once:
                found = _once(look, interval_s)
                _print(found, as_json)
                all_up = all(service["up"] for service in found.values())
                if not all_up and not as_json:
                    click.echo(_ADVICE, err=True)
                ctx.exit(0 if all_up else 1)
            elif as_json or not console().is_terminal:
                _print_on(look, interval_s, as_json)
            else:
                _show(look, interval_s)
        except KeyboardInterrupt:
            pass  # How it ends.


def _once(look: Callable[[], dict[str, dict[str, Any]]], interval_s: float) -> dict[str, Any]:
    look()
    time.sleep(interval_s)
    return look()


def _print(found: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
    else:
        console().print(view(found))


def _print_on(
    look: Callable[[], dict[str, dict[str, Any]]], interval_s: float, as_json: bool
) -> None:
    """Print again and again, for who reads a pipe."""
    look()
    while True:
        time.sleep(interval_s)
        _print(look(), as_json)
        sys.stdout.flush()


def _show(look: Callable[[], dict[str, dict[str, Any]]], interval_s: float) -> None:
    """Show on the whole terminal until q is pressed."""
    with (
        _keys() as pressed,
        Live(
            view(look()),
            console=console(),
            screen=True,
            auto_refresh=False,
            vertical_overflow="crop",
        ) as live,
    ):
        due_s = time.monotonic() + interval_s
        while True:
            if "q" in pressed(max(due_s - time.monotonic(), 0)).lower():
                return
            if time.monotonic() >= due_s:
                live.update(view(look()), refresh=True)
                due_s = time.monotonic() + interval_s


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield what waits for keys, so many seconds at most, and returns them."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def pressed(wait_s: float) -> str:
        if not select.select([descriptor], [], [], wait_s)[0]:
            return ""
        # An end of input would be read for ever: the terminal is gone.
        return os.read(descriptor, 64).decode(errors="replace") or "q"

    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(wait_s: float) -> str:
    time.sleep(wait_s)
    return ""
