"""Removing what has left a folder from a collection."""

from __future__ import annotations

from pathlib import Path

from hashlens import codes
from hashlens.cli.ingest import CALL_DEADLINE_S
from hashlens.client import Client
from hashlens.errors import PreconditionError
from hashlens.types import MAX_K, CollectionSpec, Embedding, Rank, SearchOptions

DELETE_IDS = 1000
"""Ids in one call."""


def prune_gone(client: Client, spec: CollectionSpec, root: Path) -> int:
    """Delete the items whose ids are paths below `root` where no file is any more.

    A file that is there and cannot be read keeps its item.

    Returns
    -------
    int
        How many were deleted.

    Raises
    ------
    PreconditionError
        The collection is too large to be listed.
    """
    prefix = f"{root.as_posix().rstrip('/')}/"
    gone = [
        item_id
        for item_id in _all_ids(client, spec)
        if item_id.startswith(prefix) and _is_gone(Path(item_id))
    ]
    return sum(
        client.delete(spec.name, gone[lo : lo + DELETE_IDS], deadline_s=CALL_DEADLINE_S).n_deleted
        for lo in range(0, len(gone), DELETE_IDS)
    )


def _all_ids(client: Client, spec: CollectionSpec) -> list[str]:
    """Return all ids: the ball around any code, as wide as the code, holds every item."""
    n_items = client.collection(spec.name).n_items
    if n_items > MAX_K:
        raise PreconditionError(
            f"the collection {spec.name} holds {n_items:,} items: --prune can look through "
            f"{MAX_K:,} at most"
        )
    centre = Embedding(
        code=bytes(codes.n_bytes(spec.n_bits)), n_bits=spec.n_bits, model_id=spec.model_id
    )
    options = SearchOptions(
        k=MAX_K, max_hamming_bits=spec.n_bits, rank=Rank.HAMMING, with_payload=False
    )
    result = client.search(spec.name, embedding=centre, options=options, deadline_s=CALL_DEADLINE_S)
    return [hit.id for hit in result.hits]


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
