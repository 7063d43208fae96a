"""Whether a collection's files are what they claim to be, beyond what a start looks at.

Files are read with ``pread``, so that one that was cut is an error and not a signal.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import CancelledError, DataLossError, HashlensError
from hashlens.types import CollectionSpec
from search_service.storage import layout, manifest
from search_service.storage.differences import Differences
from search_service.storage.frozen import Frozen
from search_service.storage.id_index import StoredIds

_BYTES_AT_ONCE: Final = 1 << 20
_ROWS_AT_ONCE: Final = 1 << 12
_ATTEMPTS: Final = 3


def check_files(directory: Path, differences: Differences, stop: threading.Event) -> None:
    """Compare the manifest with its checksum, and each file with the manifest.

    Features are for `check_features`.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        found = Differences()
        try:
            before = manifest.read(directory)
        except HashlensError as error:
            differences.add(error.message)
            return
        for name, state in sorted(before.files.items()):
            trouble = _file_trouble(directory / name, state, stop)
            if trouble:
                found.add(f"{name}: {trouble}")
        with contextlib.suppress(HashlensError):
            if manifest.read(directory).generation != before.generation and attempt < _ATTEMPTS:
                continue  # Compacted meanwhile: these files are not the ones that count.
        for line in found.lines:
            differences.add(line)
        return


def check_rows(
    frozen: Frozen, spec: CollectionSpec, differences: Differences, stop: threading.Event
) -> None:
    """Check that records, ids, codes, tombstones and the index of ids hold together."""
    n, whole = len(frozen.records), True
    spare_bits = spec.n_bits % 64
    before = np.zeros(1, dtype=layout.ROW)
    for lo in range(0, n, _ROWS_AT_ONCE):
        if stop.is_set():
            raise CancelledError("The check was stopped.")
        rows = np.arange(lo, min(lo + _ROWS_AT_ONCE, n))
        records = np.concatenate([before, frozen.records[rows]])
        before = records[-1:]
        if (records["seq"][1:] <= records["seq"][:-1]).any():
            differences.add(f"rows {lo} to {rows[-1]}: not in the order of their writes")
        if spare_bits and (frozen.words[-1][rows] >> np.uint64(spare_bits)).any():
            differences.add(f"rows {lo} to {rows[-1]}: bits are set behind the end of a code")
        try:
            joined, lengths = frozen.ids_of(rows)
            joined.decode()
            if not lengths.all():
                raise DataLossError("an id is empty")
            begins = np.frombuffer(joined, dtype=np.uint8)[np.cumsum(lengths) - lengths]
            if ((begins & 0xC0) == 0x80).any():
                raise DataLossError("an id ends inside a letter")
            frozen.payloads_of(rows)
            frozen.tags_of(rows)
        except (HashlensError, UnicodeDecodeError) as error:
            whole = False
            differences.add(f"rows {lo} to {rows[-1]}: {error}")
    if whole:
        misled = frozen.table.misled(StoredIds(frozen.ids, frozen.records))
        for row in misled.tolist():
            differences.add(f"row {row}: its id does not lead there")
    _check_deaths(frozen, differences)


def check_features(
    directory: Path,
    frozen: Frozen,
    spec: CollectionSpec,
    differences: Differences,
    stop: threading.Event,
) -> None:
    """Compare each row's feature, as it is in the file, with its checksum."""
    if not spec.dim:
        return
    width = layout.feature_bytes(spec)
    step = max(_BYTES_AT_ONCE // width, 1)
    dead = frozen.dead_at(frozen.seq)
    for first in range(0, len(frozen.records), frozen.rows_per_segment):
        segment = first // frozen.rows_per_segment
        name = layout.features_file(frozen.generation, segment, spec.feature_dtype)
        last = min(first + frozen.rows_per_segment, len(frozen.records))
        try:
            descriptor = os.open(directory / name, os.O_RDONLY)
        except OSError as error:
            differences.add(f"{name}: {error.strerror}")
            continue
        try:
            for lo in range(first, last, step):
                if stop.is_set():
                    raise CancelledError("The check was stopped.")
                rows = np.arange(lo, min(lo + step, last))
                data = _read(descriptor, len(rows) * width, (lo - first) * width)
                _check_some_features(frozen, rows, data, width, dead, differences)
        finally:
            os.close(descriptor)


def _check_some_features(
    frozen: Frozen,
    rows: NDArray[np.int64],
    data: bytes,
    width: int,
    dead: NDArray[np.bool_],
    differences: Differences,
) -> None:
    records = frozen.records[rows]
    expected, flags = records["feature_crc32"].tolist(), records["flags"].tolist()
    for i, row in enumerate(rows.tolist()):
        feature = data[i * width : (i + 1) * width]
        missing = flags[i] & layout.NO_FEATURE and not dead[row]
        if len(feature) == width and zlib.crc32(feature) == expected[i] and not missing:
            continue
        line = "its feature is missing" if missing else "its feature does not match its checksum"
        item_id = frozen.ids_of(rows[i : i + 1])[0]
        if dead[row]:
            differences.add(f"row {row}, which is dead: {line}")
        else:
            differences.about(item_id, line)


def _check_deaths(frozen: Frozen, differences: Differences) -> None:
    rows, seqs = frozen.deaths["row"], frozen.deaths["seq"]
    known = rows < len(frozen.records)
    if not known.all():
        differences.add(f"{int((~known).sum())} tombstones have no row")
        rows, seqs = rows[known], seqs[known]
    if len(np.unique(rows)) != len(rows):
        differences.add("a row has died twice")
    if (frozen.records["seq"][rows] >= seqs).any() or (seqs[1:] < seqs[:-1]).any():
        differences.add("tombstones are not in the order of their writes")


def _file_trouble(path: Path, state: manifest.FileState, stop: threading.Event) -> str:
    """Return what is wrong with a file, or nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return error.strerror or "cannot be opened"
    try:
        size = os.fstat(descriptor).st_size
        if size < state.length:
            return f"has {size} bytes, not {state.length}"
        if state.crc32 is None:
            return ""
        crc32 = 0
        for offset in range(0, state.length, _BYTES_AT_ONCE):
            if stop.is_set():
                raise CancelledError("The check was stopped.")
            count = min(_BYTES_AT_ONCE, state.length - offset)
            crc32 = zlib.crc32(_read(descriptor, count, offset), crc32)
        return "" if crc32 == state.crc32 else "does not match its checksum"
    finally:
        os.close(descriptor)


def _read(descriptor: int, count: int, offset: int) -> bytes:
    """Read bytes; what a broken disk does not give is missing at the end."""
    try:
        return os.pread(descriptor, count, offset)
    except OSError:
        return b""
