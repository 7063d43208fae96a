"""Files of a backup: copied or linked, and checked."""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import DataLossError
from search_service.storage import layout
from search_service.storage.manifest import Manifest

BLOCK_BYTES: Final = 1 << 20
"""How much is read at once."""

_CANNOT_LINK: Final = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}
)


class Pace:
    """Keeps reading below a rate, so that who searches keeps the disk, and says how far it is.

    Parameters
    ----------
    bytes_per_s
        The most, on average; 0: no limit.
    report
        Called with a line now and then.
    report_every_s
        How often, in seconds.
    """

    def __init__(
        self, bytes_per_s: float, report: Callable[[str], None], *, report_every_s: float = 10.0
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._report = report
        self._report_every_s = report_every_s
        self._due_s = self._reported_s = time.monotonic()
        self._n_bytes = 0

    def spend(self, n_bytes: int) -> None:
        """Wait as long as reading so many bytes is to take."""
        now_s = time.monotonic()
        self._n_bytes += n_bytes
        if now_s - self._reported_s >= self._report_every_s:
            self._reported_s = now_s
            self._report(f"{self._n_bytes / 1e6:,.0f} MB read so far")
        if self._bytes_per_s > 0:
            self._due_s = max(self._due_s, now_s) + n_bytes / self._bytes_per_s
            time.sleep(max(self._due_s - now_s, 0))


def open_source(name: str, directory_fd: int | None, path: Path) -> int:
    """Open a plain file for reading; `path` is for the messages.

    Raises
    ------
    FileNotFoundError
        It is gone.
    DataLossError
        It is no plain file.
    """
    descriptor = os.open(
        name if directory_fd is not None else path,
        os.O_RDONLY | os.O_NOFOLLOW,
        dir_fd=directory_fd,
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataLossError(f"{path} is no file")
    return descriptor


def blocks(descriptor: int, length: int, path: Path, pace: Pace) -> Iterator[bytes]:
    """Read the first `length` bytes of a file, block by block.

    Raises
    ------
    DataLossError
        It has not so many.
    """
    at = 0
    while at < length:
        block = os.pread(descriptor, min(BLOCK_BYTES, length - at), at)
        if not block:
            raise DataLossError(f"{path} has {at} bytes, not {length}")
        pace.spend(len(block))
        at += len(block)
        yield block


def crc32_of(path: Path, length: int, pace: Pace) -> int:
    """Return the CRC-32 of a file that must be `length` bytes long.

    Raises
    ------
    DataLossError
        It is missing, or longer or shorter.
    """
    try:
        descriptor = open_source(path.name, None, path)
    except FileNotFoundError:
        raise DataLossError(f"{path} is missing") from None
    try:
        size = os.fstat(descriptor).st_size
        if size != length:
            raise DataLossError(f"{path} has {size} bytes, not {length}")
        crc32 = 0
        for block in blocks(descriptor, length, path, pace):
            crc32 = zlib.crc32(block, crc32)
        return crc32
    finally:
        os.close(descriptor)


def copy(
    name: str, directory_fd: int | None, source: Path, length: int, target: Path, pace: Pace
) -> int:
    """Copy the first `length` bytes of a file; return their CRC-32. Durable when it returns.

    Raises
    ------
    FileNotFoundError
        The source is gone.
    DataLossError
        It is too short.
    OSError
        The disk is full or broken, or `target` is there already.
    """
    crc32 = 0
    descriptor = open_source(name, directory_fd, source)
    try:
        with open(target, "xb", opener=_private) as file:
            for block in blocks(descriptor, length, source, pace):
                file.write(block)
                crc32 = zlib.crc32(block, crc32)
            file.flush()
            os.fsync(file.fileno())
    finally:
        os.close(descriptor)
    return crc32


def link(name: str, directory_fd: int, target: Path) -> bool:
    """Give a file a second name; False where the file systems do not allow that.

    Raises
    ------
    FileNotFoundError
        It is gone.
    """
    try:
        os.link(name, target, src_dir_fd=directory_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    return True


def check_features(directory: Path, manifest: Manifest, pace: Pace) -> None:
    """Compare each row's feature with its CRC-32.

    Raises
    ------
    DataLossError
        One does not match, or a file is missing or not as long as its rows.
    """
    row_bytes = layout.feature_bytes(manifest.spec)
    if not row_bytes:
        return
    rows = map_file(directory / layout.rows_file(manifest.generation), layout.ROW, manifest.rows)
    per_block = max(BLOCK_BYTES // row_bytes, 1)
    for first in range(0, manifest.rows, manifest.rows_per_segment):
        segment = first // manifest.rows_per_segment
        n = min(manifest.rows - first, manifest.rows_per_segment)
        dtype = manifest.spec.feature_dtype
        path = directory / layout.features_file(manifest.generation, segment, dtype)
        data = map_file(path, np.uint8, n * row_bytes).data
        for at in range(0, n, per_block):
            stop = min(at + per_block, n)
            pace.spend((stop - at) * row_bytes)
            expected = rows["feature_crc32"][first + at : first + stop].tolist()
            for row, crc32 in enumerate(expected, at):
                if zlib.crc32(data[row * row_bytes : (row + 1) * row_bytes]) != crc32:
                    raise DataLossError(f"the feature of row {first + row} in {path} is damaged")


def map_file(path: Path, dtype: np.dtype[np.void] | type[np.generic], n: int) -> NDArray[np.void]:
    """Map a file that must hold exactly `n` elements, read-only: shape ``[n]``.

    Raises
    ------
    DataLossError
        It is missing, or longer or shorter.
    """
    length = n * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataLossError(f"{path} is missing") from None
    if size != length:
        raise DataLossError(f"{path} has {size} bytes, not {length}")
    if not length:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r", shape=(n,)).view(np.ndarray)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
