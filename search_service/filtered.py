"""A snapshot as it is through a filter: what does not pass is dead in it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import DeadlineError
from hashlens.types import TagFilter
from search_service.cancel import Cancel
from search_service.snapshot import Few, Snapshot, read_only

_FEW_SHARE: Final = 16
"""The codes of the rows that pass are gathered if at most one in so many does: it is paid for once
by each version, and by each search if it is not done."""


async def reached(snapshot: Snapshot, wanted: TagFilter | None, ends_s: float) -> Snapshot:
    """Return a snapshot through a filter; itself without one.

    A start does not wait for the tags to be indexed; who asks for them before does, and helps.

    Parameters
    ----------
    snapshot
        What to filter.
    wanted
        Which rows count.
    ends_s
        When the call must be answered, on the clock of `time.monotonic`.

    Raises
    ------
    DeadlineError
        The tags are not indexed by then.
    """
    if wanted is None:
        return snapshot
    view = snapshot.views.get(wanted)
    while view is None:
        if time.monotonic() >= ends_s:
            raise DeadlineError("The tags were not indexed in time. Allow more time, or try later.")
        view = await asyncio.to_thread(_attempt, snapshot, wanted)
    return view


def filtered(snapshot: Snapshot, wanted: TagFilter, cancel: Cancel) -> Snapshot:
    """Return a snapshot through a filter, the same one for all who ask while it is kept.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    view = snapshot.views.get(wanted)
    while view is None:
        cancel.check()
        view = _attempt(snapshot, wanted)
    return view


def restricted(snapshot: Snapshot, rows: NDArray[np.int64], *, few_share: int) -> Snapshot:
    """Return a snapshot in which only some of the rows are alive.

    Parameters
    ----------
    snapshot
        Of which `rows` are.
    rows
        int64, ascending; those that are dead stay so.
    few_share
        Gather the codes of the rows left if at most one in so many is.
    """
    if snapshot.dead is not None:
        rows = rows[snapshot.dead[rows] == 0]
    dead = np.ones(snapshot.rows, dtype=np.uint8)
    dead[rows] = 0
    few = None
    if len(rows) * few_share <= snapshot.rows:
        few = Few(rows, _codes_only(snapshot, rows))
    return replace(snapshot, dead=read_only(dead), n_alive=len(rows), few=few)


def _attempt(snapshot: Snapshot, wanted: TagFilter) -> Snapshot | None:
    """Return the view, or None after some milliseconds of indexing if more has to be done."""
    if not snapshot.ids.index_tags():
        return None
    with snapshot.views.making:
        view = snapshot.views.get(wanted)
        if view is None:
            view = restricted(snapshot, snapshot.ids.passing(wanted), few_share=_FEW_SHARE)
            snapshot.views.put(wanted, view, _n_bytes(view))
        return view


def _codes_only(snapshot: Snapshot, rows: NDArray[np.int64]) -> Snapshot:
    return Snapshot(
        n_bits=snapshot.n_bits,
        dim=0,
        feature_dtype=snapshot.feature_dtype,
        version=snapshot.version,
        rows=len(rows),
        n_alive=len(rows),
        words=tuple(read_only(words[rows]) for words in snapshot.words),
        ids=snapshot.ids,
    )


def _n_bytes(view: Snapshot) -> int:
    """Return what a view takes beside its snapshot."""
    if view.few is None:
        return view.rows
    return view.rows + 8 * view.n_alive * (1 + len(view.words))
