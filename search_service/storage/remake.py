"""Checks of a running collection's files, and files made anew under it."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import Final

from hashlens.errors import PreconditionError
from search_service.storage.buckets import BucketReader
from search_service.storage.catalog import Catalog
from search_service.storage.follower import Follower
from search_service.storage.keys import Meta, foreign
from search_service.storage.local import LocalCollection
from search_service.storage.rebuild import Rebuilt, install, rebuild
from search_service.storage.verify import Verified, verify

_SETTLE_S: Final = 10.0


def compared(
    local: LocalCollection, follower: Follower, meta: Meta, stop: threading.Event
) -> Verified:
    """Compare a collection's files with Redis and with their checksums; see `verify.verify`.

    Files from which the log cannot be followed are checked, and not compared.
    """
    follower.wait_settled(_SETTLE_S)
    trouble = follower.trouble
    if trouble is not None and not follower.is_lost:
        raise type(trouble)(trouble.message)
    lost = "" if trouble is None else trouble.message
    with contextlib.closing(
        BucketReader(follower.url, meta, timeout_s=follower.timeout_s)
    ) as buckets:
        return verify(local, buckets, stop, lost=lost)


def remade(
    local: LocalCollection,
    follower: Follower,
    catalog: Catalog,
    replica_id: str,
    stop: threading.Event,
) -> tuple[Rebuilt, LocalCollection]:
    """Replace a collection's files by new ones, and return those, opened.

    The follower of the old files is asked to end as late as possible, and whether this succeeds or
    not, another has to take its place then. Nobody may trim the log for this replica meanwhile.

    Raises
    ------
    PreconditionError
        Redis has less than this replica, another collection of the name, or none: an operator has
        to say which is right.
    UnavailableError, NotFoundError, DataLossError, CancelledError, OSError
        See `rebuild`.
    """
    name, known_seq = local.spec.name, follower.known_seq
    meta = catalog.meta(name, 2 * follower.timeout_s)
    if meta is None or meta.epoch != local.epoch:
        raise PreconditionError(foreign(name, None if meta is None else meta.epoch))
    if meta.seq < known_seq:
        raise PreconditionError(
            f"Redis has version {meta.seq} of {name} and had {known_seq}: rebuilding it would "
            "lose acknowledged writes. Bring the right Redis back; or drop the collection and "
            "index again."
        )

    def settle() -> int:
        follower.stop()
        follower.join()
        return local.seq

    made = rebuild(
        local.directory.parent,
        replace(meta, seq=local.checkpoint_seq),
        url=follower.url,
        replica_id=replica_id,
        timeout_s=follower.timeout_s,
        segment_bytes=local.segment_bytes,
        old=local.directory,
        generation=local.generation + 1,
        stop=stop,
        settle=settle,
    )
    # From here on the old files are only read, whatever happens.
    local.close()
    install(made, local.directory)
    return made, LocalCollection.load(local.directory)
