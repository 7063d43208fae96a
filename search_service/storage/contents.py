"""The rows of a collection: in the files of one generation, and in the table that finds them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import CollectionSpec
from search_service.snapshot import Snapshot
from search_service.storage import layout
from search_service.storage.arrays import Arrays, Prefix
from search_service.storage.feature_check import ChecksAt, FeatureChecks
from search_service.storage.frozen import Frozen
from search_service.storage.id_index import StoredIds
from search_service.storage.layout import LogRecord
from search_service.storage.rows import RowsAt, RowTable


class Contents:
    """Rows, and the views that others get of them. The caller locks.

    Parameters
    ----------
    spec
        What the collection is bound to.
    arrays
        The files.
    table
        Of the same rows.
    """

    def __init__(self, spec: CollectionSpec, arrays: Arrays, table: RowTable) -> None:
        self._spec = spec
        self.arrays = arrays
        self.table = table

    def stored_ids(self) -> StoredIds:
        """Return the ids in the files."""
        return StoredIds(self.arrays.id_bytes(), self.arrays.records())

    def apply(self, records: Sequence[LogRecord]) -> None:
        """Append what writes put, and mark as dead what they replace or delete.

        Raises
        ------
        OSError
            The disk is full or broken. Nothing was applied; trying again is safe.
        """
        puts, deaths = self.table.sort_out(records, self.stored_ids())
        _append(self.arrays, puts, deaths, n_bytes=codes.n_bytes(self._spec.n_bits))
        self.table.extend([record.id for record in puts], self.stored_ids())
        self.table.kill(np.array([row for row, _ in deaths], dtype=np.int64))

    def prefix(self, seq: int) -> Prefix:
        """Return what of the files counts at the write `seq`, the last one applied."""
        arrays = self.arrays
        return Prefix(
            rows=arrays.rows,
            deaths=arrays.deaths,
            seq=seq,
            dead=self.table.dead_flags(),
            records=arrays.records(),
            files=arrays.lengths(),
        )

    def frozen(self, seq: int, generation: int) -> Frozen:
        """Return everything in the files at the write `seq`, the last one applied."""
        arrays = self.arrays
        return Frozen(
            seq=seq,
            generation=generation,
            rows_per_segment=arrays.rows_per_segment,
            words=arrays.words(),
            records=arrays.records(),
            deaths=arrays.death_records(),
            ids=arrays.id_bytes(),
            payloads=arrays.payload_bytes(),
            tags=arrays.tag_bytes(),
            table=self.table,
        )

    def snapshot(self, seq: int, table_id: str, checks: FeatureChecks) -> Snapshot:
        """Make the snapshot of what is applied.

        Parameters
        ----------
        seq
            The last write applied.
        table_id
            See `Snapshot`.
        checks
            What is known of the features in these files.
        """
        arrays, table, spec = self.arrays, self.table, self._spec
        dead = table.dead_flags()
        return Snapshot(
            n_bits=spec.n_bits,
            dim=spec.dim,
            feature_dtype=spec.feature_dtype,
            version=seq,
            rows=arrays.rows,
            n_alive=arrays.rows - table.n_dead,
            words=arrays.words(),
            ids=RowsAt(
                table,
                arrays.rows,
                dead,
                self.stored_ids(),
                arrays.payload_bytes(),
                arrays.tag_bytes(),
            ),
            features=arrays.features(),
            rows_per_segment=arrays.rows_per_segment,
            dead=dead,
            has_feature=table.has_feature_flags(),
            feature_check=self._check_of(checks) if spec.dim else None,
            model_id=spec.model_id,
            table_id=table_id,
        )

    def _check_of(self, checks: FeatureChecks) -> ChecksAt:
        arrays = self.arrays
        return ChecksAt(
            checks,
            arrays.features(),
            arrays.rows_per_segment,
            arrays.records()["feature_crc32"],
        )


def _append(
    arrays: Arrays, puts: Sequence[LogRecord], deaths: Sequence[tuple[int, int]], *, n_bytes: int
) -> None:
    """Append a row for each item that was put, and the rows that died, each with its write."""
    id_end, payload_end, tags_end = arrays.ends()
    ids = [record.id.encode() for record in puts]
    rows = np.zeros(len(puts), dtype=layout.ROW)
    rows["seq"] = [record.seq for record in puts]
    rows["id_end"] = id_end + _running_total([len(item_id) for item_id in ids])
    rows["payload_end"] = payload_end + _running_total([len(r.payload) for r in puts])
    rows["tags_end"] = tags_end + _running_total([len(r.tags) for r in puts])
    rows["expires_ms"] = [record.expires_ms for record in puts]
    rows["feature_crc32"] = [zlib.crc32(record.feature) for record in puts]
    packed = np.frombuffer(b"".join([record.code for record in puts]), dtype=np.uint8)
    arrays.append(
        packed=packed.reshape(len(puts), n_bytes),
        records=rows,
        ids=b"".join(ids),
        payloads=b"".join([record.payload for record in puts]),
        tags=b"".join([record.tags for record in puts]),
        features=b"".join([record.feature for record in puts]),
        deaths=np.array(deaths, dtype=layout.DEATH),
    )


def _running_total(lengths: list[int]) -> NDArray[np.uint64]:
    return np.cumsum(np.array(lengths, dtype=np.uint64), dtype=np.uint64)
