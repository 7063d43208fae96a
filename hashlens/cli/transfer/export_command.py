"""`hashlens export`: a collection into a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from hashlens import codes
from hashlens.cli.connect import connected, targets
from hashlens.cli.ingest import CALL_DEADLINE_S
from hashlens.cli.progress import step
from hashlens.cli.text import console, counted, printable
from hashlens.cli.transfer.columns import Columns, ItemWriter, Layout
from hashlens.cli.transfer.files import suffix_of, writing
from hashlens.client import Client
from hashlens.errors import PreconditionError, UnavailableError
from hashlens.types import (
    MAX_ID_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_TAG_BYTES,
    MAX_TAGS,
    CollectionSpec,
    Embedding,
    Item,
)

EXPORT_DEADLINE_S = 86_400.0
"""Time for listing, which goes on as long as items are read: a large collection takes hours."""

REPLY_BYTES = 48 * 2**20
"""A reply is never larger, whatever payloads and tags its items have; see `limits`."""

LISTED_IDS = 100
"""Ids of items without a feature that are listed for people; ``--json`` lists all."""


@dataclass(slots=True)
class Outcome:
    """What became of the items that were there when the export began."""

    version: int
    """Items are in the file as they were at this version or later."""
    listed_version: int = 0
    """What the replica had reached that listed them."""
    n_written: int = 0
    n_vanished: int = 0
    """Deleted before they were read."""
    without_feature: list[str] = field(default_factory=list)
    """Ids that were left out."""


@click.command()
@click.argument("collection")
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@targets
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def export(
    ctx: click.Context,
    collection: str,
    file: Path,
    search_target: str,
    encoder_target: str,
    as_json: bool,
) -> None:
    """Write all items of a COLLECTION into FILE: .npz, .parquet or .arrow.

    Writing to the collection may go on: every item that is there all the time is in the file, as it
    was at the printed version or later, which has all that anyone had written before. The exit
    status is 1 if items had to be left out because the service has lost their feature.
    """
    suffix_of(file)
    with connected(search_target, encoder_target) as client:
        info = client.collection(collection)
        spec = info.spec
        layout = Layout(
            code_bytes=codes.n_bytes(spec.n_bits),
            dim=spec.dim,
            feature_dtype=spec.feature_dtype,
            n_bits=spec.n_bits,
            model_id=spec.model_id,
        )
        log = console(stderr=True)
        version = _newest(client, collection)
        with (
            writing(file, layout) as writer,
            step(log, "Exporting", info.n_items, "items") as advance,
        ):
            outcome = export_items(client, spec, layout, writer, advance, version)
    summary = {
        "collection": collection,
        "file": str(file),
        "version": outcome.version,
        "items": outcome.n_written,
        "vanished": outcome.n_vanished,
        "without_feature": outcome.without_feature,
        "bytes": file.stat().st_size,
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        for line in _described(summary, outcome):
            click.echo(line)
    ctx.exit(1 if outcome.without_feature else 0)


def _newest(client: Client, collection: str) -> int:
    """Return the version that has all writes so far, or 0 where Redis does not tell.

    Then it is the replica's items that are wanted, perhaps the only ones left.
    """
    try:
        return client.newest_version(collection)
    except (UnavailableError, PreconditionError) as error:
        click.echo(f"writes that this replica does not have are missing: {error}", err=True)
        return 0


def export_items(
    client: Client,
    spec: CollectionSpec,
    layout: Layout,
    writer: ItemWriter,
    advance: Callable[[int], None],
    version: int,
) -> Outcome:
    """Write all items of a collection; no more than some calls' worth of them is in memory.

    Parameters
    ----------
    client
        Of its services.
    spec
        The collection.
    layout
        The same, as the file says it.
    writer
        The file.
    advance
        Told how many items were done.
    version
        Every replica that is asked must have reached it; 0: whatever they have.
    """
    outcome = Outcome(version)
    absent: list[str] = []

    def read(ids: list[str], min_version: int) -> set[str]:
        items = client.get_items(
            spec.name,
            ids,
            with_feature=bool(spec.dim),
            min_version=min_version,
            deadline_s=CALL_DEADLINE_S,
        )
        whole = [item for item in items if _is_whole(item, spec)]
        if whole:
            writer.write(Columns.of(whole, layout))
        outcome.n_written += len(whole)
        outcome.without_feature += [item.id for item in items if not _is_whole(item, spec)]
        advance(len(items))
        return {item.id for item in items}

    for ids in _listed(client, spec, _ids_per_call(layout), outcome):
        there = read(ids, version)
        absent += [item_id for item_id in ids if item_id not in there]
    # Another replica, behind the one that listed them, may not have had them yet.
    step_ids = _ids_per_call(layout)
    for begin in range(0, len(absent), step_ids):
        ids = absent[begin : begin + step_ids]
        outcome.n_vanished += len(ids) - len(read(ids, outcome.listed_version))
    return outcome


def _listed(
    client: Client, spec: CollectionSpec, n_ids: int, outcome: Outcome
) -> Iterator[list[str]]:
    """Yield all ids, some at a time: the ball around any code, as wide as the code, has them."""
    centre = Embedding(bytes(codes.n_bytes(spec.n_bits)), spec.n_bits, spec.model_id)
    parts = client.stream_ball(
        spec.name,
        embedding=centre,
        radius_bits=spec.n_bits,
        with_payload=False,
        min_version=outcome.version,
        deadline_s=EXPORT_DEADLINE_S,
    )
    ids: list[str] = []
    for part in parts:
        ids += [hit.id for hit in part.hits]
        while len(ids) >= n_ids:
            yield ids[:n_ids]
            del ids[:n_ids]
        if part.receipt is not None:
            outcome.listed_version = part.receipt.version
            outcome.version = outcome.version or part.receipt.version
    if ids:
        yield ids


def _ids_per_call(layout: Layout) -> int:
    """Return of how many items a reply surely fits into a message."""
    extras_bytes = MAX_ID_BYTES + MAX_PAYLOAD_BYTES + MAX_TAGS * (MAX_TAG_BYTES + 3) + 256
    feature_bytes = layout.dim * layout.feature_dtype.n_bytes
    return max(1, REPLY_BYTES // (extras_bytes + feature_bytes))


def _is_whole(item: Item, spec: CollectionSpec) -> bool:
    return item.embedding is not None and item.embedding.dim == spec.dim


def _described(summary: dict[str, object], outcome: Outcome) -> list[str]:
    lines = [
        f"{summary['collection']}: {counted(outcome.n_written, 'item')} at version "
        f"{outcome.version} in {printable(str(summary['file']))} ({summary['bytes']:,} bytes)"
    ]
    if outcome.n_vanished:
        lines.append(f"  {counted(outcome.n_vanished, 'item')} went before being read")
    missing = outcome.without_feature
    if missing:
        lines.append(f"  left out, because the feature is missing: {counted(len(missing), 'item')}")
        lines += [f"    {printable(item_id)}" for item_id in missing[:LISTED_IDS]]
    return lines
