"""Rows of mapped files, asked from the disk before a kernel stumbles over them.

A kernel that touches a page which is not in memory waits for the disk, alone, and the system may
read megabytes around it. Asking for exactly the rows that are wanted, many at a time, keeps a disk
busy. Where the rows are in memory already, finding that out is all that this costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search_service.cancel import Cancel
from search_service.snapshot import Snapshot

IN_FLIGHT_BYTES = 1 << 25
"""Most that is asked for ahead of the kernel."""

_STEP_BYTES = 1 << 20
"""Asked for, and then read by the kernel, at a time."""

_N_SAMPLES = 8
"""Rows that are looked up to tell whether a pool is in memory: a few microseconds each."""

_WAIT_S = 0.05
"""Between two looks at the cancel flag while the disk is slow."""

_JOIN_S = 0.002

_MADV_WILLNEED = 3


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the features of a snapshot lie in memory; it does not keep them alive."""

    addresses: NDArray[np.int64]
    """Of each segment's first byte."""
    segment_bits: int
    """Row ``r`` is number ``r % 2**segment_bits`` of segment ``r >> segment_bits``."""
    row_bytes: int

    @classmethod
    def of(cls, snapshot: Snapshot) -> Place:
        """Return where a snapshot's features lie."""
        addresses = [part.__array_interface__["data"][0] for part in snapshot.features]
        return cls(
            np.array(addresses, dtype=np.int64),
            snapshot.rows_per_segment.bit_length() - 1,
            snapshot.dim * snapshot.feature_dtype.numpy.itemsize,
        )

    def address_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where rows begin: int64, shape ``[n]``."""
        in_segment = rows & ((1 << self.segment_bits) - 1)
        first: NDArray[np.int64] = self.addresses[rows >> self.segment_bits]
        return first + in_segment * self.row_bytes


def blocks(
    place: Place, rows: NDArray[np.int64], block_rows: int, cancel: Cancel
) -> Generator[slice, None, None]:
    """Cut rows into blocks, each yielded when it is worth reading.

    If the rows seem to be on disk, a thread asks for them ahead of the reader, no further than
    `IN_FLIGHT_BYTES`, and the blocks are smaller. Close the iterator to end the thread.

    Parameters
    ----------
    place
        Where they lie.
    rows
        int64, shape ``[n]``, ascending.
    block_rows
        Rows of a block if they are in memory.
    cancel
        Polled before each block.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    n = rows.shape[0]
    if not is_cold(place, rows):
        for lo in range(0, n, block_rows):
            cancel.check()
            yield slice(lo, lo + block_rows)
        return
    step = max(1, min(block_rows, _STEP_BYTES // max(1, place.row_bytes)))
    parts = [slice(lo, lo + step) for lo in range(0, n, step)]
    asked = threading.Semaphore(0)
    room = threading.Semaphore(max(1, IN_FLIGHT_BYTES // (step * place.row_bytes)))
    stop = threading.Event()

    def ask() -> None:
        for part in parts:
            room.acquire()
            if stop.is_set():
                return
            want(*_ranges(place, rows[part]))
            asked.release()

    reader = threading.Thread(target=ask, name="readahead", daemon=True)
    reader.start()
    try:
        for part in parts:
            cancel.check()
            while not asked.acquire(timeout=_WAIT_S):
                cancel.check()
            yield part
            room.release()
    finally:
        stop.set()
        room.release()
        # It may be inside the system, where a busy disk holds it up. What it asks for is advice,
        # which does no harm to whom the memory belongs to by then.
        reader.join(_JOIN_S)


def is_cold(place: Place, rows: NDArray[np.int64]) -> bool:
    """Tell, by a sample, whether some of `rows` are not in memory; False where none can tell."""
    if _libc is None or rows.shape[0] == 0:
        return False
    sample = rows[np.linspace(0, rows.shape[0] - 1, _N_SAMPLES, dtype=np.int64)]
    residence = ctypes.c_ubyte(1)
    for page in (place.address_of(sample) & -mmap.PAGESIZE).tolist():
        if _libc.mincore(page, mmap.PAGESIZE, ctypes.byref(residence)) == 0 and not (
            residence.value & 1
        ):
            return True
    return False


def want(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    """Ask the system to read ranges of mapped files; returns before they are there.

    Parameters
    ----------
    starts, ends
        Addresses: int64, shape ``[n]``; the starts are whole pages.
    """
    if _libc is not None:
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            _libc.madvise(start, end - start, _MADV_WILLNEED)  # advice: a refusal does no harm


def want_rows(snapshot: Snapshot, first: int, last: int) -> None:
    """Ask the system to read the features of rows `first` to `last`, the latter left out."""
    rows = np.arange(first, min(last, snapshot.rows), dtype=np.int64)
    if rows.size:
        want(*_ranges(Place.of(snapshot), rows))


def _ranges(place: Place, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the pages of `rows` begin and end, those that touch as one."""
    starts = place.address_of(rows)
    ends = starts + place.row_bytes
    starts = starts & -mmap.PAGESIZE
    # Of two rows beside each other, the second begins in a page that the first has or ends at.
    apart = starts[1:] > ends[:-1]
    return starts[np.r_[True, apart]], ends[np.r_[apart, True]]


def _load_libc() -> Any:
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        return libc
    return None


_libc = _load_libc()
