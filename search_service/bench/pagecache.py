"""What of a file is in memory, and how to put it out, so that cold rows are cold."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import PreconditionError

_WARM_SHARE = 0.01
"""Of the pages: more than that still in memory, and nothing is cold."""

_libc = ctypes.CDLL(None, use_errno=True)


def resident_share(array: NDArray[Any]) -> float:
    """Return the share of a mapped array's pages that are in memory."""
    start, size = _pages(array)
    residence = np.zeros(size // mmap.PAGESIZE, dtype=np.uint8)
    if _libc.mincore(
        ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_void_p(residence.ctypes.data)
    ):
        raise OSError(ctypes.get_errno(), "mincore")
    return float((residence & 1).mean())


def advise(array: NDArray[Any], advice: int) -> None:
    """Give the system advice on a mapped array: one of `mmap`'s ``MADV_...``."""
    start, size = _pages(array)
    if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice):
        raise OSError(ctypes.get_errno(), "madvise")


def put_out(arrays: dict[Path, NDArray[Any]]) -> None:
    """Put mapped files, all written to disk, out of memory.

    Parameters
    ----------
    arrays
        File -> what is mapped of it, with no other mapping in use.

    Raises
    ------
    PreconditionError
        The system keeps them: they lie on a file system in memory, for instance.
    """
    for path, array in arrays.items():
        advise(array, mmap.MADV_DONTNEED)  # pages that are mapped would stay
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        share = resident_share(array)
        if share > _WARM_SHARE:
            raise PreconditionError(
                f"{share:.0%} of {path.name} stay in memory: no cold rows to measure there. "
                "Give --dir on a disk."
            )


def _pages(array: NDArray[Any]) -> tuple[int, int]:
    start = array.__array_interface__["data"][0]
    assert start % mmap.PAGESIZE == 0
    return start, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
