"""Removing what has left a folder from a collection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hashlens import codes
from hashlens.cli.ingest import CALL_DEADLINE_S
from hashlens.cli.scan import Selection, found_below
from hashlens.cli.shard import Shard
from hashlens.cli.text import counted
from hashlens.client import Client
from hashlens.errors import PreconditionError
from hashlens.types import CollectionSpec, Embedding, Hit

DELETE_IDS = 1000
"""Ids in one call."""

LIST_DEADLINE_S = 3600.0
"""Time to look through all items."""


def prune_gone(client: Client, spec: CollectionSpec, wanted: Selection) -> int:
    """Delete the items of a run's images whose files are gone; those of other shards stay.

    A file that is there and cannot be read keeps its item.

    Returns
    -------
    int
        How many were deleted.

    Raises
    ------
    PreconditionError
        Items would be deleted, and no image is left below the folder: it may not be mounted.
    """
    gone = [
        hit.id
        for hit in _all_items(client, spec, with_payload=wanted.relative_ids)
        if (path := _path_below(wanted, hit)) is not None
        and wanted.shard.has(path)
        and _is_gone(wanted.folder / path)
    ]
    # Looked at last: what is unmounted on the way is noticed as well.
    if gone and not _has_images(wanted):
        raise PreconditionError(
            f"--prune would remove {counted(len(gone), 'image')} from {spec.name}, and there is "
            f"no image at all below {wanted.folder}: nothing was removed. Is it mounted? To "
            f"remove the collection with all that is in it, run `hashlens drop {spec.name}`."
        )
    return sum(
        client.delete(spec.name, gone[lo : lo + DELETE_IDS], deadline_s=CALL_DEADLINE_S).n_deleted
        for lo in range(0, len(gone), DELETE_IDS)
    )


def _has_images(wanted: Selection) -> bool:
    """Return whether any image is below the folder, whichever shard has it."""
    everything = replace(wanted, shard=Shard())
    return any(True for _ in found_below(everything, lambda problem: None))


def _path_below(wanted: Selection, hit: Hit) -> str | None:
    """Return where an item's file is below the folder, None if it never was there."""
    if not wanted.relative_ids:
        path = hit.id.removeprefix(wanted.prefix)
        return path if path != hit.id else None
    # An id without a folder may be anybody's: ours have it in their payload as well.
    return hit.id if not hit.id.startswith("/") and _noted_path(hit.payload) == hit.id else None


def _noted_path(payload: bytes) -> object:
    try:
        facts = json.loads(payload)
    except ValueError:
        return None
    return facts.get("path") if isinstance(facts, dict) else None


def _all_items(client: Client, spec: CollectionSpec, *, with_payload: bool) -> Iterator[Hit]:
    """Yield all items: the ball around any code, as wide as the code, holds every one."""
    centre = Embedding(
        code=bytes(codes.n_bytes(spec.n_bits)), n_bits=spec.n_bits, model_id=spec.model_id
    )
    parts = client.stream_ball(
        spec.name,
        embedding=centre,
        radius_bits=spec.n_bits,
        with_payload=with_payload,
        deadline_s=LIST_DEADLINE_S,
    )
    for part in parts:
        yield from part.hits


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
