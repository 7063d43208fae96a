"""Hits by column: what a search of many hits returns without an object for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hashlens.types import Hit


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedHits(Sequence[Hit]):
    """Hits by column, best first.

    A sequence of `Hit`, each made when it is looked at; who wants speed takes the columns.

    Raises
    ------
    ValueError
        The columns do not fit each other.
    """

    id_bytes: bytes
    """The ids in UTF-8, one after the other."""
    id_ends: NDArray[np.uint32]
    """Where each ends in `id_bytes`, shape ``[n]``."""
    hamming_bits: NDArray[np.uint16]
    """Distances between the codes, shape ``[n]``."""
    distances: NDArray[np.float32] | None = None
    """Euclidean distances between the features, shape ``[n]``; None when the coarse stage alone
    ranked."""
    payload_bytes: bytes = b""
    """The payloads, one after the other."""
    payload_ends: NDArray[np.uint32] | None = None
    """Where each ends in `payload_bytes`, shape ``[n]``; None if they were not asked for."""
    codes: NDArray[np.uint8] | None = None
    """Packed codes, shape ``[n, n_bytes]``; None if they were not asked for."""

    def __post_init__(self) -> None:
        shape = self.hamming_bits.shape
        whole = len(shape) == 1 and self.id_ends.shape == shape
        whole = whole and (self.distances is None or self.distances.shape == shape)
        whole = whole and (self.codes is None or self.codes.shape[:1] == shape)
        if not whole:
            raise ValueError("the columns of packed hits are of different lengths")
        _check_ends(self.id_ends, len(self.id_bytes))
        if self.payload_ends is not None:
            if self.payload_ends.shape != shape:
                raise ValueError("the columns of packed hits are of different lengths")
            _check_ends(self.payload_ends, len(self.payload_bytes))

    def __len__(self) -> int:
        return len(self.hamming_bits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"there are {n} hits")
        i = index % n
        return Hit(
            id=_slice_of(self.id_bytes, self.id_ends, i).decode(),
            hamming_bits=int(self.hamming_bits[i]),
            distance=None if self.distances is None else float(self.distances[i]),
            payload=(
                b""
                if self.payload_ends is None
                else _slice_of(self.payload_bytes, self.payload_ends, i)
            ),
            code=None if self.codes is None else self.codes[i].tobytes(),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedHits) and (
            self.id_bytes == other.id_bytes
            and self.payload_bytes == other.payload_bytes
            and all(
                _same(getattr(self, name), getattr(other, name))
                for name in ("id_ends", "hamming_bits", "distances", "payload_ends", "codes")
            )
        )

    def __hash__(self) -> int:
        return hash((self.id_bytes, self.hamming_bits.tobytes()))

    def ids(self) -> list[str]:
        """Return all ids, in the order of the hits."""
        text = self.id_bytes.decode()
        ends = self.id_ends.tolist()
        starts = [0, *ends[:-1]]
        if len(text) == len(self.id_bytes):  # ASCII: a byte is a character
            return [text[start:end] for start, end in zip(starts, ends, strict=False)]
        data = self.id_bytes
        return [data[start:end].decode() for start, end in zip(starts, ends, strict=False)]

    def payloads(self) -> list[bytes]:
        """Return all payloads, in the order of the hits; empty ones if they were not asked for."""
        if self.payload_ends is None:
            return [b""] * len(self)
        data, ends = self.payload_bytes, self.payload_ends.tolist()
        return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=False)]

    def unpacked(self) -> tuple[Hit, ...]:
        """Return all hits, faster than one by one."""
        n = len(self)
        codes = [None] * n if self.codes is None else map(bytes, self.codes)
        distances = [None] * n if self.distances is None else self.distances.tolist()
        return tuple(
            map(Hit, self.ids(), self.hamming_bits.tolist(), distances, self.payloads(), codes)
        )


def _check_ends(ends: NDArray[np.uint32], n_bytes: int) -> None:
    last = int(ends[-1]) if ends.shape[0] else 0
    if last != n_bytes or bool((ends[1:] < ends[:-1]).any()):
        raise ValueError(f"the ends of packed hits do not divide {n_bytes} bytes")


def _slice_of(data: bytes, ends: NDArray[np.uint32], i: int) -> bytes:
    return data[int(ends[i - 1]) if i else 0 : int(ends[i])]


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
