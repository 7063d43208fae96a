"""`hashlens import`: items from a file into a collection."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from hashlens import codes, convert
from hashlens.cli.connect import connected, targets
from hashlens.cli.ingest import CALL_DEADLINE_S, MAX_ATTEMPTS, pause
from hashlens.cli.progress import step
from hashlens.cli.text import console, counted, printable
from hashlens.cli.transfer.checks import check_items, check_layout, fitted
from hashlens.cli.transfer.columns import ItemReader, Layout, check_n_bits
from hashlens.cli.transfer.files import reading
from hashlens.client import Client
from hashlens.errors import (
    HashlensError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
)
from hashlens.types import CollectionSpec, FeatureDtype, Item

MAX_REQUEST_ID_BYTES = 40
"""What is left when the number of a part is added."""

DEFAULT_ROWS = 1_000_000
"""Items that a new collection is made for, or as many as there are if they are more."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says of the items; each wins over what the file says."""

    model_id: str | None = None
    n_bits: int | None = None
    feature_dtype: FeatureDtype | None = None


@click.command("import")
@click.argument(
    "file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.argument("collection")
@targets
@click.option("--model-id", help="Which model made the codes; needed if the file does not say.")
@click.option(
    "--n-bits",
    type=click.IntRange(1, codes.MAX_BITS),
    help="Code length; if the file does not say, all bits of its bytes.",
)
@click.option(
    "--dtype",
    type=click.Choice([member.value for member in FeatureDtype]),
    help="How features are kept; f16 rounds float32. As in the file if not given.",
)
@click.option(
    "--request-id",
    help="Names this import. Repeated with the same file within ten minutes, what is written "
    "already is not written again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def import_(
    file: Path,
    collection: str,
    search_target: str,
    encoder_target: str,
    model_id: str | None,
    n_bits: int | None,
    dtype: str | None,
    request_id: str | None,
    as_json: bool,
) -> None:
    """Put all items of FILE (.npz, .parquet or .arrow) into a COLLECTION.

    It is made if it is not there. Items whose ids are there are replaced. All of the file is
    checked before anything is written. docs/training.md says how to make such a file of your own
    codes.
    """
    if request_id is not None and not 1 <= len(request_id.encode()) <= MAX_REQUEST_ID_BYTES:
        raise InvalidInputError(f"has 1 to {MAX_REQUEST_ID_BYTES} bytes", field="--request-id")
    wanted = Wanted(model_id, n_bits, None if dtype is None else FeatureDtype(dtype))
    named = request_id or uuid.uuid4().hex
    log = console(stderr=True)
    with connected(search_target, encoder_target) as client, reading(file) as reader:
        spec, is_new = spec_of(client, collection, reader, wanted)
        with step(log, "Checking", reader.n_items, "items") as advance:
            check_items(reader, spec, advance)
        if is_new:
            client.create_collection(collection, spec=spec)
        try:
            with step(log, "Importing", reader.n_items, "items") as advance:
                version = import_items(client, spec, reader, named, advance)
        except (HashlensError, KeyboardInterrupt):
            log.print(f"To go on, run the same command with --request-id {printable(named)}")
            raise
        info = client.collection(collection)
    summary = {
        "collection": collection,
        "file": str(file),
        "created": is_new,
        "written": reader.n_items,
        "version": version or info.version,
        "items": info.n_items,
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    click.echo(
        f"{collection}{' (new)' if is_new else ''}: {counted(reader.n_items, 'item')} of "
        f"{printable(str(file))} written, {info.n_items:,} in it now, at version "
        f"{summary['version']}"
    )


def spec_of(
    client: Client, collection: str, reader: ItemReader, wanted: Wanted
) -> tuple[CollectionSpec, bool]:
    """Return what the collection is bound to, and whether it has to be made.

    Raises
    ------
    InvalidInputError
        Nobody says which model made the codes, or something said is not possible.
    PreconditionError
        The collection is there and holds something else.
    """
    layout = reader.layout
    model_id = wanted.model_id or layout.model_id
    n_bits = wanted.n_bits or layout.n_bits
    try:
        spec = client.collection(collection).spec
    except NotFoundError:
        spec = _new_spec(collection, reader, wanted)
        is_new = True
    else:
        is_new = False
        _check_same(spec, model_id or spec.model_id, n_bits or spec.n_bits, wanted.feature_dtype)
    check_layout(spec, layout, may_round=wanted.feature_dtype is FeatureDtype.F16)
    return spec, is_new


def _new_spec(collection: str, reader: ItemReader, wanted: Wanted) -> CollectionSpec:
    layout: Layout = reader.layout
    spec = CollectionSpec(
        name=collection,
        model_id=wanted.model_id or layout.model_id,
        n_bits=check_n_bits(wanted.n_bits or layout.n_bits or 8 * layout.code_bytes),
        dim=layout.dim,
        feature_dtype=wanted.feature_dtype or layout.feature_dtype,
        expected_rows=max(DEFAULT_ROWS, reader.n_items),
    )
    if not spec.model_id:
        raise InvalidInputError(
            "is not in the file: say with --model-id which model made the codes", field="model_id"
        )
    return convert.spec_from_proto(convert.spec_to_proto(spec))


def _check_same(
    spec: CollectionSpec, model_id: str, n_bits: int, dtype: FeatureDtype | None
) -> None:
    if (model_id, n_bits) != (spec.model_id, spec.n_bits):
        raise PreconditionError(
            f"the file holds codes of model {model_id}, {n_bits} bits, but {spec.name} those of "
            f"{spec.model_id}, {spec.n_bits} bits: import into another collection"
        )
    if dtype is not None and spec.dim and dtype is not spec.feature_dtype:
        raise PreconditionError(
            f"{spec.name} holds features as {spec.feature_dtype.value}: leave --dtype out, or "
            "import into another collection"
        )


def import_items(
    client: Client,
    spec: CollectionSpec,
    reader: ItemReader,
    request_id: str,
    advance: Callable[[int], None],
) -> int:
    """Write all items of a file that was checked.

    Returns
    -------
    int
        The collection's version after the last write; 0 if there was nothing to write.
    """
    version = 0
    for n, part in enumerate(reader.read()):
        items = list(fitted(part, spec).items(spec.model_id, spec.n_bits))
        version = _write_patiently(client, spec.name, items, f"{request_id}.{n}")
        advance(len(items))
    return version


def _write_patiently(client: Client, collection: str, items: list[Item], request_id: str) -> int:
    """Write items, coming back when the service is overloaded; what was written is not again."""
    for attempt in itertools.count(1):
        try:
            result = client.upsert(
                collection, items, request_id=request_id, deadline_s=CALL_DEADLINE_S
            )
            break
        except OverloadedError as error:
            if attempt == MAX_ATTEMPTS:
                raise
            pause(attempt, error.retry_after_s)
    result.raise_for_failures()
    return result.version
