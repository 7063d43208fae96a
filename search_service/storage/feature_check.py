"""Features compared with their checksums, each row once before it is first used.

Checking all of them would make a start as long as reading the disk. So what this process has not
written itself is checked when a search, or the scrubber, first comes by.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_SHOWN_ROWS = 10
_UNKNOWN, _GOOD, _DAMAGED = 0, 1, 2
_NONE = np.zeros(0, dtype=np.int64)


class FeatureChecks:
    """What is known of the features of one generation of files. Thread-safe.

    Parameters
    ----------
    rows
        How many there were when the files were opened; later ones are of this process's own making.
    on_damage
        Called with rows whose feature is not what was written: int64, shape ``[n]``, each once.
    """

    def __init__(self, rows: int, on_damage: Callable[[NDArray[np.int64]], None]) -> None:
        self._states = np.zeros(rows, dtype=np.uint8)
        self._on_damage = on_damage
        self._lock = threading.Lock()
        self._n_unknown = rows
        self.n_damaged = 0
        """Rows that were found damaged."""

    @property
    def n_unchecked(self) -> int:
        """How many rows nobody has looked at yet."""
        return self._n_unknown

    def unchecked(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `rows` that nobody has looked at yet, in their order."""
        if not self._n_unknown:
            return _NONE
        states = self._states
        old = rows[rows < len(states)]
        unknown: NDArray[np.int64] = old[states[old] == _UNKNOWN]
        return unknown

    def note(self, rows: NDArray[np.int64], is_good: NDArray[np.bool_]) -> None:
        """Remember what a check of rows has found; each row at most once in `rows`."""
        if not len(rows):
            return
        with self._lock:
            beyond = int(rows.max()) + 1 - len(self._states)
            if beyond > 0:  # Of this process's own making, and looked at all the same.
                self._states = np.append(self._states, np.full(beyond, _GOOD, dtype=np.uint8))
            before = self._states[rows]
            # Once damaged, always: another page of the same disk may read well for a while.
            after = np.where(is_good & (before != _DAMAGED), _GOOD, _DAMAGED)
            self._states[rows] = after
            self._n_unknown -= int(np.count_nonzero(before == _UNKNOWN))
            found = rows[(after == _DAMAGED) & (before != _DAMAGED)]
            self.n_damaged += len(found)
        if len(found):
            self._on_damage(found)

    def damaged_rows(self) -> list[int]:
        """Return all rows that were found damaged."""
        if not self.n_damaged:
            return []
        rows: list[int] = np.flatnonzero(self._states == _DAMAGED).tolist()
        return rows

    def damaged(self, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Tell which of `rows` are damaged: bool, shape ``[n]``; None if no row at all is."""
        if not self.n_damaged:
            return None
        states = self._states
        flags = np.zeros(rows.shape[0], dtype=np.bool_)
        old = rows < len(states)
        flags[old] = states[rows[old]] == _DAMAGED
        return flags


@dataclass(frozen=True, slots=True, eq=False)
class ChecksAt:
    """Checks of one snapshot's features; a `search_service.snapshot.FeatureCheck`."""

    checks: FeatureChecks
    features: tuple[NDArray[Any], ...]
    rows_per_segment: int
    crc32s: NDArray[np.uint32]
    """Of each row's feature, shape ``[rows]``, mapped."""

    def unchecked(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `rows` that nobody has looked at yet, in their order."""
        return self.checks.unchecked(rows)

    def check(self, rows: NDArray[np.int64]) -> None:
        """Compare the features of rows with their checksums; 2 us for each of 8 KB in memory."""
        per_segment, features = self.rows_per_segment, self.features
        found = [
            zlib.crc32(features[row // per_segment][row % per_segment]) for row in rows.tolist()
        ]
        self.checks.note(rows, np.array(found, dtype=np.uint32) == self.crc32s[rows])

    def damaged(self, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Tell which of `rows` are damaged: bool, shape ``[n]``; None if no row at all is."""
        return self.checks.damaged(rows)


def log_damage(rows: NDArray[np.int64], name: str, directory: Path, generation: int) -> None:
    """Say which features of a collection are damaged, and what brings them back."""
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS].tolist()))
    logger.error(
        "%d features of %s do not match their checksums (%s of generation %d, rows %s%s): they "
        "are not served. Verify with repair brings them back where another replica has them.",
        len(rows),
        name,
        directory,
        generation,
        shown,
        ", ..." if len(rows) > _SHOWN_ROWS else "",
    )
