"""`hashlens search`: the images most similar to one."""

from __future__ import annotations

import json
import math
import stat
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from hashlens import convert
from hashlens.cli.audited import AUDIT_DEADLINE_S, audit_dict, audit_line, audit_table
from hashlens.cli.connect import collection_option, connected, targets
from hashlens.cli.explained import Words, differing
from hashlens.cli.extras import require
from hashlens.cli.text import console, printable, short_path
from hashlens.errors import InvalidInputError
from hashlens.types import (
    MAX_K,
    AuditResult,
    Hit,
    Rank,
    Receipt,
    SearchOptions,
    SearchResult,
    TagFilter,
)

_MAX_COUNT = 2**32 - 1
"""The largest number that the contract can carry."""

_SHOWN_BITS = 8
"""Differing bits of one hit in a table."""

MAX_QUERY_BYTES = 64 * 2**20
"""Larger files are refused before they are read."""


@click.command()
@click.argument(
    "image", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--id", "item_id", help="Search by an image that is in already, instead of IMAGE.")
@click.option("-k", type=click.IntRange(1, MAX_K), default=10, show_default=True, help="Answers.")
@collection_option
@click.option(
    "--max-hamming",
    type=click.IntRange(0, _MAX_COUNT),
    metavar="BITS",
    help="Look at all images within this Hamming distance, instead of --min-pool.",
)
@click.option(
    "--min-pool",
    type=click.IntRange(0, _MAX_COUNT),
    default=SearchOptions().min_pool,
    show_default=True,
    help="Least number of images that the fine stage looks at.",
)
@click.option("--max-pool", type=click.IntRange(1, _MAX_COUNT), help="Most that it looks at.")
@click.option(
    "--rank",
    type=click.Choice([rank.value for rank in Rank]),
    default=Rank.AUTO.value,
    show_default=True,
    help="What orders the answers.",
)
@click.option(
    "--tag-any", multiple=True, metavar="TAG", help="Only images with this tag or another so given."
)
@click.option("--tag-all", multiple=True, metavar="TAG", help="Only images with this tag.")
@click.option("--tag-none", multiple=True, metavar="TAG", help="Only images without this tag.")
@click.option(
    "--ignore-margins",
    is_flag=True,
    help="Leave out of the order how sure the query was of each bit.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Show which bits differ, what they mean and what the model sees; implied by --html.",
)
@click.option(
    "--audit",
    is_flag=True,
    help="Compare with every image, too, and show what the answer missed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write a gallery into this file.",
)
@targets
def search(
    image: Path | None,
    item_id: str | None,
    k: int,
    collection: str,
    max_hamming: int | None,
    min_pool: int,
    max_pool: int | None,
    rank: str,
    tag_any: tuple[str, ...],
    tag_all: tuple[str, ...],
    tag_none: tuple[str, ...],
    ignore_margins: bool,
    explain: bool,
    audit: bool,
    as_json: bool,
    html: Path | None,
    search_target: str,
    encoder_target: str,
) -> None:
    """Find the images most similar to IMAGE."""
    if html is not None:
        require("encoder", purpose="--html")
    data: bytes | None = None
    if image is not None and item_id is None:
        data = _read(image)
        kind, asked = "image", str(image.resolve())
    elif item_id is not None and image is None:
        kind, asked = "id", item_id
    else:
        raise click.UsageError("give either IMAGE or --id")
    options = SearchOptions(
        k=k,
        max_hamming_bits=max_hamming,
        min_pool=min_pool,
        max_pool=max_pool,
        rank=Rank(rank),
        ignore_margins=ignore_margins,
        with_explanation=explain or html is not None,
        filter=TagFilter(
            any=convert.tags_from_proto(tag_any, field="--tag-any"),
            all=convert.tags_from_proto(tag_all, field="--tag-all"),
            none=convert.tags_from_proto(tag_none, field="--tag-none"),
        ),
    )
    with connected(search_target, encoder_target) as client:
        begun = time.perf_counter()
        audited: AuditResult | None = None
        if audit:
            audited = client.audit(
                collection, image=data, id=item_id, options=options, deadline_s=AUDIT_DEADLINE_S
            )
            result = audited.answer
        else:
            result = client.search(collection, image=data, id=item_id, options=options)
        call_ms = (time.perf_counter() - begun) * 1e3

    if html is not None:
        # Pillow is not needed for anything else here.
        from hashlens.cli.gallery import search_page

        html.write_text(search_page(asked, data, collection, result, call_ms), "utf-8")
    if as_json:
        found = as_dict({kind: asked}, collection, result, call_ms)
        if audited is not None:
            found["audit"] = audit_dict(audited)
        click.echo(json.dumps(found, indent=2))
        return
    if result.hits:
        console().print(as_table(result))
        for line in explanation_lines(result):
            console().print(line, style="dim", soft_wrap=True)
    else:
        click.echo("Nothing found.")
    click.echo(receipt_line(result.receipt, call_ms))
    if audited is not None:
        if audited.exhaustive_hits:
            names = [path_of(hit) for hit in audited.exhaustive_hits]
            console().print(audit_table(audited, names))
        click.echo(audit_line(audited))
    if html is not None:
        click.echo(f"gallery: {printable(str(html))}")


def _read(image: Path) -> bytes:
    status = image.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInputError(f"{image} is no file")
    if status.st_size > MAX_QUERY_BYTES:
        raise InvalidInputError(f"{image} is above {MAX_QUERY_BYTES:,} bytes")
    return image.read_bytes()


def as_table(result: SearchResult) -> Table:
    """Return the hits as a table for a terminal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("distance", justify="right")
    table.add_column("bits", justify="right")
    words = None if result.explanation is None else Words(result.explanation)
    if words is not None:
        table.add_column("seen as")
        table.add_column("differing bits, surest first")
    table.add_column("image", overflow="fold")
    for n, hit in enumerate(result.hits, 1):
        distance = "" if hit.distance is None else f"{hit.distance:.3f}"
        cells = [str(n), distance, str(hit.hamming_bits)]
        if words is not None:
            cells += [words.hit(hit), _bit_numbers(hit)]
        table.add_row(*cells, short_path(path_of(hit)))
    return table


def _bit_numbers(hit: Hit) -> str:
    numbers = [] if hit.explanation is None else [str(bit) for bit, _ in differing(hit.explanation)]
    rest = ["..."] if len(numbers) > _SHOWN_BITS else []
    return " ".join(numbers[:_SHOWN_BITS] + rest)


def explanation_lines(result: SearchResult) -> list[str]:
    """Return what is known of the query, and of its bits, in a few lines; none without it."""
    if result.explanation is None:
        return []
    words = Words(result.explanation)
    lines = [f"query seen as {words.query}"] if words.query else []
    if words.detail:
        lines.append(words.detail)
    unsure = words.unsure()
    if unsure:
        lines.append("least sure bits of the query:")
        lines += [f"  {words.bit(bit, margin)}" for bit, margin in unsure]
    return lines


def path_of(hit: Hit) -> str:
    """Return where a hit's file is, as far as its payload says; else its id."""
    payload = payload_json(hit)
    path = payload.get("path") if isinstance(payload, dict) else None
    return path if isinstance(path, str) else hit.id


def payload_json(hit: Hit) -> Any:
    """Return a hit's payload if it is JSON, else None; what Python alone takes for JSON is none."""
    try:
        payload = json.loads(hit.payload)
        json.dumps(payload, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return payload


def receipt_line(receipt: Receipt, call_ms: float) -> str:
    """Return how an answer came about, in one line."""
    timings = receipt.timings
    stages = {
        "encode": timings.encode_call_ns,
        "coarse": timings.coarse_ns,
        "fine": timings.fine_ns,
    }
    spent = " + ".join(f"{name} {ns / 1e6:.2f}" for name, ns in stages.items() if ns)
    notes = ["exact" if receipt.exact else "not exact"]
    if receipt.pool_truncated:
        notes.append("pool cut by --max-pool")
    if receipt.rows_without_feature:
        notes.append(f"{receipt.rows_without_feature:,} without feature")
    return (
        f"pool {receipt.pool_size:,} of {receipt.rows_scanned:,} within {receipt.threshold_bits} "
        f"bits · {', '.join(notes)} · {spent} of {call_ms:.2f} ms"
    )


def as_dict(
    query: dict[str, str], collection: str, result: SearchResult, call_ms: float
) -> dict[str, Any]:
    """Return an answer as ``--json`` prints it. Keys are added over time, never renamed."""
    receipt = result.receipt
    timings = receipt.timings
    words = None if result.explanation is None else Words(result.explanation)
    explained = {} if words is None else {"explanation": words.as_dict()}

    def explanation_of(hit: Hit) -> dict[str, Any]:
        if words is None or hit.explanation is None:
            return {}
        return {"explanation": words.hit_as_dict(hit.explanation)}

    return {
        "query": query,
        "collection": collection,
        **explained,
        "hits": [
            {
                "rank": n,
                "id": hit.id,
                "hamming_bits": hit.hamming_bits,
                # JSON has no infinity: a distance too large for float32 is null.
                "distance": hit.distance if math.isfinite(hit.distance or 0) else None,
                "payload": payload_json(hit),
                **explanation_of(hit),
            }
            for n, hit in enumerate(result.hits, 1)
        ],
        "receipt": {
            "rows_scanned": receipt.rows_scanned,
            "threshold_bits": receipt.threshold_bits,
            "pool_size": receipt.pool_size,
            "pool_histogram": list(receipt.pool_histogram),
            "pool_truncated": receipt.pool_truncated,
            "rows_without_feature": receipt.rows_without_feature,
            "exact": receipt.exact,
            "margins_used": receipt.margins_used,
            "version": receipt.version,
            "timings_ms": {
                "decode": timings.encode.decode_ns / 1e6,
                "encode_queue": timings.encode.queue_ns / 1e6,
                "inference": timings.encode.inference_ns / 1e6,
                "encode_call": timings.encode_call_ns / 1e6,
                "queue": timings.queue_ns / 1e6,
                "coarse": timings.coarse_ns / 1e6,
                "fine": timings.fine_ns / 1e6,
                "fetch": timings.fetch_ns / 1e6,
                "server": timings.total_ns / 1e6,
                "whole_call": call_ms,
            },
        },
    }
