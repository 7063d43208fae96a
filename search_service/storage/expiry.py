"""Has Redis remove what has expired, by the log, so that all replicas lose it at one version."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from search_service.snapshot import Snapshot
from search_service.storage import layout
from search_service.storage.catalog import Catalog
from search_service.storage.chunks import CHUNK_ITEMS, Raw
from search_service.storage.keys import Meta
from search_service.storage.rows import rows_of

logger = logging.getLogger(__name__)

_CALL_S = 2.0


def remove_expired(
    snapshot: Snapshot, catalog: Catalog, meta: Meta, should_stop: Callable[[], bool]
) -> int:
    """Have what has expired removed; return how many items were.

    Parameters
    ----------
    snapshot
        The newest version here. What is newer in Redis stays as it is.
    catalog, meta
        Where, and of which collection.
    should_stop
        Polled between calls to Redis, each of which removes a few hundred.

    Raises
    ------
    HashlensError
        Redis refuses, or has gone away. The next call does what is left.
    """
    rows_at = rows_of(snapshot)
    rows = rows_at.due(time.time_ns() // 1_000_000)
    n_removed = 0
    for first in range(0, len(rows), CHUNK_ITEMS):
        if should_stop():
            break
        chunk = rows[first : first + CHUNK_ITEMS]
        seqs = rows_at.ids.records["seq"][chunk].tolist()
        written = zip(map(str.encode, rows_at.ids_of(chunk)), seqs, strict=True)
        doomed = [Raw(item_id, layout.pack_expire(item_id, seq)) for item_id, seq in written]
        n_removed += catalog.expire(meta, doomed, _CALL_S, snapshot.version).n_items
    if n_removed:
        logger.info("%d items of %s have expired", n_removed, meta.spec.name)
    return n_removed
