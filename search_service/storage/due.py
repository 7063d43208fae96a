"""Which rows have outlived themselves."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS: Final = 1 << 20
_NEVER: Final = (1 << 64) - 1


class DueRows:
    """Finds the rows of one table that have expired; for one thread at a time.

    The earliest expiry of all rows seen is kept, so looking costs nothing until then. It may be
    that of a row that is dead by now: looking once for nothing mends that.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._earliest_ms = _NEVER

    def find(
        self, records: NDArray[Any], dead: NDArray[np.uint8] | None, now_ms: int
    ) -> NDArray[np.int64]:
        """Return the rows that are alive and have expired: int64, ascending.

        Parameters
        ----------
        records
            `layout.ROW`, shape ``[rows]``; as many rows as in the call before, or more.
        dead
            1 for each dead row, shape ``[rows]``; None without any.
        now_ms
            Milliseconds since 1970.
        """
        expires_ms = records["expires_ms"]
        n_rows = len(expires_ms)
        if self._rows < n_rows:
            self._earliest_ms = min(self._earliest_ms, _earliest(expires_ms[self._rows :]))
            self._rows = n_rows
        if self._earliest_ms > now_ms:
            return np.zeros(0, dtype=np.int64)
        found: list[NDArray[np.int64]] = []
        earliest_ms = _NEVER
        for first in range(0, n_rows, _BLOCK_ROWS):
            # Less one, 0 is the latest of all.
            last_ms = expires_ms[first : first + _BLOCK_ROWS] - np.uint64(1)
            if dead is not None:
                last_ms[dead[first : first + _BLOCK_ROWS] != 0] = _NEVER
            found.append(np.flatnonzero(last_ms < np.uint64(now_ms)) + first)
            earliest_ms = min(earliest_ms, int(last_ms.min()) + 1)
        self._earliest_ms = min(earliest_ms, _NEVER)
        return np.concatenate(found)


def _earliest(expires_ms: NDArray[np.uint64]) -> int:
    earliest_ms = _NEVER
    for first in range(0, len(expires_ms), _BLOCK_ROWS):
        last_ms = expires_ms[first : first + _BLOCK_ROWS] - np.uint64(1)
        earliest_ms = min(earliest_ms, int(last_ms.min()) + 1)
    return earliest_ms
