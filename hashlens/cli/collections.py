"""`hashlens collections`, `hashlens replicas` and `hashlens drop`."""

from __future__ import annotations

import json

import click
from rich.table import Table

from hashlens.cli.connect import connected, targets
from hashlens.cli.text import console, counted, printable


@click.command()
@targets
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def collections(search_target: str, encoder_target: str, as_json: bool) -> None:
    """List the collections."""
    with connected(search_target, encoder_target) as client:
        found = client.collections()
    if as_json:
        listed = [
            {
                "name": info.spec.name,
                "items": info.n_items,
                "model_id": info.spec.model_id,
                "n_bits": info.spec.n_bits,
                "dim": info.spec.dim,
                "feature_dtype": info.spec.feature_dtype.value,
                "version": info.version,
                "durability": info.durability,
                "writable": info.writable,
                "detail": info.detail,
            }
            for info in found
        ]
        click.echo(json.dumps(listed, indent=2))
        return
    if not found:
        click.echo("No collection yet: `hashlens index DIR` makes one.")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "items", "bits", "feature", "model", "durability", "state"):
        table.add_column(heading, justify="right" if heading in ("items", "bits") else "left")
    for info in found:
        spec = info.spec
        table.add_row(
            spec.name,
            f"{info.n_items:,}",
            str(spec.n_bits),
            f"{spec.dim} x {spec.feature_dtype.value}" if spec.dim else "codes only",
            printable(spec.model_id[:12]),
            info.durability,
            "writable" if info.writable else f"read only: {printable(info.detail)}",
        )
    console().print(table)


@click.command()
@click.argument("name")
@targets
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def replicas(name: str, search_target: str, encoder_target: str, as_json: bool) -> None:
    """List the replicas of a collection, and how far behind their files are."""
    with connected(search_target, encoder_target) as client:
        found = client.replicas(name)
        newest = client.newest_version(name)
        answering = client.collection(name).replica_id
    # A Redis that lost writes has less than what is in files.
    version = max([newest, *(info.checkpoint_version for info in found)])
    if as_json:
        listed = [
            {
                "id": info.id,
                "address": info.address,
                "checkpoint_version": info.checkpoint_version,
                "behind": version - info.checkpoint_version,
                "erased_version": info.erased_version,
                "silent_ms": info.silent_ms,
                "live": info.live,
                "answering": info.id == answering,
            }
            for info in found
        ]
        click.echo(json.dumps(listed, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("replica", "address", "safe up to", "behind", "heard of", "state"):
        is_number = heading in ("safe up to", "behind", "heard of")
        table.add_column(heading, justify="right" if is_number else "left")
    for info in found:
        mark = " (answers)" if info.id == answering else ""
        table.add_row(
            printable(info.id[:8]) + mark,
            printable(info.address) or "none",
            f"{info.checkpoint_version:,}",
            f"{version - info.checkpoint_version:,}",
            f"{info.silent_ms / 1000:,.0f} s ago",
            "live" if info.live else "not waited for",
        )
    console().print(table)


@click.command()
@click.argument("name")
@targets
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(name: str, search_target: str, encoder_target: str, yes: bool) -> None:
    """Remove a collection and all in it."""
    with connected(search_target, encoder_target) as client:
        n_items = client.collection(name).n_items
        if not yes:
            click.confirm(f"Remove {name} with its {counted(n_items, 'item')}?", abort=True)
        client.drop_collection(name)
    click.echo(f"{name} is gone ({counted(n_items, 'item')}).")
