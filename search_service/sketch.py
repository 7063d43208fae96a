"""Sketches: a table's features in one byte per number, in memory, so that few have to be read.

A sketch bounds the distance of a query to each row from below; `search_service.kernels.sketch`
says how. Rows whose bound is beyond the k-th best of the answer need no second look, so the answer
is the exact one, bit for bit. It is derived data: made in the background from what snapshots show,
for a prefix of a table's rows, never stored, and searches do without where there is none.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search_service import readahead
from search_service.cancel import Cancel
from search_service.features import with_feature
from search_service.kernels import sketch as kernels
from search_service.snapshot import Snapshot

_BLOCK_BYTES = 1 << 24
"""About how much memory is taken at a time."""

_STEP_BYTES = 1 << 21
"""Features, as float32, that are rounded at a time."""

_SCAN_BYTES = 1 << 24
"""Read between two looks at the cancel flag: a few milliseconds."""


def warm_up() -> None:
    """Compile the kernels."""
    kernels.encode.compile()
    kernels.bounds.compile()


def row_bytes(dim: int) -> int:
    """Return what a row takes."""
    return kernels.HEADER_BYTES + _code_bytes(dim)


def _code_bytes(dim: int) -> int:
    return -(-dim // kernels.LINE_BYTES) * kernels.LINE_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """What is known of a table's first rows. Immutable: `extended` makes a larger one.

    Larger ones share memory with it, of which each shows only its own rows.
    """

    dim: int
    rows: int = 0
    """Rows 0 to `rows` of the table are in it."""
    _blocks: tuple[NDArray[np.uint8], ...] = field(default=(), repr=False)
    """Each uint8, shape ``[block_rows * row_bytes(dim)]``; see `search_service.kernels.sketch`."""
    _addresses: tuple[int, ...] = field(default=(), repr=False)
    """Where each block begins."""

    @property
    def block_rows(self) -> int:
        """Rows of a block: a power of two."""
        return 1 << max(0, (_BLOCK_BYTES // row_bytes(self.dim)).bit_length() - 1)

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes."""
        return sum(block.nbytes for block in self._blocks)

    def extended(self, snapshot: Snapshot, max_bytes: int) -> Sketch:
        """Return one with some rows more, a few megabytes of features.

        Parameters
        ----------
        snapshot
            Of the table that this is of.
        max_bytes
            Most memory to take in all, in bytes.

        Returns
        -------
        Sketch
            Itself if it has all rows of the snapshot, or there is no room for more.
        """
        rows_at_once = max(1, _STEP_BYTES // (4 * self.dim))
        block, first = divmod(self.rows, self.block_rows)
        n = min(snapshot.rows - self.rows, rows_at_once, self.block_rows - first)
        blocks, addresses = self._blocks, self._addresses
        if n > 0 and block == len(blocks):
            size = self.block_rows * row_bytes(self.dim)
            if self.nbytes + size > max_bytes:
                n = 0
            else:
                blocks += (_memory(size),)
                addresses += (blocks[-1].__array_interface__["data"][0],)
        if n <= 0:
            return self
        self._encode(_features(snapshot, self.rows, n), blocks[block], first)
        return Sketch(self.dim, self.rows + n, blocks, addresses)

    def bounds(
        self, rows: NDArray[np.int64], query: NDArray[np.float32], cancel: Cancel
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Estimate the distance of a query to each of `rows`, and bound it from below.

        Parameters
        ----------
        rows
            int64, shape ``[n]``, each below `rows`; ascending.
        query
            float32, shape ``[dim]``, finite, contiguous.
        cancel
            Polled between blocks.

        Returns
        -------
        near
            float64, shape ``[n]``: the estimate.
        least
            float64, shape ``[n]``: what `fine.distances_to` gives is no less.

        Raises
        ------
        CancelledError, DeadlineError
            As `cancel` says.
        """
        codes, numbers = _rounded(query, _code_bytes(self.dim))
        addresses = np.array(self._addresses, dtype=np.int64)
        block_bits = self.block_rows.bit_length() - 1
        near = np.empty(rows.shape[0], dtype=np.float64)
        least = np.empty_like(near)
        step = max(1, _SCAN_BYTES // row_bytes(self.dim))
        for lo in range(0, rows.shape[0], step):
            cancel.check()
            part = slice(lo, lo + step)
            kernels.bounds(
                addresses, block_bits, self.dim, rows[part], codes, numbers, near[part], least[part]
            )
        return near, least

    def _encode(self, features: NDArray[np.float32], block: NDArray[np.uint8], first: int) -> None:
        """Write rows into a block, from row `first` of it on."""
        n, dim = features.shape
        rows = slice(first, first + n)
        end_of_codes = self.block_rows * _code_bytes(dim)
        codes = np.empty((n, dim), dtype=np.uint8)
        headers = block[end_of_codes:].view(np.float64).reshape(self.block_rows, -1)[rows]
        kernels.encode(features, codes, headers)
        block[:end_of_codes].reshape(self.block_rows, -1)[rows, :dim] = codes


def _rounded(
    query: NDArray[np.float32], size: int
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Round a query as `kernels.bounds` wants it."""
    exact = query.astype(np.float64)
    scale = float(np.abs(exact).max()) / kernels.query_levels(query.shape[0])
    codes = np.zeros(size, dtype=np.int16)
    levels = np.rint(exact / scale) if scale > 0 else np.zeros_like(exact)
    codes[: query.shape[0]] = levels
    lost = float(np.sqrt(np.square(exact - scale * levels).sum()))
    # Rounded up, as the kernel does it for rows.
    lost = lost * (1 + 2.0**-30) + math.sqrt(query.shape[0]) * float(np.abs(exact).max()) * 2.0**-48
    total, squares = float(levels.sum()), float(np.square(levels).sum())  # both exact
    return codes, np.array([scale, total, scale * scale * squares, lost])


def _features(snapshot: Snapshot, first: int, n: int) -> NDArray[np.float32]:
    """Return rows widened, NaN where a feature is missing: float32, shape ``[n, dim]``."""
    readahead.want_rows(snapshot, first, first + 2 * n)  # the next ones, too
    has_feature = with_feature(snapshot, np.arange(first, first + n, dtype=np.int64), Cancel())
    wide = np.empty((n, snapshot.dim), dtype=np.float32)
    done = 0
    while done < n:
        segment, position = divmod(first + done, snapshot.rows_per_segment)
        count = min(n - done, snapshot.rows_per_segment - position)
        wide[done : done + count] = snapshot.features[segment][position : position + count]
        done += count
    if has_feature is not None:
        wide[~has_feature] = np.nan
    return wide


def _memory(size: int) -> NDArray[np.uint8]:
    """Return zeros that begin at a page, in large pages where the system has them."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array: NDArray[Any] = np.frombuffer(memory, dtype=np.uint8)
    return array
