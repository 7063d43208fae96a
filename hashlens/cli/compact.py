"""`hashlens compact`."""

from __future__ import annotations

import dataclasses
import json

import click

from hashlens.cli.connect import connected, targets
from hashlens.cli.text import counted, printable
from hashlens.types import CompactResult

COMPACT_DEADLINE_S = 3600.0
"""Time for it: all that is alive is copied, if need be from disk."""


@click.command()
@click.argument("collection")
@targets
@click.option("--wait", is_flag=True, help="Also wait for all other replicas.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all files.")
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(min=0, min_open=True),
    default=COMPACT_DEADLINE_S,
    show_default=True,
    help="Time for it, in seconds.",
)
@click.pass_context
def compact(
    ctx: click.Context,
    collection: str,
    search_target: str,
    encoder_target: str,
    wait: bool,
    as_json: bool,
    deadline_s: float,
) -> None:
    """Erase the bytes of replaced and deleted items, and print a receipt.

    Searching and writing go on. The exit status is 0 only if all is gone: from the files of every
    live replica, from the log, and from the file of Redis.
    """
    with connected(search_target, encoder_target) as client:
        result = client.compact(collection, wait_for_replicas=wait, deadline_s=deadline_s)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        for line in receipt(collection, result):
            click.echo(line)
    ctx.exit(0 if result.complete else 1)


def receipt(collection: str, result: CompactResult) -> list[str]:
    """Return what became of the bytes, a line for each place."""
    lines = [
        f"{collection}: {counted(result.n_rows_erased, 'row')} erased, "
        f"all that were dead at version {result.version}"
    ]
    for file in result.files:
        state = "gone" if file.gone else "still there"
        lines.append(f"  {state}: {printable(file.path)} ({file.length_bytes:,} bytes)")
    lines.append(f"  log in Redis: nothing that was written up to {result.log_begins_after}")
    lines.append(
        "  file of Redis: written anew"
        if result.redis_rewritten
        else "  file of Redis: not written anew, or that cannot be told"
    )
    for replica in result.replicas:
        where = f" at {printable(replica.address)}" if replica.address else ""
        live = "" if replica.live else f", silent for {replica.silent_ms / 1000:.0f} s"
        lines.append(f"  replica {replica.id}{where}: erased up to {replica.erased_version}{live}")
    lines.append("complete" if result.complete else "not complete: ask again later")
    return lines
