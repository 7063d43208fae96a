"""`hashlens verify`."""

from __future__ import annotations

import json

import click

from hashlens.cli.connect import connected, targets
from hashlens.cli.text import console, counted, printable
from hashlens.types import VerifyResult

VERIFY_DEADLINE_S = 3600.0
"""Time for a check: the server reads everything, if need be from disk."""

_SHOWN = 20


@click.command()
@click.argument("collection")
@targets
@click.option("--repair", is_flag=True, help="Make the files anew if anything differs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all differences.")
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(min=0, min_open=True),
    default=VERIFY_DEADLINE_S,
    show_default=True,
    help="Time for it, in seconds.",
)
@click.pass_context
def verify(
    ctx: click.Context,
    collection: str,
    search_target: str,
    encoder_target: str,
    repair: bool,
    as_json: bool,
    deadline_s: float,
) -> None:
    """Compare Redis with a replica's files, and check every checksum.

    Searching and writing go on. The exit status is 0 only if nothing differs, or all was mended.
    """
    with connected(search_target, encoder_target) as client:
        found = client.verify(collection, repair=repair, deadline_s=deadline_s)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
    else:
        for line in found.differences[:_SHOWN]:
            click.echo(printable(line))
        if found.n_differences > _SHOWN:
            click.echo(f"and {found.n_differences - _SHOWN:,} more; --json lists a thousand")
        console().print(_verdict(collection, found), highlight=False)
    ctx.exit(0 if found.n_differences == found.n_repaired else 1)


def _verdict(collection: str, found: VerifyResult) -> str:
    line = (
        f"{collection} at version {found.version}: {counted(found.n_catalog_items, 'item')} in "
        f"Redis, {found.n_array_items:,} in the files, "
    )
    if not found.n_differences:
        return f"{line}nothing differs · digest {found.digest.hex()}"
    line += counted(found.n_differences, "difference")
    return f"{line}, {found.n_repaired:,} mended" if found.n_repaired else line


def _plain(found: VerifyResult) -> dict[str, object]:
    return {
        "version": found.version,
        "n_catalog_items": found.n_catalog_items,
        "n_array_items": found.n_array_items,
        "differences": list(found.differences),
        "n_differences": found.n_differences,
        "n_repaired": found.n_repaired,
        "digest": found.digest.hex(),
    }
