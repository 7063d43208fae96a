"""A collection's files copied from a peer: resumed where they stopped, checked before they count.

Files are append-only, so what a cut-off copy has of a file is a prefix of what any later manifest
of that file describes. Replicas that did not compact have the same files, byte for byte, so a copy
may even go on from another peer. Where that is not so, a checksum at the end says it: a file that
does not match is thrown away and fetched again.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from hashlens.errors import (
    CancelledError,
    DataLossError,
    DeadlineError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from search_service.storage import layout, manifest
from search_service.storage.failpoints import reach
from search_service.storage.keys import Meta
from search_service.storage.manifest import FileState, Manifest
from search_service.storage.peers import Peers

logger = logging.getLogger(__name__)

_CHECK_BYTES: Final = 1 << 20
_MAX_STALLS: Final = 5
"""So often a file may bring nothing before its peer is given up."""
_STALL_S: Final = 0.5


class Copy:
    """One collection's files on their way into a directory of their own.

    Parameters
    ----------
    draft
        Where they go; what an earlier attempt left there is gone on with.
    meta
        Of the collection.
    peers
        Where they come from.
    stop
        Set it to end this early.
    """

    def __init__(self, draft: Path, meta: Meta, peers: Peers, stop: threading.Event) -> None:
        self._draft = draft
        self._meta = meta
        self._peers = peers
        self._stop = stop
        self.copied_bytes = 0
        """Of `total_bytes`, those that are here."""
        self.total_bytes = 0

    def leftover(self) -> Manifest | None:
        """Return the manifest of an earlier attempt if it has all the bytes, checked or not."""
        try:
            found = manifest.read(self._draft)
            self._check_manifest(found)
            sizes = {name: (self._draft / name).stat().st_size for name in found.files}
        except (DataLossError, PreconditionError, OSError):
            return None
        whole = all(sizes[name] == state.length for name, state in found.files.items())
        return found if whole else None

    def fetch(
        self, address: str, min_version: int, prepare: Callable[[Manifest], None]
    ) -> Manifest:
        """Copy all that is not here yet from a peer, and check it.

        Parameters
        ----------
        address
            Of the peer.
        min_version
            How new the files must be at least.
        prepare
            Called with the manifest before the first byte is copied; what it raises ends the copy.

        Raises
        ------
        DataLossError
            What came does not match its checksums; those files are not kept.
        CancelledError
            `stop` was set.
        HashlensError
            What the peer says, see `Peers`.
        OSError
            The disk is full or broken. What is here stays for the next attempt.
        """
        name, epoch = self._meta.spec.name, self._meta.epoch
        listing = self._peers.list_files(address, name, epoch, min_version)
        received = manifest.parse(listing.manifest, Path(f"the manifest from {address}"))
        self._check_manifest(received)
        if received.seq < min_version:
            raise UnavailableError(f"{address} has only version {received.seq}.")
        prepare(received)
        self._begin(listing.manifest, received)
        reach("copy.begin")
        for file, state in received.files.items():
            self._fetch_file(address, listing.lease, file, state)
        manifest.sync_directory(self._draft)
        self.verify(received)
        return received

    def verify(self, received: Manifest) -> None:
        """Compare every file with the manifest, and every feature with its row.

        Raises
        ------
        DataLossError
            Some do not match; they are deleted, so that they are fetched again.
        """
        reach("copy.verify")
        bad = [name for name, state in received.files.items() if not self._is_whole(name, state)]
        if layout.rows_file(received.generation) not in bad:
            bad += self._bad_features(received)
        for name in bad:
            (self._draft / name).unlink(missing_ok=True)
        if bad:
            raise DataLossError(f"{', '.join(sorted(set(bad)))} did not match the checksums")

    def _check_manifest(self, received: Manifest) -> None:
        meta = self._meta
        if (received.spec, received.epoch, received.n_buckets) != (
            meta.spec,
            meta.epoch,
            meta.n_buckets,
        ):
            raise PreconditionError("That is a manifest of another collection.")
        for name in received.files:
            if not layout.is_safe_file(name):
                raise DataLossError("The manifest lists a file that cannot be one.")

    def _begin(self, raw: bytes, received: Manifest) -> None:
        """Make the directory, or keep of it what may still be of use."""
        try:
            before = manifest.read(self._draft)
            is_same = (before.epoch, before.generation, before.rows_per_segment) == (
                received.epoch,
                received.generation,
                received.rows_per_segment,
            )
        except (DataLossError, PreconditionError):
            is_same = False
        if not is_same and self._draft.exists():
            shutil.rmtree(self._draft)
        self._draft.mkdir(exist_ok=True)
        for path in self._draft.iterdir():
            if path.name not in received.files and path.name != manifest.MANIFEST:
                path.unlink()
        manifest.replace_file(self._draft / manifest.MANIFEST, raw)
        self.total_bytes = sum(state.length for state in received.files.values())
        self.copied_bytes = 0

    def _fetch_file(self, address: str, lease: str, name: str, state: FileState) -> None:
        descriptor = os.open(self._draft / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Longer than that was of a newer manifest; the prefix is the same.
            size = min(os.fstat(descriptor).st_size, state.length)
            os.ftruncate(descriptor, size)
            self.copied_bytes += size
            stalls = 0
            while size < state.length:
                before, why = size, "nothing came"
                try:
                    for data in self._peers.read_file(address, lease, name, size):
                        if self._stop.is_set():
                            raise CancelledError("The copy was stopped.")
                        if not data or size + len(data) > state.length:
                            raise DataLossError(f"{address} sent more of {name} than there is")
                        _write(descriptor, data, size)
                        size += len(data)
                        self.copied_bytes += len(data)
                        reach("copy.part")
                except (UnavailableError, DeadlineError, OverloadedError) as error:
                    why = error.message
                    if isinstance(error, OverloadedError):
                        self._pause(error.retry_after_s)
                if size == before:
                    stalls += 1
                    if stalls > _MAX_STALLS:
                        raise UnavailableError(f"{address} does not send {name}: {why}")
                    self._pause(_STALL_S)
                else:
                    stalls = 0
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _pause(self, pause_s: float) -> None:
        if self._stop.wait(pause_s):
            raise CancelledError("The copy was stopped.")

    def _is_whole(self, name: str, state: FileState) -> bool:
        with (self._draft / name).open("rb") as file:
            size, crc32 = 0, 0
            while data := file.read(_CHECK_BYTES):
                self._pause(0)
                size += len(data)
                crc32 = zlib.crc32(data, crc32)
        return size == state.length and state.crc32 in (None, crc32)

    def _bad_features(self, received: Manifest) -> list[str]:
        """Return the segments with a feature that does not match its row's checksum."""
        width = layout.feature_bytes(received.spec)
        if not width:
            return []
        step = max(_CHECK_BYTES // width, 1)
        bad = []
        with (self._draft / layout.rows_file(received.generation)).open("rb") as records:
            for first in range(0, received.rows, received.rows_per_segment):
                last = min(first + received.rows_per_segment, received.rows)
                segment = first // received.rows_per_segment
                name = layout.features_file(
                    received.generation, segment, received.spec.feature_dtype
                )
                records.seek(first * layout.ROW.itemsize)
                with (self._draft / name).open("rb") as features:
                    for lo in range(first, last, step):
                        self._pause(0)
                        count = min(step, last - lo)
                        rows = np.frombuffer(records.read(count * layout.ROW.itemsize), layout.ROW)
                        data = features.read(count * width)
                        found = [
                            zlib.crc32(data[i : i + width]) for i in range(0, len(data), width)
                        ]
                        if found != rows["feature_crc32"].tolist():
                            bad.append(name)
                            break
        return bad


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
