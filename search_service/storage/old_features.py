"""Features out of files that may be damaged: whatever is handed out was checked."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import DataLossError, PreconditionError
from hashlens.types import FeatureDtype
from search_service.storage import layout, manifest
from search_service.storage.keys import Meta

_ROWS_AT_ONCE: Final = 1 << 16
_ONE_SEGMENT: Final = 1 << 62
_ROWS_NAME: Final = re.compile(re.escape(layout.rows_file(0)).replace("0", r"(\d+)"))


class OldFeatures:
    """Finds features by id and sequence number in a directory of files.

    The files are read, never mapped, and taken for what they are: a feature counts if a row has the
    id, the sequence number and the code that are asked for, and the feature's CRC-32. They may be
    appended to meanwhile.

    Parameters
    ----------
    directory
        Where they are; one without a manifest of this collection has nothing.
    meta
        Of the collection.
    """

    def __init__(self, directory: Path, meta: Meta) -> None:
        self._row_bytes = layout.feature_bytes(meta.spec)
        self._open: list[int] = []
        self._words: list[int] = []
        self._segments: list[int] = []
        self._rows_per_segment = 1
        self._seqs: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._order: NDArray[np.int64] | None = None
        try:
            with contextlib.suppress(OSError):
                self._find(directory, meta)
        except BaseException:
            self.close()
            raise

    def read(self, seq: int, item_id: bytes, code: bytes) -> tuple[bytes, int] | None:
        """Return a feature and its CRC-32, or None if it is not there or not whole.

        `code` is padded to whole 64-bit words.
        """
        at = int(np.searchsorted(self._seqs, np.uint64(seq)))
        if at >= len(self._seqs) or int(self._seqs[at]) != seq:
            return None
        row = at if self._order is None else int(self._order[at])
        try:
            first = max(row - 1, 0)
            width = layout.ROW.itemsize
            data = os.pread(self._rows_fd, (row + 1 - first) * width, first * width)
            records = np.frombuffer(data, dtype=layout.ROW)
            start = int(records[0]["id_end"]) if row else 0
            n_bytes = int(records[-1]["id_end"]) - start
            if records[-1]["flags"] & layout.NO_FEATURE or n_bytes != len(item_id):
                return None
            if os.pread(self._ids_fd, n_bytes, start) != item_id:
                return None
            if b"".join([os.pread(word, 8, 8 * row) for word in self._words]) != code:
                return None
            segment, position = divmod(row, self._rows_per_segment)
            if segment >= len(self._segments):
                return None
            feature = os.pread(self._segments[segment], self._row_bytes, position * self._row_bytes)
        except (OSError, OverflowError, ValueError, IndexError):
            return None
        crc32 = zlib.crc32(feature)
        whole = len(feature) == self._row_bytes and crc32 == int(records[-1]["feature_crc32"])
        return (feature, crc32) if whole else None

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def _find(self, directory: Path, meta: Meta) -> None:
        raw = (directory / manifest.MANIFEST).read_bytes()
        # An epoch never comes back: wherever its UUID stands, the files are of this collection.
        if meta.epoch.encode() not in raw:
            return
        names = {path.name for path in directory.iterdir()}
        dtype = meta.spec.feature_dtype
        generation, self._rows_per_segment = _shape(directory, names, self._row_bytes, dtype)
        self._rows_fd = self._descriptor(directory / layout.rows_file(generation))
        self._ids_fd = self._descriptor(directory / layout.ids_file(generation))
        self._words = [
            self._descriptor(directory / layout.words_file(generation, word))
            for word in range(codes.n_words(meta.spec.n_bits))
        ]
        while (name := layout.features_file(generation, len(self._segments), dtype)) in names:
            self._segments.append(self._descriptor(directory / name))
        self._seqs = self._read_seqs()
        if not (self._seqs[:-1] <= self._seqs[1:]).all():
            self._order = np.argsort(self._seqs, kind="stable")
            self._seqs = self._seqs[self._order]

    def _descriptor(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        self._open.append(descriptor)
        return descriptor

    def _read_seqs(self) -> NDArray[np.uint64]:
        """Return the sequence numbers of all rows; room that is not written yet has zeros."""
        width = layout.ROW.itemsize
        found = [np.zeros(0, dtype=np.uint64)]
        while data := os.pread(
            self._rows_fd, _ROWS_AT_ONCE * width, (len(found) - 1) * _ROWS_AT_ONCE * width
        ):
            records = np.frombuffer(data[: len(data) // width * width], dtype=layout.ROW)
            found.append(records["seq"].copy())
        seqs = np.concatenate(found)
        written = np.flatnonzero(seqs)
        return seqs[: int(written[-1]) + 1 if len(written) else 0]


def _shape(
    directory: Path, names: set[str], row_bytes: int, dtype: FeatureDtype
) -> tuple[int, int]:
    """Return generation and rows per segment, from the names and sizes where need be."""
    with contextlib.suppress(DataLossError, PreconditionError):
        whole = manifest.read(directory)
        return whole.generation, whole.rows_per_segment
    generations = [int(found[1]) for found in map(_ROWS_NAME.fullmatch, names) if found]
    generation = max(generations, default=0)
    if layout.features_file(generation, 1, dtype) not in names:
        return generation, _ONE_SEGMENT
    # All but the last are full.
    first = directory / layout.features_file(generation, 0, dtype)
    return generation, max(first.stat().st_size // row_bytes, 1)
