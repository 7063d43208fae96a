"""`hashlens index`: a folder of images into a collection."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from hashlens import convert
from hashlens.cli.connect import collection_option, connected, targets
from hashlens.cli.ingest import CALL_DEADLINE_S, encode_patiently, pipelined
from hashlens.cli.problems import LISTED_PROBLEMS, Problem, Problems, reporting
from hashlens.cli.progress import step
from hashlens.cli.prune import prune_gone
from hashlens.cli.scan import ImageFile, Selection, count_below, found_below
from hashlens.cli.shard import Shard, ShardType
from hashlens.cli.text import console, counted, duration, printable, reason_of
from hashlens.client import Client
from hashlens.errors import (
    HashlensError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from hashlens.types import CollectionSpec, Encoded, Item, ModelInfo

BATCH_ITEMS = 64
BATCH_BYTES = 16 * 2**20
"""A batch is cut when it would be larger; `workers` of them are in memory at once."""

INCOMPLETE = 3
"""Exit status of ``--strict`` when files could not be indexed."""

_REFUSALS = (
    InvalidInputError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

_MAX_TTL_S = 1e11
"""More than three thousand years."""


class Refusal(click.ClickException):
    """The same run would fail again."""

    exit_code = 2
    """As Click has it for wrong options."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What is written with every image of a run."""

    tags: tuple[str, ...] = ()
    """Sorted by their bytes, each once."""
    expires_unix_ms: int = 0

    def kept(self, stored: Item | None) -> Labels:
        """Return these, and where there are none, those that are stored."""
        if stored is None:
            return self
        return Labels(self.tags or stored.tags, self.expires_unix_ms or stored.expires_unix_ms)


@dataclass(slots=True)
class Outcome:
    """What became of some files."""

    indexed: int = 0
    unchanged: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def n_files(self) -> int:
        """Files that were dealt with."""
        return self.indexed + self.unchanged + len(self.problems)


