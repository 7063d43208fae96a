"""Reading a generation's files from the first row on, checking whatever is read.

The files are read and not mapped: one that was cut is an error of a call and not a signal.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import DataLossError
from hashlens.types import CollectionSpec
from search_service.storage import layout
from search_service.storage.arrays import Prefix

_BLOCK_BYTES: Final = 8 << 20
_BLOCK_ROWS: Final = 1 << 14
TEXT_ENDS: Final = ("id_end", "payload_end", "tags_end")
"""Fields of `layout.ROW`."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows that follow one another and were alive."""

    packed: NDArray[np.uint8]
    """Codes: shape ``[n, n_bytes]``."""
    records: NDArray[Any]
    """`layout.ROW`, shape ``[n]``; where texts end counts from the block's beginning."""
    texts: tuple[bytes, bytes, bytes]
    """Ids, payloads, tags, each one after the other."""
    features: bytes
    """Likewise; zeros where a feature is missing or was found damaged."""
    n_damaged: int
    """Rows whose feature did not match its checksum."""
    nbytes: int
    """About what was read for them."""

    def ids(self) -> list[str]:
        """Return the ids."""
        ends = self.records["id_end"].tolist()
        starts = [0, *ends][:-1]
        return [
            str(self.texts[0][start:end], "utf-8") for start, end in zip(starts, ends, strict=True)
        ]


