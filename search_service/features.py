"""Which rows have a feature that may be compared: there, and checked before it is first used."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from search_service import readahead
from search_service.cancel import Cancel
from search_service.readahead import Place
from search_service.snapshot import Snapshot

_BLOCK_ROWS = 512
"""Rows that are checked between two looks at the cancel flag."""


def with_feature(
    snapshot: Snapshot, rows: NDArray[np.int64], cancel: Cancel
) -> NDArray[np.bool_] | None:
    """Tell which of `rows` have a feature that is what was written.

    Parameters
    ----------
    snapshot
        Where they are.
    rows
        int64, shape ``[n]``, ascending. Those not looked at since the files were opened are read,
        ahead of the check where they are on disk, and compared with their checksums.
    cancel
        Polled between blocks.

    Returns
    -------
    ndarray or None
        bool, shape ``[n]``; None if all have one.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    has: NDArray[np.bool_] | None = None
    if snapshot.has_feature is not None:
        has = snapshot.has_feature[rows].astype(np.bool_)
    check = snapshot.feature_check
    if check is not None:
        todo = check.unchecked(rows)
        if todo.shape[0]:
            place = Place.of(snapshot)
            with closing(readahead.blocks(place, todo, _BLOCK_ROWS, cancel)) as parts:
                for part in parts:
                    check.check(todo[part])
        damaged = check.damaged(rows)
        if damaged is not None:
            has = ~damaged if has is None else has & ~damaged
    return None if has is None or has.all() else has