@dataclass(slots=True)
class Total:
    """What became of all files of a run."""

    found: int = 0
    """Files that were read, or would have been if they had changed."""
    indexed: int = 0
    unchanged: int = 0


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@collection_option
@targets
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Batches that are read, encoded and written at the same time.",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    help="Tag all images below DIR with this and no other; give it several times for several tags.",
)
@click.option(
    "--ttl-s",
    type=click.FloatRange(min=0, min_open=True, max=_MAX_TTL_S),
    metavar="SECONDS",
    help="Let all images below DIR remove themselves so long after this run has begun.",
)
@click.option("--prune", is_flag=True, help="Also remove images whose files below DIR are gone.")
@click.option(
    "--ids",
    type=click.Choice(["absolute", "relative"]),
    default="absolute",
    show_default=True,
    help="An image's id: its absolute path, or its path below DIR, wherever that is mounted.",
)
@click.option(
    "--shard",
    type=ShardType(),
    default=Shard(),
    show_default=True,
    metavar="I/N",
    help="Take share I of N, counted from 0: N runs, on as many machines, take every file once.",
)
@click.option(
    "--expected-rows",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    metavar="ROWS",
    help="Items to expect in the end, if this run makes the collection.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what could not be indexed there, a line of JSON each: path below DIR, and reason.",
)
@click.option("--strict", is_flag=True, help="Exit with 3 if files could not be indexed.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def index(
    folder: str,
    collection: str,
    search_target: str,
    encoder_target: str,
    workers: int,
    tags: tuple[str, ...],
    ttl_s: float | None,
    prune: bool,
    ids: str,
    shard: Shard,
    expected_rows: int,
    report: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Put all images below DIR into a collection.

    Images that are in already, and whose files have not changed, are skipped; so an interrupted
    run is continued by running it again. With --tag, those that are tagged otherwise are written
    again; with --ttl-s, all are. Files that cannot be read are listed at the end; hidden ones are
    left out.

    With --shard, --prune looks at its own share only. With --ids relative, it takes all images
    with such ids for those of DIR. It refuses where no image at all is left below DIR: that may
    not be mounted. A report is replaced when a run has come to its end.

    \b
    Exit status:
      0  done, whatever could not be indexed
      1  a service is away or failed: run again
      2  the options, a token, the collection or DIR do not fit: the same run fails again
      3  with --strict: done, and some files could not be indexed
    """
    begun = time.monotonic()
    log = console(stderr=True)
    total = Total()
    try:
        labels = Labels(
            tags=convert.tags_from_proto(tags, field="--tag"),
            # Made absolute once, so that all of the run go together.
            expires_unix_ms=0 if ttl_s is None else math.ceil((time.time() + ttl_s) * 1000),
        )
        root = Path(folder).resolve()
        with (
            connected(search_target, encoder_target) as client,
            reporting(root, report) as problems,
        ):
            model = client.model()
            spec = open_collection(client, collection, model, expected_rows)
            wanted = Selection(
                folder=root,
                max_image_bytes=model.max_image_bytes,
                shard=shard,
                relative_ids=ids == "relative",
            )
            with log.status("Looking for images ...") as status:
                counter = itertools.count(1)
                n_expected = count_below(
                    wanted, lambda: status.update(f"Looking for images: {next(counter):,} found")
                )
            with step(log, "Indexing", n_expected, "images") as advance:
                batches = cut(
                    found_below(wanted, problems.add), min(BATCH_ITEMS, model.max_batch_items)
                )
                for outcome in pipelined(
                    lambda batch: index_batch(client, spec, batch, labels), batches, workers
                ):
                    note(outcome, total, problems)
                    advance(outcome.n_files)
            with log.status("Pruning ..."):
                pruned = prune_gone(client, spec, wanted) if prune else 0
            n_items = client.collection(collection).n_items
    except _REFUSALS as error:
        where = f"{error.field}: " if isinstance(error, InvalidInputError) and error.field else ""
        raise Refusal(printable(where + error.message)) from error
    summary = {
        "collection": collection,
        "folder": str(root),
        "shard": str(shard),
        "found": total.found,
        "indexed": total.indexed,
        "unchanged": total.unchanged,
        "failed": [{"path": p.path, "reason": p.reason} for p in problems.kept],
        "n_failed": problems.count,
        "pruned": pruned,
        "items": n_items,
        "seconds": round(time.monotonic() - begun, 3),
    }
    click.echo(json.dumps(summary, indent=2) if as_json else described(summary))
    if strict and problems.count:
        click.get_current_context().exit(INCOMPLETE)


def note(outcome: Outcome, total: Total, problems: Problems) -> None:
    """Add what became of a batch to what became of all."""
    total.found += outcome.n_files
    total.indexed += outcome.indexed
    total.unchanged += outcome.unchanged
    for problem in outcome.problems:
        problems.add(problem)


def open_collection(
    client: Client, name: str, model: ModelInfo, expected_rows: int
) -> CollectionSpec:
    """Return a collection's specification; it is made if it is not there.

    Raises
    ------
    PreconditionError
        It holds another model's embeddings.
    """
    try:
        spec = client.collection(name).spec
    except NotFoundError:
        return client.create_collection(name, expected_rows=expected_rows).spec
    if (spec.model_id, spec.n_bits) != (model.model_id, model.n_bits):
        raise PreconditionError(
            f"the collection {name} holds embeddings of model {spec.model_id[:12]}, but the "
            f"encoder runs {model.model_id[:12]}. Index into another one with --collection, or "
            f"run `hashlens drop {name}` and index again."
        )
    return spec


def cut(files: Iterable[ImageFile], max_items: int) -> Iterator[list[ImageFile]]:
    """Cut files into batches of at most `max_items` and about `BATCH_BYTES`."""
    batch: list[ImageFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) >= max_items or size + file.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch


def payload_of(file: ImageFile) -> bytes:
    """Return what is stored with an image; equal as long as its file has not changed."""
    # Of a file whose id says where it is below DIR, that: other machines have it elsewhere.
    facts = {"path": file.id, "size": file.size, "mtime_ns": file.mtime_ns}
    return json.dumps(facts, ensure_ascii=False).encode("utf-8")


def index_batch(
    client: Client, spec: CollectionSpec, batch: list[ImageFile], labels: Labels
) -> Outcome:
    """Read, encode and write those of some files that are new, changed or labelled otherwise."""
    found = client.get_items(spec.name, [file.id for file in batch], deadline_s=CALL_DEADLINE_S)
    stored = {item.id: item for item in found}
    wanted = {file.id: labels.kept(stored.get(file.id)) for file in batch}
    fresh = [
        file
        for file in batch
        if (item := stored.get(file.id)) is None
        or item.payload != payload_of(file)
        or wanted[file.id] != Labels(item.tags, item.expires_unix_ms)
    ]
    outcome = Outcome(unchanged=len(batch) - len(fresh))

    files: list[ImageFile] = []
    images: list[bytes] = []
    for file in fresh:
        try:
            images.append(_read(file))
        except OSError as error:
            outcome.problems.append(Problem(file.path, reason_of(error)))
        else:
            files.append(file)

    items = []
    for file, result in zip(files, encode_patiently(client, images, spec), strict=True):
        if isinstance(result, HashlensError):
            outcome.problems.append(Problem(file.path, result.message))
        else:
            items.append(_item(file, result, spec, wanted[file.id]))
    written = client.upsert(spec.name, items, deadline_s=CALL_DEADLINE_S)
    outcome.indexed = written.n_written
    paths = {file.id: file.path for file in files}
    outcome.problems += [Problem(paths[f.id], f.error.message) for f in written.failures]
    return outcome


def _read(file: ImageFile) -> bytes:
    """Return a file's bytes; OSError if it is no longer what the scan has found."""
    with open(file.path, "rb", opener=_open_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        data = stream.read(file.size + 1)
    if len(data) != file.size or status.st_mtime_ns != file.mtime_ns:
        raise OSError(0, "it changed while it was read: run again")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # What was a file when the folder was scanned may be a pipe by now.
    return os.open(path, flags | os.O_NONBLOCK)


def _item(file: ImageFile, encoded: Encoded, spec: CollectionSpec, labels: Labels) -> Item:
    embedding = encoded.embedding
    if spec.dim == 0:
        embedding = replace(embedding, feature=None)
    return Item(
        id=file.id,
        embedding=embedding,
        payload=payload_of(file),
        tags=labels.tags,
        expires_unix_ms=labels.expires_unix_ms,
    )


def described(summary: dict[str, Any]) -> str:
    """Return the summary for people."""
    failed = summary["failed"]
    parts = [f"{summary['indexed']:,} indexed", f"{summary['unchanged']:,} unchanged"]
    if failed:
        parts.append(f"{summary['n_failed']:,} not readable")
    if summary["pruned"]:
        parts.append(f"{summary['pruned']:,} removed")
    lines = [
        f"{printable(summary['folder'])}: {', '.join(parts)} in {duration(summary['seconds'])}. "
        f"{summary['collection']} now holds {counted(summary['items'], 'image')}."
    ]
    if failed:
        lines += ["", "Not indexed:"]
        root = Path(summary["folder"])
        for problem in failed[:LISTED_PROBLEMS]:
            path = Path(problem["path"])
            shown = path.relative_to(root) if path.is_relative_to(root) else path
            lines.append(f"  {printable(str(shown))}: {printable(problem['reason'])}")
        if summary["n_failed"] > LISTED_PROBLEMS:
            more = summary["n_failed"] - LISTED_PROBLEMS
            lines.append(f"  and {more:,} more; --json or --report lists all")
    return "\n".join(lines)
