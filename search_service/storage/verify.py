"""Redis against a replica's files, item by item, while writes go on.

Most items are compared in bulk: a bucket's against the rows of the same sequence numbers. Whatever
does not fit there, because it differs or because it was written meanwhile, is looked at again by
itself: Redis says what the item is and at which version, all at one moment, and is compared with
the files at exactly that version. So only a look can find a difference.

Memory: 9 bytes for each row, and a few thousand items.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import CancelledError, DataLossError, UnavailableError
from hashlens.types import CollectionSpec
from search_service.storage import manifest
from search_service.storage.buckets import ID_END, Batch, BucketReader
from search_service.storage.differences import Differences
from search_service.storage.digest import digest_of
from search_service.storage.file_checks import check_features, check_files, check_rows
from search_service.storage.frozen import Frozen
from search_service.storage.gather import cut, gathered
from search_service.storage.local import LocalCollection

_LOOKS_AT_ONCE: Final = 64
_CATCH_UP_S: Final = 30.0
_REWRITTEN: Final = "The files were rewritten meanwhile. Try again."


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found."""

    version: int
    """At which both were compared."""
    n_catalog_items: int
    n_array_items: int
    differences: list[str]
    """The first thousand."""
    n_differences: int
    digest: bytes
    """See `digest.digest_of`."""


def verify(
    local: LocalCollection, buckets: BucketReader, stop: threading.Event, *, lost: str = ""
) -> Verified:
    """Compare a replica's files with Redis, and with their checksums.

    Parameters
    ----------
    local
        The files; something follows the log meanwhile.
    buckets
        Reads the same collection from Redis.
    stop
        Set it to end this early.
    lost
        Why the log cannot be followed from what the files hold; then items are not compared.

    Raises
    ------
    UnavailableError
        Redis is away, or the files were replaced meanwhile.
    DeadlineError
        The files do not catch up with Redis.
    PreconditionError, NotFoundError
        Redis has another collection of the name, or none.
    DataLossError
        Redis holds what is no item.
    CancelledError
        `stop` was set.
    """
    differences = Differences()
    check_files(local.directory, differences, stop)
    frozen = local.frozen()
    check_rows(frozen, local.spec, differences, stop)
    check_features(local.directory, frozen, local.spec, differences, stop)
    with contextlib.suppress(DataLossError):  # Which `check_files` has told.
        if manifest.read(local.directory).generation != frozen.generation:
            raise UnavailableError(_REWRITTEN)
    if lost:
        differences.add(lost)
        return _uncompared(frozen, buckets, differences)
    comparison = _Comparison(local, buckets, differences, stop)
    try:
        for batch in buckets.batches(stop):
            comparison.compare(batch)
        return comparison.finish()
    except _TornError as error:
        # Then nothing that the rows say can be compared.
        differences.add(str(error))
        return _uncompared(frozen, buckets, differences)


def _uncompared(frozen: Frozen, buckets: BucketReader, differences: Differences) -> Verified:
    return Verified(
        frozen.seq,
        buckets.look([]).n_items,
        len(frozen.records) - len(frozen.deaths),
        differences.lines,
        differences.n,
        b"",
    )


class _TornError(Exception):
    """The files do not hold together."""


