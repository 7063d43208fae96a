"""The files of a collection's rows: codes, records, ids, payloads, tags, tombstones, features."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import DataLossError
from hashlens.types import CollectionSpec
from search_service.storage import layout
from search_service.storage.append_file import AppendFile
from search_service.storage.failpoints import reach
from search_service.storage.manifest import FileState, Manifest


@dataclass(frozen=True, slots=True)
class Prefix:
    """What of a collection's files counted at a moment."""

    rows: int
    deaths: int
    seq: int
    """The last write that was applied."""
    dead: NDArray[np.uint8] | None
    """1 for each row that was dead, shape ``[rows]``; None without any."""
    records: NDArray[Any]
    """`layout.ROW`, shape ``[rows]``, mapped."""
    files: dict[str, FileState]


class Arrays:
    """The files of one generation of a collection's rows.

    Not thread-safe: the one that follows the log writes, and `state` is read under its lock.

    Parameters
    ----------
    directory
        Where they are.
    spec
        What the collection is bound to.
    generation
        Part of the file names.
    rows_per_segment
        How many features share a file; a power of two.
    manifest
        What to load; None to begin with empty files.

    Raises
    ------
    DataLossError
        A file is missing, too short, or does not match its checksum.
    OSError
        The disk is full or broken.
    """

    def __init__(
        self,
        directory: Path,
        spec: CollectionSpec,
        *,
        generation: int,
        rows_per_segment: int,
        manifest: Manifest | None,
    ) -> None:
        self.rows = 0
        self.deaths = 0
        self.rows_per_segment = rows_per_segment
        self._directory = directory
        self._spec = spec
        self._generation = generation
        self._states = None if manifest is None else manifest.files
        self._open: list[AppendFile] = []
        self._segments: list[AppendFile] = []
        self._full_segments: list[NDArray[Any]] = []
        self._unsynced: set[AppendFile] = set()
        self._new_names = manifest is None
        try:
            self._words = [
                self._file(layout.words_file(generation, word))
                for word in range(codes.n_words(spec.n_bits))
            ]
            self._rows = self._file(layout.rows_file(generation))
            self._ids = self._file(layout.ids_file(generation))
            self._payloads = self._file(layout.payloads_file(generation))
            self._tags = self._file(layout.tags_file(generation))
            self._deaths = self._file(layout.deaths_file(generation))
            if manifest is not None:
                self._load(manifest)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, directory: Path, spec: CollectionSpec, *, generation: int, rows_per_segment: int
    ) -> Self:
        """Make empty files."""
        return cls(
            directory,
            spec,
            generation=generation,
            rows_per_segment=rows_per_segment,
            manifest=None,
        )

    @classmethod
    def load(cls, directory: Path, manifest: Manifest) -> Self:
        """Open the files that a manifest describes, cut to what it says."""
        return cls(
            directory,
            manifest.spec,
            generation=manifest.generation,
            rows_per_segment=manifest.rows_per_segment,
            manifest=manifest,
        )

    def append(
        self,
        *,
        packed: NDArray[np.uint8],
        records: NDArray[Any],
        ids: bytes,
        payloads: bytes,
        tags: bytes,
        features: bytes,
        deaths: NDArray[Any],
    ) -> None:
        """Write rows and tombstones; all of them count, or none if an error is raised.

        Parameters
        ----------
        packed
            Codes of the new rows: uint8, shape ``[n, n_bytes]``.
        records
            `layout.ROW`, shape ``[n]``.
        ids, payloads, tags, features
            Of all new rows, one after the other.
        deaths
            `layout.DEATH`, shape ``[m]``.

        Raises
        ------
        OSError
            The disk is full or broken; trying again later is safe.
        """
        n_segments = len(self._segments)
        try:
            reach("append.begin")
            if len(records):
                for file, words in zip(self._words, codes.as_words(packed), strict=True):
                    self._append(file, words.astype("<u8", copy=False).data)
                self._append(self._rows, records.tobytes())
                self._append(self._ids, ids)
                self._append(self._payloads, payloads)
                self._append(self._tags, tags)
                if self._spec.dim:
                    reach("append.features")
                    self._append_features(memoryview(features), len(records))
            self._append(self._deaths, deaths.tobytes())
            reach("append.commit")
        except BaseException:
            for file in self._open:
                file.rollback()
            self._forget_segments(n_segments)
            raise
        for file in self._open:
            file.commit()
        self.rows += len(records)
        self.deaths += len(deaths)

    def words(self) -> tuple[NDArray[np.uint64], ...]:
        """Return the codes, one array per word: uint64, shape ``[rows]``, mapped."""
        size = self.rows * 8
        return tuple(file.view()[:size].view(np.uint64) for file in self._words)

    def features(self) -> tuple[NDArray[Any], ...]:
        """Return the segments of features, each shape ``[rows of the segment, dim]``, mapped."""
        if not self._spec.dim:
            return ()
        n_full = self.rows // self.rows_per_segment
        while len(self._full_segments) < n_full:
            position = len(self._full_segments)
            self._full_segments.append(self._segment(position, self.rows_per_segment))
        rest = self.rows % self.rows_per_segment
        last = [self._segment(n_full, rest)] if rest else []
        return tuple(self._full_segments[:n_full] + last)

    def records(self) -> NDArray[Any]:
        """Return the rows' records: `layout.ROW`, shape ``[rows]``, mapped."""
        return self._rows.view()[: self.rows * layout.ROW.itemsize].view(layout.ROW)

    def death_records(self) -> NDArray[Any]:
        """Return the tombstones: `layout.DEATH`, shape ``[deaths]``, mapped."""
        return self._deaths.view()[: self.deaths * layout.DEATH.itemsize].view(layout.DEATH)

    def id_bytes(self) -> NDArray[np.uint8]:
        """Return all ids, mapped; `layout.ROW` says where each ends."""
        return self._ids.view()

    def payload_bytes(self) -> NDArray[np.uint8]:
        """Return all payloads, mapped; `layout.ROW` says where each ends."""
        return self._payloads.view()

    def tag_bytes(self) -> NDArray[np.uint8]:
        """Return all tags, mapped; `layout.ROW` says where each row's end."""
        return self._tags.view()

    def ends(self) -> tuple[int, int, int]:
        """Return where the ids, the payloads and the tags end, in bytes."""
        return self._ids.length, self._payloads.length, self._tags.length

    def state(self) -> tuple[dict[str, FileState], list[AppendFile], bool]:
        """Return what counts now, the files to sync to make it durable, and whether names are new.

        The caller syncs without the lock: appending may go on, it only adds bytes behind.
        """
        unsynced, self._unsynced = list(self._unsynced), set()
        new_names, self._new_names = self._new_names, False
        return self.lengths(), unsynced, new_names

    def lengths(self) -> dict[str, FileState]:
        """Return what counts now."""
        return {file.path.name: file.state for file in self._open}

    def files(self, names: Collection[str]) -> list[AppendFile]:
        """Return those of the files that have such names."""
        return [file for file in self._open if file.path.name in names]

    def trouble(self) -> str:
        """Return which file is gone, replaced or shorter than what is mapped of it, or nothing."""
        for file in self._open:
            found = file.trouble()
            if found:
                return found
        return ""

    def retire(self, synced: Iterable[AppendFile]) -> None:
        """Give the descriptors of durable files back that will not grow: there may be many."""
        for file in synced:
            if file.is_full and file not in self._unsynced:
                file.view()
                file.close()

    def close(self) -> None:
        """Give all descriptors back; mappings that are in use stay."""
        for file in self._open:
            file.close()

    def _load(self, manifest: Manifest) -> None:
        self.rows, self.deaths = manifest.rows, manifest.deaths
        if self._spec.dim:
            for segment in range(-(-self.rows // self.rows_per_segment)):
                self._add_segment(segment)
        row_bytes = layout.feature_bytes(self._spec)
        expected = {
            **{file.path.name: self.rows * 8 for file in self._words},
            self._rows.path.name: self.rows * layout.ROW.itemsize,
            self._deaths.path.name: self.deaths * layout.DEATH.itemsize,
            **{
                file.path.name: row_bytes
                * min(self.rows - i * self.rows_per_segment, self.rows_per_segment)
                for i, file in enumerate(self._segments)
            },
        }
        for file in self._open:
            if expected.get(file.path.name, file.length) != file.length:
                raise DataLossError(f"{file.path} has not the length that its rows take")
        if len(self._open) != len(manifest.files):
            raise DataLossError(f"the manifest in {self._directory} lists files without rows")
        if self.rows:
            last = self.records()[-1]
            if (last["id_end"], last["payload_end"], last["tags_end"]) != self.ends():
                raise DataLossError(
                    f"ids, payloads or tags in {self._directory} do not fit the rows"
                )
        self._states = None
        self.retire(self._segments)

    def _file(self, name: str, **options: Any) -> AppendFile:
        if self._states is None:
            file = AppendFile(self._directory / name, **options)
        elif name in self._states:
            file = AppendFile(self._directory / name, self._states[name], **options)
        else:
            raise DataLossError(f"the manifest in {self._directory} does not list {name}")
        self._open.append(file)
        return file

    def _add_segment(self, segment: int) -> AppendFile:
        name = layout.features_file(self._generation, segment, self._spec.feature_dtype)
        limit_bytes = self.rows_per_segment * layout.feature_bytes(self._spec)
        file = self._file(name, checksummed=False, limit_bytes=limit_bytes, random_access=True)
        self._segments.append(file)
        return file

    def _append(self, file: AppendFile, data: bytes | memoryview) -> None:
        if len(data):
            file.append(data)
            # Mapped before it counts: what is committed can always be published.
            file.view()
            self._unsynced.add(file)

    def _append_features(self, features: memoryview, n: int) -> None:
        """Write features, going on in the next segment where one is full."""
        row_bytes = layout.feature_bytes(self._spec)
        done = 0
        while done < n:
            segment, position = divmod(self.rows + done, self.rows_per_segment)
            if segment == len(self._segments):
                reach("seal.segment")
                self._add_segment(segment)
                self._new_names = True
            count = min(n - done, self.rows_per_segment - position)
            data = features[done * row_bytes : (done + count) * row_bytes]
            self._append(self._segments[segment], data)
            done += count

    def _forget_segments(self, n_keep: int) -> None:
        """Remove segments that a failed write began."""
        for file in self._segments[n_keep:]:
            file.close()
            file.path.unlink(missing_ok=True)
            self._open.remove(file)
            self._unsynced.discard(file)
        del self._segments[n_keep:]

    def _segment(self, segment: int, rows: int) -> NDArray[Any]:
        size = rows * layout.feature_bytes(self._spec)
        numbers = self._segments[segment].view()[:size].view(self._spec.feature_dtype.numpy)
        return numbers.reshape(rows, self._spec.dim)
