"""ReplicaService: files for other replicas to copy."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from hashlens import convert
from hashlens.errors import InvalidInputError, OverloadedError, UnavailableError
from hashlens.v1 import replica_service_pb2 as rpb
from hashlens.v1 import replica_service_pb2_grpc as rpb_grpc
from search_service.storage.leases import PART_BYTES, Lease
from search_service.storage.store import Store

_Context = grpc.aio.ServicerContext[Any, Any]

_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """How much serving copies may take from searching."""

    max_copies: int
    """Most files that are sent at a time; each holds two parts in memory."""
    bytes_per_s: float
    """Most bytes per second, of all copies together; 0 for no limit."""


class ReplicaServicer(rpb_grpc.ReplicaServiceServicer):
    """Answers other replicas.

    Parameters
    ----------
    limits
        See `ServingLimits`.
    """

    def __init__(self, limits: ServingLimits) -> None:
        self._limits = limits
        self._store: Store | None = None
        self._threads = ThreadPoolExecutor(limits.max_copies, thread_name_prefix="copy")
        self._n_copies = 0
        self._due_s = 0.0

    def serve(self, store: Store) -> None:
        """Begin to answer, from a store that is open."""
        self._store = store

    async def close(self) -> None:
        """End the threads."""
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    async def ListFiles(  # noqa: N802 - the contract's name
        self, request: rpb.ListFilesRequest, context: _Context
    ) -> rpb.ListFilesResponse:
        """Lend files."""
        name = convert.check_collection_name(request.collection)
        store = self._opened()

        def lend() -> rpb.ListFilesResponse:
            lease = store.lend(name, request.epoch, request.min_version)
            return rpb.ListFilesResponse(manifest=lease.manifest_bytes(), lease=lease.token)

        return await asyncio.to_thread(lend)

    async def ReadFile(  # noqa: N802 - the contract's name
        self, request: rpb.ReadFileRequest, context: _Context
    ) -> AsyncIterator[rpb.ReadFileResponse]:
        """Send a file from an offset on, part by part, as fast as it is taken."""
        lease = self._opened().lease(request.lease)
        length = lease.length(request.name)
        if request.offset > length:
            raise InvalidInputError(f"The file has {length} bytes.", field="offset")
        if self._n_copies >= self._limits.max_copies:
            raise OverloadedError(
                f"{self._n_copies} files are being copied from here already",
                retry_after_s=_RETRY_S,
            )
        self._n_copies += 1
        try:
            loop, offset = asyncio.get_running_loop(), request.offset
            while offset < length:
                part = await loop.run_in_executor(self._threads, _part, lease, request.name, offset)
                await self._wait_for(len(part.data))
                yield part
                offset += len(part.data)
        finally:
            self._n_copies -= 1

    def _opened(self) -> Store:
        if self._store is None:
            raise UnavailableError("The store is not open yet.")
        return self._store

    async def _wait_for(self, n_bytes: int) -> None:
        """Wait until so many bytes may go."""
        if self._limits.bytes_per_s:
            now_s = time.monotonic()
            self._due_s = max(self._due_s, now_s)
            wait_s = self._due_s - now_s
            self._due_s += n_bytes / self._limits.bytes_per_s
            await asyncio.sleep(wait_s)


def _part(lease: Lease, name: str, offset: int) -> rpb.ReadFileResponse:
    data = lease.read(name, offset)
    assert len(data) <= PART_BYTES
    return rpb.ReadFileResponse(data=data, crc32=zlib.crc32(data))
