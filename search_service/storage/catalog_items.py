"""All items that Redis holds of a collection, in arrays, until they are written as rows."""

from __future__ import annotations

import os
import threading
import zlib
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import CancelledError, DataLossError
from search_service.storage import layout
from search_service.storage.arrays import Arrays
from search_service.storage.buckets import ID_END, Batch
from search_service.storage.failpoints import reach
from search_service.storage.gather import cut, gathered
from search_service.storage.keys import Meta
from search_service.storage.old_features import OldFeatures

_ROWS_AT_ONCE: Final = 1 << 16
_BYTES_AT_ONCE: Final = 8 << 20


class CatalogItems:
    """All items, as they come, in arrays.

    Parameters
    ----------
    meta
        Of the collection.
    spool
        A file for the extras.
    """

    def __init__(self, meta: Meta, spool: IO[bytes]) -> None:
        self._meta = meta
        self._spool = spool
        self._ids = bytearray()
        self._values = bytearray()
        self._n = 0
        self._extras_of: list[NDArray[np.int64]] = []
        """Position, offset in the spool, length; shape ``[n, 3]`` each."""
        self._spooled_bytes = 0

    def add(self, batch: Batch) -> None:
        """Add the items of some buckets."""
        self._ids += batch.ids
        self._values += batch.values
        if batch.extras:
            lengths = np.array([len(more) for _, more in batch.extras], dtype=np.int64)
            places = np.array([position for position, _ in batch.extras], dtype=np.int64)
            offsets = self._spooled_bytes + np.cumsum(lengths) - lengths
            self._extras_of.append(np.stack([self._n + places, offsets, lengths], axis=1))
            self._spool.write(b"".join([more for _, more in batch.extras]))
            self._spooled_bytes += int(lengths.sum())
        self._n += sum(batch.counts)

    def write(
        self, arrays: Arrays, max_seq: int, features: OldFeatures | None, stop: threading.Event
    ) -> None:
        """Write those up to a version, in the order of their writes.

        Raises
        ------
        DataLossError
            Two items have one sequence number, or there are bits behind a code's end.
        """
        spec = self._meta.spec
        self._spool.flush()
        code_bytes = codes.n_bytes(spec.n_bits)
        values = np.frombuffer(self._values, dtype=np.uint8).reshape(self._n, 8 + code_bytes)
        seqs = values[:, :8].copy().view("<u8").reshape(self._n)
        order = np.argsort(seqs, kind="stable")
        seqs = seqs[order]
        n = int(np.searchsorted(seqs, np.uint64(max_seq), side="right"))
        if n and (seqs[0] == 0 or (seqs[1:n] == seqs[: n - 1]).any()):
            raise DataLossError(
                f"Two items of {spec.name} in Redis have one sequence number. Drop the collection "
                "and index again."
            )
        data = np.frombuffer(self._ids, dtype=np.uint8)
        ends = np.flatnonzero(data == ID_END)
        extras = np.concatenate([np.zeros((0, 3), dtype=np.int64), *self._extras_of])
        width = layout.feature_bytes(spec)
        step = min(max(_BYTES_AT_ONCE // max(width, 1), 1), _ROWS_AT_ONCE)
        for lo in range(0, n, step):
            reach("rebuild.write")
            if stop.is_set():
                raise CancelledError("The rebuild was stopped.")
            chosen = order[lo : min(lo + step, n)]
            starts = np.where(chosen > 0, ends[chosen - 1] + 1, 0)
            lengths = ends[chosen] - starts
            ids = gathered(data, starts, lengths)
            packed = values[chosen, 8:]
            if spec.n_bits % 8 and (packed[:, -1] >> spec.n_bits % 8).any():
                raise DataLossError(
                    f"Redis holds a code of {spec.name} with bits behind its end. Drop the "
                    "collection and index again."
                )
            records = np.zeros(len(chosen), dtype=layout.ROW)
            id_end, payload_end, tags_end = arrays.ends()
            records["seq"] = seqs[lo : lo + len(chosen)]
            records["id_end"] = id_end + np.cumsum(lengths)
            payloads, tags = self._beside(chosen, extras, records)
            records["payload_end"] += np.uint64(payload_end)
            records["tags_end"] += np.uint64(tags_end)
            arrays.append(
                packed=packed,
                records=records,
                ids=ids,
                payloads=payloads,
                tags=tags,
                features=_features(records, ids, lengths, packed, width, features),
                deaths=np.zeros(0, dtype=layout.DEATH),
            )

    def _beside(
        self, chosen: NDArray[np.int64], extras: NDArray[np.int64], records: NDArray[np.void]
    ) -> tuple[bytes, bytes]:
        """Return payloads and tags of rows, one after the other; fill in where they end."""
        if not len(extras):
            return b"", b""
        at = np.searchsorted(extras[:, 0], chosen)
        at[at == len(extras)] = 0
        payloads: list[bytes] = []
        tags: list[bytes] = []
        lengths = np.zeros((2, len(chosen)), dtype=np.uint64)
        for row in np.flatnonzero(extras[at, 0] == chosen).tolist():
            _, offset, length = extras[at[row]].tolist()
            try:
                unpacked = layout.unpack_extras(os.pread(self._spool.fileno(), length, offset))
            except ValueError as error:
                raise DataLossError(
                    f"Redis holds what is no payload of {self._meta.spec.name} ({error}). Drop the "
                    "collection and index again."
                ) from None
            payloads.append(unpacked[0])
            tags.append(unpacked[1])
            lengths[:, row] = len(unpacked[0]), len(unpacked[1])
            records["expires_ms"][row] = unpacked[2]
        records["payload_end"], records["tags_end"] = np.cumsum(lengths, axis=1, dtype=np.uint64)
        return b"".join(payloads), b"".join(tags)


def _features(
    records: NDArray[np.void],
    ids: bytes,
    lengths: NDArray[np.int64],
    packed: NDArray[np.uint8],
    width: int,
    found: OldFeatures | None,
) -> bytes:
    """Return the features of rows, one after the other; fill in checksums and flags."""
    if not width:
        return b""
    features = bytearray(len(records) * width)
    records["feature_crc32"] = zlib.crc32(bytes(width))
    records["flags"] = layout.NO_FEATURE
    if found is not None:
        words = codes.as_words(packed).astype("<u8", copy=False).T
        for row, (seq, item_id) in enumerate(
            zip(records["seq"].tolist(), cut(ids, lengths), strict=True)
        ):
            old = found.read(seq, item_id, words[row].tobytes())
            if old is not None:
                features[row * width : (row + 1) * width] = old[0]
                records["feature_crc32"][row] = old[1]
                records["flags"][row] = 0
    return bytes(features)
