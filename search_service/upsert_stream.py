"""UpsertStream: items as they come, gathered into writes, each answered by itself in their order.

One write of a stream is under way at a time; what comes meanwhile is the next one. So an item that
comes alone is written at once, many share a write, and of two with one id the later stays.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hashlens.errors import DeadlineError, HashlensError, InvalidInputError, OverloadedError
from hashlens.rpc.item_stream import ItemStream, StreamLimits
from hashlens.rpc.status import status_of
from hashlens.types import Embedding, Encoded, Item
from hashlens.v1 import search_service_pb2 as spb
from search_service import checks
from search_service.calls import Context
from search_service.config import SearchConfig
from search_service.images import ImageEncoder
from search_service.storage.collection import Collection
from search_service.storage.records import Record
from search_service.writes import record_of

logger = logging.getLogger(__name__)

_WRITE_BYTES = 8 * 2**20
"""About the most bytes of features and payloads of one write."""

_IMAGES = 64
"""Images that are sent to the encoder together."""

_ENCODERS = 2
"""Such calls at a time: the encoder works on one while the other is on its way."""

_PAUSE_S = (0.01, 0.5)
"""Soonest and latest that images are offered again to an encoder that was full."""

_Answer = asyncio.Future[spb.UpsertStreamResponse]


@dataclass(slots=True, eq=False)
class _Entry:
    """One item between its arrival and its answer."""

    item: Item
    tag: int
    ends_s: float
    answer: _Answer
    embedding: Embedding | None
    encoded: asyncio.Event | None = None
    """For an image: set when it has an embedding or an answer, or is not wanted any more."""

    @property
    def is_ready(self) -> bool:
        return self.embedding is not None or self.answer.done()


class UpsertStream:
    """Answers one call.

    Parameters
    ----------
    find
        Finds a collection by its name.
    images
        The encoder.
    threads
        For what may wait for Redis.
    config
        The server's.
    """

    def __init__(
        self,
        find: Callable[[str], Awaitable[Collection]],
        images: ImageEncoder,
        threads: ThreadPoolExecutor,
        config: SearchConfig,
    ) -> None:
        self._find = find
        self._images = images
        self._threads = threads
        self._config = config
        self._collection: Collection
        self._entries: deque[_Entry] = deque()
        """Those that have not been written, in their order."""
        self._pictures: deque[_Entry] = deque()
        """Those of them that the encoder has not been asked for."""
        self._writer: asyncio.Task[None] | None = None
        self._encoders: set[asyncio.Task[None]] = set()

    def answers(
        self,
        requests: AsyncIterator[spb.UpsertStreamRequest],
        context: Context,
        stopping: asyncio.Event,
    ) -> AsyncIterator[spb.UpsertStreamResponse]:
        """Yield an answer for each item, in their order; raises as `ItemStream.answers`.

        NotFoundError as well, and what else the name of a collection may meet.
        """
        limits = StreamLimits(
            window=self._config.max_stream_window,
            window_bytes=self._config.max_stream_bytes,
            idle_s=self._config.stream_idle_s,
        )
        stream = ItemStream(self._begin, context, self._config, limits, stopping)
        context.add_done_callback(self._over)  # type: ignore[arg-type]  # See the stubs' class.
        return stream.answers(self._of_one_collection(requests))

    async def _of_one_collection(
        self, requests: AsyncIterator[spb.UpsertStreamRequest]
    ) -> AsyncIterator[spb.UpsertStreamRequest]:
        is_first = True
        async for request in requests:
            if is_first:
                self._collection = await self._find(request.collection)
                is_first = False
            yield request
            del request

    def _begin(self, request: spb.UpsertStreamRequest, ends_s: float) -> _Answer:
        """Check an item and put it where the writer finds it."""
        answer: _Answer = asyncio.get_running_loop().create_future()
        try:
            item = checks.item_of(request.item, self._collection.spec, field="item")
        except HashlensError as error:
            answer.set_result(_failed(request.tag, error))
            return answer
        entry = _Entry(item, request.tag, ends_s, answer, item.embedding)
        self._entries.append(entry)
        if item.embedding is None:
            event = entry.encoded = asyncio.Event()
            answer.add_done_callback(lambda _: event.set())
            self._pictures.append(entry)
            if len(self._encoders) < _ENCODERS:
                encoder = asyncio.create_task(self._encode_all())
                self._encoders.add(encoder)
                encoder.add_done_callback(self._encoders.discard)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        return answer

    def _over(self, context: Context) -> None:
        """Ask the encoder for nothing more; what is not written yet is not wanted any more."""
        for encoder in self._encoders:
            encoder.cancel()

    # -- images ----------------------------------------------------------------------------------

    async def _encode_all(self) -> None:
        """Have images encoded until none is left."""
        while self._pictures:
            some: list[_Entry] = []
            while self._pictures and len(some) < _IMAGES:
                entry = self._pictures.popleft()
                if not entry.answer.done():
                    some.append(entry)
            try:
                await self._encode(some)
            except HashlensError as error:
                for entry in some:
                    _fail(entry, error)
            except Exception as error:
                logger.exception("encoding for UpsertStream")
                for entry in some:
                    _fail(entry, error)

    async def _encode(self, entries: Sequence[_Entry]) -> None:
        """Have images encoded; while the encoder is full, they wait rather than fail."""
        soonest_s, latest_s = _PAUSE_S
        while entries := [entry for entry in entries if not entry.answer.done()]:
            left_s = min(entry.ends_s for entry in entries) - time.monotonic()
            if left_s <= 0:
                raise DeadlineError("the image was not encoded in time: allow more time")
            wait_s = soonest_s
            refused = []
            try:
                results: Sequence[Encoded | HashlensError] = await self._images.encode_all(
                    [entry.item.image or b"" for entry in entries],
                    self._collection.spec,
                    deadline_s=left_s,
                    fields=["item.image"] * len(entries),
                )
            except OverloadedError as error:
                results = [error] * len(entries)
            for entry, result in zip(entries, results, strict=True):
                if isinstance(result, OverloadedError):
                    refused.append(entry)
                    wait_s = max(wait_s, result.retry_after_s)
                elif isinstance(result, HashlensError):
                    _fail(entry, result)
                else:
                    entry.embedding = result.embedding
                    assert entry.encoded is not None
                    entry.encoded.set()
            entries = refused
            if entries:
                await asyncio.sleep(min(wait_s, latest_s, left_s) * random.uniform(0.5, 1.0))

    # -- writes ----------------------------------------------------------------------------------

    async def _write_all(self) -> None:
        """Write until nothing is left."""
        while self._entries:
            head = self._entries[0]
            if not head.is_ready and head.encoded is not None:
                await head.encoded.wait()
            await self._write(self._next_ready())

    def _next_ready(self) -> list[_Entry]:
        """Take the first items that can be written, up to what one write carries."""
        some: list[_Entry] = []
        filled_bytes = 0
        now_s = time.monotonic()
        while self._entries and self._entries[0].is_ready and filled_bytes < _WRITE_BYTES:
            entry = self._entries.popleft()
            if entry.answer.done():
                continue
            if entry.ends_s <= now_s:
                _fail(entry, DeadlineError("the item was not written in time: allow more time"))
                continue
            some.append(entry)
            feature = None if entry.embedding is None else entry.embedding.feature
            filled_bytes += len(entry.item.payload) + (0 if feature is None else feature.nbytes)
        return some

    async def _write(self, entries: list[_Entry]) -> None:
        """Write items together, and answer them."""
        if not entries:
            return
        ends_s = min(entry.ends_s for entry in entries)
        records = [record_of(entry.item, entry.embedding) for entry in entries if entry.embedding]
        try:
            version = await self._in_store(records, ends_s)
        except InvalidInputError as error:
            if len(entries) == 1:
                _fail(entries[0], error)
                return
            # What one item has done is not for the others to bear.
            for entry in entries:
                await self._write([entry])
        except Exception as error:
            if not isinstance(error, HashlensError):
                logger.exception("writing for UpsertStream")
            for entry in entries:
                _fail(entry, error)
        else:
            for entry in entries:
                if not entry.answer.done():
                    entry.answer.set_result(
                        spb.UpsertStreamResponse(tag=entry.tag, version=version)
                    )

    async def _in_store(self, records: list[Record], ends_s: float) -> int:
        """Write; returns when the store is done with it, whatever the time.

        The store keeps to the deadline by itself. Nothing may be written after what it still has in
        hand, or the later of two items with one id would not be the one that stays.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads,
            lambda: self._collection.upsert(
                records, request_id="", deadline_s=ends_s - time.monotonic()
            ),
        )


def _fail(entry: _Entry, error: BaseException) -> None:
    if not entry.answer.done():
        entry.answer.set_result(_failed(entry.tag, error))


def _failed(tag: int, error: BaseException) -> spb.UpsertStreamResponse:
    return spb.UpsertStreamResponse(tag=tag, error=status_of(error))