class _Comparison:
    """Compares items, and remembers which rows it has seen."""

    def __init__(
        self,
        local: LocalCollection,
        buckets: BucketReader,
        differences: Differences,
        stop: threading.Event,
    ) -> None:
        self._local = local
        self._spec: CollectionSpec = local.spec
        self._buckets = buckets
        self._differences = differences
        self._stop = stop
        self._n_missing = self._n_extra = 0
        self._base = base = local.frozen()
        self._seqs: NDArray[np.uint64] = np.ascontiguousarray(base.records["seq"])
        self._seen = base.dead_at(base.seq)
        """Rows of which nothing more has to be asked."""

    def compare(self, batch: Batch) -> None:
        """Compare the items of some buckets."""
        n = sum(batch.counts)
        if not n:
            return
        try:
            fits, rows = self._fits(batch, n)
        except DataLossError as error:
            raise _TornError(str(error)) from None
        self._seen[rows[fits]] = True
        suspects = np.flatnonzero(~fits)
        if len(suspects):
            ids = batch.ids.split(bytes((ID_END,)))
            self._look([ids[i] for i in suspects.tolist()])

    def finish(self) -> Verified:
        """Look at the rows that no item of Redis led to, and count."""
        now = self._caught_up(self._buckets.look([]).seq)
        if len(now.records) > len(self._seen):
            added = np.zeros(len(now.records) - len(self._seen), dtype=np.bool_)
            self._seen = np.concatenate([self._seen, added])
        rows = np.flatnonzero(~self._seen[: len(now.records)] & ~now.dead_at(now.seq))
        for lo in range(0, len(rows), _LOOKS_AT_ONCE):
            some = rows[lo : lo + _LOOKS_AT_ONCE]
            # What an earlier look led to is seen by now.
            some = some[~self._seen[some]]
            joined, lengths = self._torn_safe(now, some)
            self._look(list(cut(joined, lengths)), some.tolist())
        counted = self._buckets.look([])
        now = self._caught_up(counted.seq)
        n_here = now.rows_at(counted.seq) - now.deaths_at(counted.seq)
        n_there = n_here + self._n_missing - self._n_extra
        if counted.n_items != n_there:
            self._differences.add(f"Redis counts {counted.n_items} items, and holds {n_there}")
        try:
            digest = digest_of(now, counted.seq, self._spec.n_bits, self._stop)
        except DataLossError as error:
            raise _TornError(str(error)) from None
        return Verified(
            counted.seq,
            counted.n_items,
            n_here,
            self._differences.lines,
            self._differences.n,
            digest,
        )

    def _fits(self, batch: Batch, n: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return for each item whether a row says just the same, and which."""
        base = self._base
        if not len(self._seqs):
            return np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.int64)
        values = np.frombuffer(batch.values, dtype=np.uint8).reshape(n, -1)
        seqs = values[:, :8].copy().view("<u8").reshape(n)
        rows = np.minimum(np.searchsorted(self._seqs, seqs), len(self._seqs) - 1)
        fits = (self._seqs[rows] == seqs) & ~self._seen[rows]
        data = np.frombuffer(batch.ids, dtype=np.uint8)
        ends = np.flatnonzero(data == ID_END)
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - starts
        ours, our_lengths = base.ids_of(rows)
        fits &= (lengths == our_lengths) & (lengths > 0)
        if not fits.all():
            ours, _ = base.ids_of(rows[fits])
        chosen = np.flatnonzero(fits)
        theirs = gathered(data, starts[chosen], lengths[chosen])
        if theirs != ours:
            equal = np.frombuffer(theirs, np.uint8) == np.frombuffer(ours, np.uint8)
            first = np.cumsum(lengths[chosen]) - lengths[chosen]
            fits[chosen] = np.logical_and.reduceat(equal, first)
        fits &= (base.packed(rows, self._spec.n_bits) == values[:, 8:]).all(axis=1)
        extras = dict(batch.extras)
        mine = np.flatnonzero(base.with_extras(rows)).tolist()
        for i in {*mine, *extras}:
            if fits[i]:
                fits[i] = base.extras_of(int(rows[i])) == extras.get(i, b"")
        return fits, rows

    def _look(self, ids: list[bytes], rows: list[int] | None = None) -> None:
        """Compare items one by one, each at one moment; `rows` are where they seem to be."""
        for lo in range(0, len(ids), _LOOKS_AT_ONCE):
            if self._stop.is_set():
                raise CancelledError("The check was stopped.")
            some = ids[lo : lo + _LOOKS_AT_ONCE]
            looked = self._buckets.look(some)
            now = self._caught_up(looked.seq)
            found = now.find(some, looked.seq)
            for i, (item_id, (value, extras), row) in enumerate(
                zip(some, looked.items, found, strict=True)
            ):
                self._judge(now, item_id, value, extras, row)
                from_row = None if rows is None else rows[lo + i]
                if from_row is not None and from_row != row and not now.table.is_dead(from_row):
                    self._differences.about(item_id, f"is in row {from_row}, too, or only there")
                    self._n_extra += 1
                for known in (row, from_row):
                    if known is not None and known < len(self._seen):
                        self._seen[known] = True

    def _judge(
        self, now: Frozen, item_id: bytes, value: bytes, extras: bytes, row: int | None
    ) -> None:
        """Say what differs about one item."""
        if not value:
            if row is not None:
                self._n_extra += 1
                self._differences.about(item_id, "is in the arrays, and not in Redis")
            elif extras:
                self._differences.about(item_id, "is gone from Redis but for its payload")
            return
        seq = int.from_bytes(value[:8], "little")
        if row is None:
            self._n_missing += 1
            self._differences.about(item_id, f"is in Redis since version {seq}, not in the arrays")
            return
        wrong: list[str] = []
        our_seq = int(now.records["seq"][row])
        if our_seq != seq:
            wrong.append(f"its version is {seq} in Redis, {our_seq} in the arrays")
        at = np.array([row], dtype=np.int64)
        if now.packed(at, self._spec.n_bits).tobytes() != value[8:]:
            wrong.append("its code differs")
        if not codes.padding_is_zero(value, self._spec.n_bits):
            wrong.append("its code in Redis has bits behind its end")
        try:
            if now.extras_of(row) != extras:
                wrong.append("its payload, tags or expiry differ")
        except DataLossError as error:
            raise _TornError(str(error)) from None
        if wrong:
            self._differences.about(item_id, "; ".join(wrong))

    def _caught_up(self, seq: int) -> Frozen:
        """Return the files as soon as they hold a version."""
        self._local.wait_for(seq, _CATCH_UP_S)
        now = self._local.frozen()
        if now.generation != self._base.generation:
            raise UnavailableError(_REWRITTEN)
        return now

    @staticmethod
    def _torn_safe(now: Frozen, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        try:
            return now.ids_of(rows)
        except DataLossError as error:
            raise _TornError(str(error)) from None
