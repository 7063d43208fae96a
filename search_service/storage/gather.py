"""Slices of one long array, copied out one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def gathered(
    data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> bytes:
    """Return ``data[start : start + length]`` of each, joined.

    Parameters
    ----------
    data
        Where they are; uint8.
    starts, lengths
        int64, shape ``[n]``.
    """
    if not len(lengths):
        return b""
    ends = np.cumsum(lengths)
    places = np.arange(int(ends[-1])) + np.repeat(starts - (ends - lengths), lengths)
    return bytes(data[places].data)


def cut(joined: bytes, lengths: NDArray[np.int64]) -> Iterator[bytes]:
    """Return the slices that were joined."""
    at = 0
    for length in lengths.tolist():
        yield joined[at : at + length]
        at += length
