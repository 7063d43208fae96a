"""From tags to rows: a bitmap for each tag."""

from __future__ import annotations

import threading
from array import array
from collections import defaultdict
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from hashlens.types import TagFilter
from search_service.snapshot import Texts
from search_service.storage import layout

BLOCK_ROWS: Final = 1 << 13
"""Rows that are indexed at once, in some milliseconds; nobody waits longer for the lock."""


class TagIndex:
    """Which rows have each tag, dead ones too.

    Rows are added in order, by whoever comes first: the thread that follows the log, the one that
    builds the index behind a start, or a search that needs it. A row never loses a tag, so a
    version sees its own by leaving out the rows behind it. Thread-safe; the lock is held for
    milliseconds.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._rows_of: dict[str, int | BitMap] = {}
        """A tag that one row has is no bitmap: there may be as many as rows."""
        self._lock = threading.Lock()

    @property
    def n_tags(self) -> int:
        """How many different tags there are."""
        return len(self._rows_of)

    def extend(self, stored: Texts, rows: int, max_rows: int = BLOCK_ROWS) -> bool:
        """Index further rows, at most `max_rows`; tell whether the first `rows` are.

        Parameters
        ----------
        stored
            The tags of `rows` rows at least, each as `layout.pack_tags` made them.
        rows
            How many rows are wanted.
        max_rows
            How many may be indexed now.
        """
        if self._rows >= rows:
            return True
        with self._lock:
            if self._rows < rows:
                self._add(stored, min(rows, self._rows + max_rows))
            return self._rows >= rows

    def passing(self, wanted: TagFilter, rows: int) -> NDArray[np.int64]:
        """Return those of the first `rows` rows, all indexed, that pass: int64, ascending."""
        found = BitMap()
        found.add_range(0, rows)
        with self._lock:
            for tag in wanted.all:
                found &= self._union((tag,))
            if wanted.any:
                found &= self._union(wanted.any)
            found -= self._union(wanted.none)
        return np.asarray(found.to_array()).astype(np.int64)

    def _union(self, tags: tuple[str, ...]) -> BitMap:
        union = BitMap()
        for tag in tags:
            known = self._rows_of.get(tag)
            if isinstance(known, int):
                union.add(known)
            elif known is not None:
                union |= known
        return union

    def _add(self, stored: Texts, stop: int) -> None:
        first = self._rows
        ends = stored.ends[first:stop].astype(np.int64)
        begin = int(stored.ends[first - 1]) if first else 0
        if ends[-1] > begin:
            starts = np.concatenate(([begin], ends[:-1]))
            tagged = np.flatnonzero(ends > starts)
            packed = stored.data[begin : ends[-1]].tobytes()
            # Many rows have the same tags, and unpacking those once is what takes time.
            alike: defaultdict[bytes, list[int]] = defaultdict(list)
            for row, lo, hi in zip(
                (tagged + first).tolist(),
                (starts[tagged] - begin).tolist(),
                (ends[tagged] - begin).tolist(),
                strict=True,
            ):
                alike[packed[lo:hi]].append(row)
            added: defaultdict[str, list[int]] = defaultdict(list)
            for tags, rows in alike.items():
                for tag in layout.unpack_tags(tags):
                    added[tag] += rows
            for tag, rows in added.items():
                self._give(tag, rows)
        self._rows = stop

    def _give(self, tag: str, rows: list[int]) -> None:
        known = self._rows_of.get(tag)
        if known is None and len(rows) == 1:
            self._rows_of[tag] = rows[0]
            return
        if not isinstance(known, BitMap):
            rows = rows if known is None else [known, *rows]
            known = self._rows_of[tag] = BitMap()
        known.update(array("I", rows))
