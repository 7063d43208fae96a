"""Append-only files and their mappings.

A file is written with ``pwrite`` and read through a read-only mapping, never written through one:
a full disk is then an error of a call and not a signal. Room is allocated ahead of the data, so a
mapping never reaches beyond what the disk has given. An old mapping stays valid for as long as an
array refers to it, whatever becomes of the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import DataLossError
from search_service.storage.manifest import FileState

_MIN_STEP_BYTES: Final = 1 << 16
_MAX_STEP_BYTES: Final = 1 << 26
_CHECK_BYTES: Final = 1 << 24

Mappings: TypeAlias = weakref.WeakSet[mmap.mmap]


class AppendFile:
    """One append-only file.

    Appended bytes count from `commit` on; until then `rollback` forgets them, so a write that
    failed half way can be tried again.

    Parameters
    ----------
    path
        Where it is. It is made if `state` is None.
    state
        How much of an existing file counts; what is beyond is cut off.
    checksummed
        Whether a running CRC-32 is kept, and the existing bytes are checked against it.
    limit_bytes
        How long it will ever be, if that is known.
    random_access
        Whether it is read here and there, so that the system need not read around a missing page:
        that can be megabytes for a row of kilobytes.

    Raises
    ------
    DataLossError
        The file is missing, too short, or does not match its checksum.
    OSError
        The disk is full or broken.
    """

    def __init__(
        self,
        path: Path,
        state: FileState | None = None,
        *,
        checksummed: bool = True,
        limit_bytes: int | None = None,
        random_access: bool = False,
    ) -> None:
        self.path = path
        self.length = 0
        """Committed bytes."""
        self.crc32 = 0
        self._checksummed = checksummed
        self._limit_bytes = limit_bytes
        self._random_access = random_access
        self._staged = (0, 0)
        self._reserved = 0
        self._view: NDArray[np.uint8] | None = None
        self.mappings: Mappings = weakref.WeakSet()
        """All that are in use still."""
        self._inode = 0
        if state is None:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._inode = os.fstat(self._fd).st_ino
        else:
            try:
                self._fd = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                raise DataLossError(f"{path} is missing") from None
            try:
                self._inode = os.fstat(self._fd).st_ino
                self._adopt(state)
            except BaseException:
                self.close()
                raise

    @property
    def state(self) -> FileState:
        """How much counts now."""
        return FileState(self.length, self.crc32 if self._checksummed else None)

    @property
    def is_full(self) -> bool:
        """Whether it will not grow any more."""
        return self.length == self._limit_bytes

    def append(self, data: bytes | memoryview) -> None:
        """Write after all that was appended before; counts from `commit` on."""
        length, crc32 = self._staged
        view = memoryview(data).cast("B")
        end = length + len(view)
        if end > self._reserved:
            self._reserve(end)
        position = length
        while position < end:
            position += os.pwrite(self._fd, view[position - length :], position)
        self._staged = (end, zlib.crc32(view, crc32) if self._checksummed else 0)

    def commit(self) -> None:
        """Let the appended bytes count."""
        self.length, self.crc32 = self._staged

    def rollback(self) -> None:
        """Forget what was appended since the last `commit`."""
        self._staged = (self.length, self.crc32)

    def view(self) -> NDArray[np.uint8]:
        """Map all allocated bytes, read-only: uint8, at least `length` long."""
        if self._view is None:
            if self._reserved == 0:
                self._reserve(1)
            size = os.fstat(self._fd).st_size
            if size < self._reserved:
                raise DataLossError(f"{self.path} has {size} bytes, not {self._reserved}")
            mapping = mmap.mmap(self._fd, self._reserved, access=mmap.ACCESS_READ)
            if self._random_access and hasattr(mmap, "MADV_RANDOM"):
                mapping.madvise(mmap.MADV_RANDOM)
            self.mappings.add(mapping)
            self._view = np.frombuffer(mapping, dtype=np.uint8)
        return self._view

    def trouble(self) -> str:
        """Say what somebody else has done to the file under its name, if anything."""
        try:
            found = self.path.stat()
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        if found.st_ino != self._inode:
            return f"{self.path} is another file now"
        if found.st_size < self._reserved:
            return f"{self.path} has {found.st_size} bytes, not {self._reserved}"
        return ""

    def sync(self) -> None:
        """Make the bytes durable."""
        if self._fd >= 0:
            (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(self._fd)

    def close(self) -> None:
        """Give the descriptor back; mappings that are in use stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _adopt(self, state: FileState) -> None:
        """Check an existing file against its state and cut off the rest."""
        size = os.fstat(self._fd).st_size
        if size < state.length:
            raise DataLossError(f"{self.path} has {size} bytes, not {state.length}")
        if self._checksummed:
            crc32 = 0
            for block in self._blocks(state.length):
                crc32 = zlib.crc32(block, crc32)
            if crc32 != state.crc32:
                raise DataLossError(f"{self.path} does not match its checksum")
            self.crc32 = crc32
        os.ftruncate(self._fd, state.length)
        self.length = self._reserved = state.length
        self.rollback()

    def _blocks(self, length: int) -> Iterator[bytes]:
        for offset in range(0, length, _CHECK_BYTES):
            yield os.pread(self._fd, min(_CHECK_BYTES, length - offset), offset)

    def _reserve(self, end: int) -> None:
        """Allocate room for `end` bytes, and for more while there is plenty."""
        step = min(max(self._reserved, _MIN_STEP_BYTES), _MAX_STEP_BYTES)
        wanted = _whole_pages(max(end, self._reserved + step))
        if self._limit_bytes is not None:
            wanted = max(end, min(wanted, self._limit_bytes))
        try:
            self._allocate(wanted)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or wanted == end:
                raise
            self._allocate(end)

    def _allocate(self, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, self._reserved, size - self._reserved)
        else:
            for offset in range(self._reserved, size, _CHECK_BYTES):
                os.pwrite(self._fd, bytes(min(_CHECK_BYTES, size - offset)), offset)
        self._reserved = size
        self._view = None


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