class GenerationReader:
    """Reads what counts of a generation, in several goes while it grows.

    Not thread-safe. Files may be appended to meanwhile.

    Parameters
    ----------
    directory
        Where the files are.
    spec
        What the collection is bound to.
    generation, rows_per_segment
        As in the manifest.
    """

    def __init__(
        self, directory: Path, spec: CollectionSpec, generation: int, rows_per_segment: int
    ) -> None:
        self.generation = generation
        self.row = 0
        """The first row that was not read yet."""
        self.n_deaths = 0
        """Tombstones that were read."""
        self._directory = directory
        self._spec = spec
        self._rows_per_segment = rows_per_segment
        self._feature_bytes = layout.feature_bytes(spec)
        self._rows_name = layout.rows_file(generation)
        self._deaths_name = layout.deaths_file(generation)
        self._text_names = (
            layout.ids_file(generation),
            layout.payloads_file(generation),
            layout.tags_file(generation),
        )
        self._word_names = tuple(
            layout.words_file(generation, word) for word in range(codes.n_words(spec.n_bits))
        )
        self._descriptors: dict[str, int] = {}
        self._read: dict[str, tuple[int, int]] = {}
        """Bytes read of each checksummed file, and their CRC-32."""
        self._ends = np.zeros(3, dtype=np.int64)

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def blocks(self, now: Prefix) -> Iterator[Block]:
        """Read on to the last row of `now`; rows that are dead in it are left out.

        Raises
        ------
        DataLossError
            What is there cannot be rows. What is damaged otherwise, `check` finds afterwards.
        OSError
            The disk is broken.
        """
        limits = np.array([now.files[name].length for name in self._text_names])
        row_bytes = layout.ROW.itemsize + 8 * len(self._word_names) + self._feature_bytes
        while self.row < now.rows:
            n = min(_BLOCK_ROWS, now.rows - self.row)
            data = self._take(self._rows_name, n * layout.ROW.itemsize)
            records = np.frombuffer(data, dtype=layout.ROW)
            ends = np.stack([records[name].astype(np.int64) for name in TEXT_ENDS])
            lengths = np.diff(ends, axis=1, prepend=self._ends[:, None])
            if (lengths < 0).any() or (ends[:, -1] > limits).any():
                raise self._damaged(self._rows_name)
            self._ends = ends[:, -1]
            weights = np.cumsum(lengths.sum(axis=0) + row_bytes)
            first = 0
            while first < n:
                before = int(weights[first - 1]) if first else 0
                stop = int(np.searchsorted(weights, before + _BLOCK_BYTES, side="right"))
                stop = max(stop, first + 1)
                yield self._block(
                    records[first:stop],
                    lengths[:, first:stop],
                    now,
                    int(weights[stop - 1]) - before,
                )
                first = stop

    def deaths(self, now: Prefix) -> NDArray[Any]:
        """Read on to the last tombstone of `now`: `layout.DEATH`, shape ``[n]``."""
        n = now.deaths - self.n_deaths
        self.n_deaths = now.deaths
        return np.frombuffer(
            self._take(self._deaths_name, n * layout.DEATH.itemsize), dtype=layout.DEATH
        )

    def check(self, now: Prefix) -> None:
        """Compare what was read with the checksums, once all of `now` was.

        Raises
        ------
        DataLossError
            A file is damaged.
        """
        for name, state in now.files.items():
            if state.crc32 is not None and self._read.get(name, (0, 0)) != (
                state.length,
                state.crc32,
            ):
                raise self._damaged(name)

    def _block(
        self, records: NDArray[Any], lengths: NDArray[np.int64], now: Prefix, nbytes: int
    ) -> Block:
        n, first = len(records), self.row
        self.row += n
        words = [np.frombuffer(self._take(name, n * 8), dtype="<u8") for name in self._word_names]
        texts = [
            np.frombuffer(self._take(name, int(of_rows.sum())), dtype=np.uint8)
            for name, of_rows in zip(self._text_names, lengths, strict=True)
        ]
        alive = np.ones(n, dtype=bool)
        if now.dead is not None:
            alive = now.dead[first : first + n] == 0
            texts = [
                data[np.repeat(alive, of_rows)]
                for data, of_rows in zip(texts, lengths, strict=True)
            ]
        kept = records[alive]
        for name, of_rows in zip(TEXT_ENDS, lengths, strict=True):
            kept[name] = np.cumsum(of_rows[alive])
        features, n_damaged = self._features(kept, np.flatnonzero(alive) + first)
        packed = codes.from_words(np.stack([word[alive] for word in words]), self._spec.n_bits)
        ids, payloads, tags = (data.tobytes() for data in texts)
        return Block(packed, kept, (ids, payloads, tags), features, n_damaged, nbytes)

    def _features(self, records: NDArray[Any], rows: NDArray[np.int64]) -> tuple[bytes, int]:
        """Return the features of rows; take the damaged for missing, in their records too."""
        width = self._feature_bytes
        if not width or not len(rows):
            return b"", 0
        segments = rows // self._rows_per_segment
        parts = []
        for segment in range(int(segments[0]), int(segments[-1]) + 1):
            at = rows[segments == segment] - segment * self._rows_per_segment
            if len(at):
                name = layout.features_file(self.generation, segment, self._spec.feature_dtype)
                first, stop = int(at[0]), int(at[-1]) + 1
                data = self._pread(name, (stop - first) * width, first * width)
                numbers = np.frombuffer(data, dtype=np.uint8).reshape(stop - first, width)
                parts.append(numbers[at - first])
        features = np.concatenate(parts)
        nothing = zlib.crc32(bytes(width))
        n_damaged = 0
        missing = records["flags"] & layout.NO_FEATURE
        for i, expected in enumerate(records["feature_crc32"].tolist()):
            if missing[i] or zlib.crc32(features[i].data) != expected:
                n_damaged += not missing[i]
                features[i] = 0
                records["feature_crc32"][i] = nothing
                records["flags"][i] |= layout.NO_FEATURE
        return features.tobytes(), n_damaged

    def _take(self, name: str, n_bytes: int) -> bytes:
        """Read the next bytes of a checksummed file."""
        offset, crc32 = self._read.get(name, (0, 0))
        data = self._pread(name, n_bytes, offset) if n_bytes else b""
        self._read[name] = (offset + n_bytes, zlib.crc32(data, crc32))
        return data

    def _pread(self, name: str, n_bytes: int, offset: int) -> bytes:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            descriptor = os.open(self._directory / name, os.O_RDONLY)
            self._descriptors[name] = descriptor
        parts = []
        while n_bytes:
            data = os.pread(descriptor, n_bytes, offset)
            if not data:
                raise self._damaged(name)
            parts.append(data)
            offset, n_bytes = offset + len(data), n_bytes - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _damaged(self, name: str) -> DataLossError:
        return DataLossError(f"{self._directory / name} does not match its checksum")
