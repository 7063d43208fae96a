"""Verify: a collection's files compared with Redis, and made anew where they differ."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from hashlens import convert
from hashlens.cpus import NICENESS_OF_CARE, lower_priority
from hashlens.errors import DeadlineError, LimitError, OverloadedError
from hashlens.types import VerifyResult
from hashlens.v1 import search_service_pb2 as spb
from search_service.calls import Calls, Context
from search_service.storage.collection import Collection
from search_service.storage.verify import Verified

_RETRY_S: Final = 5.0


class Verifier:
    """Checks collections, one at a time, in a thread of a low priority."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="verify",
            initializer=lower_priority,
            initargs=(NICENESS_OF_CARE,),
        )
        self._is_busy = False
        self._stop = threading.Event()

    async def verify(self, collection: Collection, *, repair: bool, ends_s: float) -> VerifyResult:
        """Compare a collection's files with Redis and with their checksums.

        Parameters
        ----------
        collection
            Of this replica.
        repair
            Make the files anew if anything differs, and compare again.
        ends_s
            When to give up, on the clock of `time.monotonic`.

        Raises
        ------
        OverloadedError
            Another check is running.
        DeadlineError
            It was not done in time; everything is as before, or mended.
        LimitError
            The disk is full or broken.
        HashlensError
            See `Collection.verify` and `Collection.rebuild`.
        """
        if self._is_busy:
            raise OverloadedError(
                "Another check is running, and each reads everything. Come back later.",
                retry_after_s=_RETRY_S,
            )
        self._is_busy = True
        self._stop = stop = threading.Event()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._thread, _verified, collection, repair, stop)
        work.add_done_callback(self._rest)
        try:
            async with asyncio.timeout(ends_s - time.monotonic()):
                # Not cancelled with the caller: the thread ends by itself, as soon as it looks up.
                return await asyncio.shield(work)
        except TimeoutError:
            raise DeadlineError(
                f"{collection.spec.name} was not checked in time: allow more."
            ) from None
        finally:
            stop.set()

    def close(self) -> None:
        """End what is running."""
        self._stop.set()
        self._thread.shutdown(wait=False)

    def _rest(self, work: asyncio.Future[VerifyResult]) -> None:
        self._is_busy = False
        if not work.cancelled():
            work.exception()  # Whoever asked may have left.


class VerifyRpc(Calls):
    """Answers `Verify`."""

    _verifier: Verifier

    async def Verify(  # noqa: N802 - the contract's name
        self, request: spb.VerifyRequest, context: Context
    ) -> spb.VerifyResponse:
        """Compare Redis with the files, and say what differs."""
        ends_s = self._ends_s(context)
        collection = await self._collection(request.collection, context)
        result = await self._verifier.verify(collection, repair=request.repair, ends_s=ends_s)
        return convert.verify_to_proto(result)


def _verified(collection: Collection, repair: bool, stop: threading.Event) -> VerifyResult:
    found = collection.verify(stop)
    if not repair or not found.n_differences:
        return _result(found, found, n_repaired=0)
    try:
        collection.rebuild(stop)
    except OSError as error:
        raise LimitError(f"The files cannot be rewritten ({error}). Mend the disk.") from error
    after = collection.verify(stop)
    return _result(found, after, n_repaired=max(found.n_differences - after.n_differences, 0))


def _result(found: Verified, after: Verified, *, n_repaired: int) -> VerifyResult:
    """Return what was found, and what is there now."""
    return VerifyResult(
        version=after.version,
        n_catalog_items=after.n_catalog_items,
        n_array_items=after.n_array_items,
        differences=tuple(found.differences),
        n_differences=found.n_differences,
        n_repaired=n_repaired,
        digest=after.digest,
    )
