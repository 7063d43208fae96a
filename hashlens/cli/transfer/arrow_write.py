"""Items into Parquet and Arrow's IPC files."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hashlens.cli.transfer.columns import FORMAT, Columns, Layout
from hashlens.types import FeatureDtype

GROUP_BYTES = 32 * 2**20
"""About how large a group of rows is: what a reader has to hold at once."""


class ArrowWriter:
    """Writes a .parquet or an .arrow file.

    Parameters
    ----------
    file
        Where it goes.
    layout
        What all items have.
    parquet
        Parquet instead of Arrow's IPC file.
    """

    def __init__(self, file: BinaryIO, layout: Layout, *, parquet: bool) -> None:
        self._schema = schema_of(layout)
        self._layout = layout
        if parquet:
            self._writer: Any = pq.ParquetWriter(file, self._schema, write_page_checksum=True)
        else:
            self._writer = pa.ipc.new_file(file, self._schema)
        self._waiting: list[Any] = []

    def write(self, columns: Columns) -> None:
        """Append some."""
        self._waiting.append(self._batch(columns))
        if sum(batch.nbytes for batch in self._waiting) >= GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left and the file's end."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Forget what is left; the writer must not write it when it is collected."""
        self._waiting.clear()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting).combine_chunks()
            self._writer.write_table(table)
            self._waiting.clear()

    def _batch(self, columns: Columns) -> Any:
        n, width = len(columns), self._layout.code_bytes
        packed = pa.py_buffer(np.ascontiguousarray(columns.codes))
        arrays = {
            "ids": pa.array(columns.ids, pa.string()),
            "codes": pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), n, [None, packed]),
            "payloads": pa.array(columns.payloads, pa.binary()),
            "tags": pa.array(columns.tags, pa.list_(pa.string())),
            "expires_unix_ms": pa.array(columns.expires_unix_ms, pa.uint64()),
        }
        if columns.features is not None:
            numbers = pa.array(columns.features.reshape(-1))
            arrays["features"] = pa.FixedSizeListArray.from_arrays(numbers, self._layout.dim)
        return pa.record_batch([arrays[field.name] for field in self._schema], schema=self._schema)


def schema_of(layout: Layout) -> Any:
    """Return the schema that we write."""
    number = pa.float32() if layout.feature_dtype is FeatureDtype.F32 else pa.float16()
    fields = [("ids", pa.string()), ("codes", pa.binary(layout.code_bytes))]
    if layout.dim:
        fields.append(("features", pa.list_(number, layout.dim)))
    fields += [
        ("payloads", pa.binary()),
        ("tags", pa.list_(pa.string())),
        ("expires_unix_ms", pa.uint64()),
    ]
    about = {
        "hashlens.format": FORMAT,
        "hashlens.model_id": layout.model_id,
        "hashlens.n_bits": str(layout.n_bits),
        "hashlens.dim": str(layout.dim),
    }
    return pa.schema(fields, metadata=about)
