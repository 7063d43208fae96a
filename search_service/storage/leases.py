"""Files of this replica that others are copying: kept for them whatever becomes of the collection.

A lease is a directory of hard links beside the collections. It costs no room until a compaction
would have freed some; so leases end by themselves.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hashlens.errors import DataLossError, NotFoundError, OverloadedError
from search_service.storage.local import LocalCollection
from search_service.storage.manifest import MANIFEST, Manifest

PART_BYTES: Final = 1 << 20
"""Most bytes of one read."""

_MAX_LEASES: Final = 16
_RETRY_S: Final = 5.0


@dataclass(slots=True)
class Lease:
    """A consistent set of files that is kept."""

    token: str
    """Names it."""
    directory: Path
    manifest: Manifest
    used_s: float = field(default_factory=time.monotonic)
    """When it was last read from, on the clock of `time.monotonic`."""

    def manifest_bytes(self) -> bytes:
        """Return the manifest as it is in its file."""
        return (self.directory / MANIFEST).read_bytes()

    def length(self, name: str) -> int:
        """Return how many bytes of a file count.

        Raises
        ------
        NotFoundError
            The manifest lists no such file.
        """
        state = self.manifest.files.get(name)
        if state is None:
            raise NotFoundError("The manifest lists no file of that name.")
        return state.length

    def read(self, name: str, offset: int) -> bytes:
        """Return the next bytes of a file, at most `PART_BYTES`; none at its end.

        Raises
        ------
        NotFoundError
            The lease has ended, or the manifest lists no such file.
        DataLossError
            The file is shorter than the manifest says.
        """
        count = min(self.length(name) - offset, PART_BYTES)
        if count <= 0:
            return b""
        self.used_s = time.monotonic()
        try:
            descriptor = os.open(self.directory / name, os.O_RDONLY)
        except FileNotFoundError:
            raise _ended() from None
        try:
            data = os.pread(descriptor, count, offset)
        finally:
            os.close(descriptor)
        if not data:
            raise DataLossError(f"{name} of {self.manifest.spec.name} is shorter than it was.")
        return data


class Leases:
    """All leases of one store. Thread-safe.

    Parameters
    ----------
    directory
        Where collections are; leases get directories beside them, deleted at the next start.
    keep_s
        How long one is kept after it was last read from, in seconds.
    """

    def __init__(self, directory: Path, keep_s: float) -> None:
        self._directory = directory
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}

    def grant(self, local: LocalCollection) -> Lease:
        """Lend the files of a collection's last checkpoint.

        Raises
        ------
        OverloadedError
            There are too many leases.
        OSError, HashlensError
            See `LocalCollection.lend`.
        """
        self.expire()
        if len(self._leases) >= _MAX_LEASES:
            raise OverloadedError("Too many are copying files.", retry_after_s=_RETRY_S)
        token = uuid.uuid4().hex
        directory = self._directory / f".lease-{token}"
        lease = Lease(token, directory, local.lend(directory))
        with self._lock:
            self._leases[token] = lease
        return lease

    def find(self, token: str) -> Lease:
        """Return a lease; NotFoundError if there is none, or not any more."""
        lease = self._leases.get(token)
        if lease is None:
            raise _ended()
        return lease

    def holds(self, name: str) -> bool:
        """Tell whether files of a collection are lent."""
        return any(lease.manifest.spec.name == name for lease in list(self._leases.values()))

    def expire(self) -> None:
        """End those that nobody has read from for a while."""
        until_s = time.monotonic() - self._keep_s
        self._end(lambda lease: lease.used_s < until_s)

    def revoke(self, name: str) -> None:
        """End those of a collection: who copies its files has to begin anew."""
        self._end(lambda lease: lease.manifest.spec.name == name)

    def close(self) -> None:
        """End all."""
        self._end(lambda _: True)

    def _end(self, is_over: Callable[[Lease], bool]) -> None:
        with self._lock:
            ended = [lease for lease in self._leases.values() if is_over(lease)]
            for lease in ended:
                del self._leases[lease.token]
        for lease in ended:
            shutil.rmtree(lease.directory, ignore_errors=True)


def _ended() -> NotFoundError:
    return NotFoundError("That lease has ended. Ask for the list of files again.")
