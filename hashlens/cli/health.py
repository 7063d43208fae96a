"""`hashlens health`: does each service serve?"""

from __future__ import annotations

import json

import click
from rich.table import Table
from rich.text import Text

from hashlens.cli.connect import client_config, last_words, targets, what_to_do
from hashlens.cli.text import console, printable
from hashlens.client import Client
from hashlens.types import ServiceHealth


@click.command()
@targets
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Say whether each is ready, and why not.")
@click.pass_context
def health(
    ctx: click.Context,
    search_target: str,
    encoder_target: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Say whether each service serves.

    The exit status is 0 only if all do; with -v, only if all are ready.
    """
    config = client_config()
    with Client(search_target, encoder_target, config=config) as client:
        states = {state.target: state for state in client.health()}
    rows = [
        (name, states[target])
        for name, target in (("encoder", encoder_target), ("search", search_target))
    ]
    ok = all(state.ready if verbose else state.serving for _, state in rows)
    if as_json:
        services = [
            {
                "service": name,
                "target": state.target,
                "answered": state.answered,
                "serving": state.serving,
                "detail": state.detail,
                "ready": state.ready,
                "live": state.live,
                "reasons": list(state.reasons),
            }
            for name, state in rows
        ]
        click.echo(json.dumps({"serving": ok, "services": services}, indent=2))
    else:
        table = Table("service", "address", "state", "detail", box=None, pad_edge=False)
        for name, state in rows:
            word, style = _verdict(state) if verbose else _serves(state)
            detail = "" if state.answered else printable(last_words(state.detail))
            if verbose and state.reasons:
                detail = printable("; ".join(state.reasons))
            table.add_row(name, printable(state.target), Text(word, style), Text(detail, "dim"))
        console().print(table)
        if any(not state.answered for _, state in rows):
            click.echo(what_to_do((state for _, state in rows), config.security), err=True)
        elif not ok and not verbose:
            click.echo("`hashlens health -v` says why.", err=True)
    ctx.exit(0 if ok else 1)


def _serves(state: ServiceHealth) -> tuple[str, str]:
    """Return in a word whether a service serves, and its colour."""
    if state.serving:
        return "serving", "green"
    return ("not serving", "yellow") if state.answered else ("away", "red")


def _verdict(state: ServiceHealth) -> tuple[str, str]:
    """Return in a word how a service is, and its colour."""
    if not state.serving:
        return _serves(state)
    if not state.live:
        return "stuck", "red"
    return ("ready", "green") if state.ready else ("not ready", "yellow")
