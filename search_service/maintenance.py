"""Compact: what was replaced and deleted is erased, and a receipt says how far that came."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from hashlens import convert
from hashlens.errors import OverloadedError
from hashlens.types import CompactResult
from hashlens.v1 import search_service_pb2 as spb
from search_service.calls import Calls, Context
from search_service.storage.store import Store

_MAX_CALLS: Final = 8
"""Calls that wait for an erasure at a time; they share the work."""
_RETRY_S: Final = 5.0


class Erasures:
    """Waits for erasures in threads of their own: that may take minutes."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="erase")
        self._n_calls = 0

    async def erase(
        self, store: Store, name: str, *, wait_for_replicas: bool, ends_s: float
    ) -> CompactResult:
        """Compact a collection; raises as `Store.compact`, and OverloadedError."""
        if self._n_calls >= _MAX_CALLS:
            raise OverloadedError("Too many wait for a compaction.", retry_after_s=_RETRY_S)
        self._n_calls += 1
        work = asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: store.compact(
                name,
                wait_for_replicas=wait_for_replicas,
                deadline_s=ends_s - time.monotonic(),
            ),
        )
        work.add_done_callback(self._rest)
        return await asyncio.shield(work)

    def close(self) -> None:
        """Take no more; what is running ends with the store."""
        self._threads.shutdown(wait=False)

    def _rest(self, work: asyncio.Future[CompactResult]) -> None:
        self._n_calls -= 1
        if not work.cancelled():
            work.exception()  # Whoever asked may have left.


class CompactRpc(Calls):
    """Answers `Compact`."""

    _erasures: Erasures

    async def Compact(  # noqa: N802 - the contract's name
        self, request: spb.CompactRequest, context: Context
    ) -> spb.CompactResponse:
        """Erase what was replaced and deleted."""
        ends_s = self._ends_s(context)
        name = convert.check_collection_name(request.collection)
        result = await self._erasures.erase(
            self._store, name, wait_for_replicas=request.wait_for_replicas, ends_s=ends_s
        )
        return convert.compact_to_proto(result)
