"""What every RPC of the service needs: its deadline, its collection, a version of that."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from hashlens import convert
from hashlens.errors import DataLossError, DeadlineError, UnavailableError
from hashlens.rpc.deadline import deadline_s
from hashlens.types import TagFilter
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from search_service import filtered
from search_service.config import SearchConfig
from search_service.snapshot import Snapshot
from search_service.storage import Store
from search_service.storage.collection import Collection

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class Calls(spb_grpc.SearchServiceServicer):
    """Base of those that answer RPCs; `SearchServicer` sets what is declared here."""

    _config: SearchConfig
    _store: Store
    _threads: ThreadPoolExecutor
    """For what may wait for Redis."""

    def _ends_s(self, context: Context) -> float:
        """Return when a call must be answered, on the clock of `time.monotonic`."""
        return time.monotonic() + deadline_s(context, self._config)

    async def _in_store(self, call: Callable[[float], T], ends_s: float) -> T:
        """Run what may wait for Redis in a thread; `call` gets the seconds that are left then."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ends_s - time.monotonic()):
                return await loop.run_in_executor(
                    # With the context, so that what is logged there names the call.
                    self._threads,
                    contextvars.copy_context().run,
                    lambda: call(ends_s - time.monotonic()),
                )
        except TimeoutError:
            raise UnavailableError(
                "Redis has not answered in time. Repeat the call, a write with its request id."
            ) from None

    async def _collection(
        self, name: str, context: Context, *, field: str = "collection"
    ) -> Collection:
        convert.check_collection_name(name, field=field)
        found = self._store.find(name)
        if found is not None:
            return found
        return await self._in_store(
            lambda left_s: self._store.get(name, deadline_s=left_s), self._ends_s(context)
        )

    async def _reached(
        self,
        collection: Collection,
        min_version: int,
        ends_s: float,
        wanted: TagFilter | None = None,
    ) -> Snapshot:
        """Return a snapshot at least as new as asked for, through a filter."""
        pause_s = 0.0005
        while (snapshot := collection.newest.snapshot()).version < min_version:
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                detail = collection.newest.info().detail
                raise DeadlineError(
                    f"version {min_version} has not come in time: this replica has "
                    f"{snapshot.version}. {detail or 'Ask again, or another replica.'}"
                )
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 0.02)
        collection = collection.newest
        if snapshot.rows == 0 and collection.needs_files:
            raise UnavailableError(collection.info().detail)
        if snapshot.rows == 0 and collection.is_lost:
            raise DataLossError(collection.info().detail)
        return await filtered.reached(snapshot, wanted, ends_s)
