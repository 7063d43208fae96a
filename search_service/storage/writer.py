"""Writes to one collection: to Redis, and as far ahead of the local files as is allowed."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence

from hashlens.errors import (
    DeadlineError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from hashlens.packed_items import PackedItems
from hashlens.types import DeleteResult
from search_service.storage import layout
from search_service.storage.chunks import Raw
from search_service.storage.expiry import remove_expired
from search_service.storage.live import Live
from search_service.storage.packing import id_bytes, packed_records, record_of
from search_service.storage.records import Record

_SETTLE_S = 1.0
_LOOK_S = 0.2
"""How often a write that waits for Redis has it looked for."""
_MAX_LAG_BYTES = 64 << 20
"""About how much of the log may be acknowledged and not yet applied here."""


class Writer:
    """Writes to a collection; acknowledged by Redis when a method returns. Thread-safe."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._written = 0
        """About the last write of this replica's own callers."""

    def upsert(
        self,
        items: Sequence[Record] | PackedItems,
        *,
        request_id: str,
        deadline_s: float,
        content: bytes | None = None,
    ) -> int:
        """Write items, replacing those whose ids are there; return the version that has them.

        Acknowledged by Redis when it returns. Items are written in their order, in chunks of a few
        hundred; each chunk is written whole or not at all.

        Parameters
        ----------
        items
            Of two with one id, the later stays.
        request_id
            Names this write: repeated with the same items within ten minutes, it changes nothing
            and returns the same version. Empty: this call's own retries only.
        deadline_s
            The longest to wait, in seconds.
        content
            What the request id is tied to. None: the items. Pass what they were made from where
            making them again may differ in the last digits.

        Raises
        ------
        InvalidInputError
            An item does not fit the collection, or the request id was used for something else.
        PreconditionError
            Redis and this replica do not hold the same collection.
        UnavailableError
            Redis is away. Repeating the call with the same request id is safe.
        DeadlineError
            Only a part is written; repeating the call with the same request id writes the rest.
        LimitError
            Redis or the local disk is full.
        OverloadedError
            This replica has not applied what was written before. Nothing is written.
        """
        give_up = time.monotonic() + deadline_s
        if isinstance(items, PackedItems):
            records = packed_records(items, self._live.local.spec)
        else:
            records = [
                record_of(item, self._live.local.spec, f"items[{i}]")
                for i, item in enumerate(items)
            ]
        if not records:
            return self._live.local.snapshot.version
        self._check_writable(give_up)
        self._keep_up(give_up)
        written = self._live.catalog.put(
            self._live.meta,
            records,
            request_id=request_id or uuid.uuid4().hex,
            deadline_s=give_up - time.monotonic(),
            known_seq=self._live.follower.known_seq,
            content=content,
        )
        self._live.follower.saw(written.seq)
        self._written = max(self._written, written.seq)
        return written.seq

    def delete(self, ids: Sequence[str], *, request_id: str, deadline_s: float) -> DeleteResult:
        """Remove items; ids that are not there are no error. Otherwise as `upsert`."""
        packed = [id_bytes(item_id, f"ids[{i}]") for i, item_id in enumerate(ids)]
        if not packed:
            return DeleteResult(version=self._live.local.snapshot.version, n_deleted=0)
        give_up = time.monotonic() + deadline_s
        self._check_writable(give_up)
        written = self._live.catalog.delete(
            self._live.meta,
            [Raw(item_id, layout.pack_delete(item_id)) for item_id in packed],
            request_id=request_id or uuid.uuid4().hex,
            deadline_s=give_up - time.monotonic(),
            known_seq=self._live.follower.known_seq,
        )
        self._live.follower.saw(written.seq)
        return DeleteResult(version=written.seq, n_deleted=written.n_items)

    def expire(self, should_stop: Callable[[], bool]) -> int:
        """Have Redis remove what has expired; return how many items it removed.

        It goes by the log, so all replicas lose it at one version. While Redis is away nothing
        expires. For one thread at a time.

        Parameters
        ----------
        should_stop
            Polled between calls to Redis, each of which removes a few hundred.

        Raises
        ------
        HashlensError
            Redis refuses, or has gone away. The next call does what is left.
        """
        if self._live.follower.trouble is not None:
            return 0
        return remove_expired(
            self._live.local.snapshot, self._live.catalog, self._live.meta, should_stop
        )

    def ask_to_erase(self, deadline_s: float) -> int:
        """Ask all replicas to erase what is dead by now; return the version that this is.

        Raises
        ------
        PreconditionError, NotFoundError
            Redis and this replica do not hold the same collection.
        UnavailableError
            Redis is away.
        """
        give_up = time.monotonic() + deadline_s
        self._check_writable(give_up)
        seq = self._live.catalog.eraser.ask(
            self._live.meta, self._live.follower.known_seq, give_up - time.monotonic()
        )
        self._live.follower.saw(seq)
        return seq

    def _check_writable(self, give_up: float) -> None:
        """Refuse what could not be applied here; the rest is for Redis to say."""
        self._live.local.check_disk()
        trouble = self._live.follower.trouble
        while isinstance(trouble, UnavailableError) and time.monotonic() < give_up:
            self._live.follower.wait_settled(min(give_up - time.monotonic(), _LOOK_S))
            trouble = self._live.follower.trouble
        if trouble is None or self._live.follower.is_foreign:
            return
        if self._live.follower.needs_files:
            raise UnavailableError(self._live.explained(trouble))
        if self._live.follower.is_lost:
            raise PreconditionError(trouble.message)
        raise type(trouble)(trouble.message)

    def _keep_up(self, give_up: float) -> None:
        """Wait until the log is not far ahead of the files: Redis holds it in memory until then."""
        lag_items = max(int(_MAX_LAG_BYTES / self._live.follower.mean_bytes), 1)
        while (
            self._written - self._live.local.seq > lag_items and self._live.follower.trouble is None
        ):
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                raise OverloadedError(
                    f"{self._live.local.spec.name} is written faster than this replica can follow",
                    retry_after_s=_SETTLE_S,
                )
            with contextlib.suppress(DeadlineError):
                self._live.local.wait_for(self._written - lag_items, min(left_s, _SETTLE_S))
