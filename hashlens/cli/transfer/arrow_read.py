"""Items out of Parquet and Arrow's IPC files, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashlens.cli.transfer.columns import Columns, Layout, check_format, check_n_bits
from hashlens.errors import InvalidInputError
from hashlens.types import FeatureDtype

_NAMES = ("ids", "codes", "features", "payloads", "tags", "expires_unix_ms")


class ArrowReader:
    """Reads a .parquet or an .arrow file.

    Parameters
    ----------
    path
        The file.
    parquet
        Parquet instead of Arrow's IPC file.

    Raises
    ------
    InvalidInputError
        It is no such file, a column is missing or has another type than the schema says.
    """

    def __init__(self, path: Path, *, parquet: bool) -> None:
        self._source = pa.memory_map(str(path))
        try:
            with _readable():
                self._parquet: Any = _parquet_file(self._source) if parquet else None
                self._ipc: Any = None if parquet else pa.ipc.open_file(self._source)
                self._open()
        except BaseException:
            self._source.close()
            raise

    def _open(self) -> None:
        schema = self._ipc.schema if self._parquet is None else self._parquet.schema_arrow
        for name in ("ids", "codes"):
            if name not in schema.names:
                raise InvalidInputError("is not in the file, but has to be", field=name)
        self._names = [name for name in _NAMES if name in schema.names]
        for name in self._names:
            if schema.names.count(name) > 1:
                raise InvalidInputError("is in the file more than once", field=name)
            _check_type(name, schema.field(name).type)
        if self._parquet is None:
            batches = range(self._ipc.num_record_batches)
            self.n_items = sum(self._ipc.get_batch(i).num_rows for i in batches)
        else:
            self.n_items = self._parquet.metadata.num_rows
        about = {
            key.decode(errors="replace"): value.decode(errors="replace")
            for key, value in (schema.metadata or {}).items()
            if key.startswith(b"hashlens.")
        }
        check_format(about.get("hashlens.format", ""))
        said_bits = about.get("hashlens.n_bits")
        n_bits = 0 if said_bits is None else check_n_bits(_number("n_bits", said_bits))
        dim, dtype = 0, FeatureDtype.F16
        if "features" in self._names:
            kind = schema.field("features").type
            dim = kind.list_size if pa.types.is_fixed_size_list(kind) else self._width("features")
            dtype = FeatureDtype.F32 if pa.types.is_float32(kind.value_type) else FeatureDtype.F16
        said_dim = about.get("hashlens.dim")
        if said_dim is not None and _number("dim", said_dim) != dim:
            raise InvalidInputError(f"{said_dim}, but features have {dim} numbers", field="dim")
        kind = schema.field("codes").type
        fixed = pa.types.is_fixed_size_binary(kind)
        code_bytes = kind.byte_width if fixed else self._width("codes")
        if self.n_items and not code_bytes:
            raise InvalidInputError("a code has at least 1 bit", field="codes[0]")
        self.layout = Layout(
            code_bytes=code_bytes or -(-n_bits // 8),
            dim=dim,
            feature_dtype=dtype,
            n_bits=n_bits,
            model_id=about.get("hashlens.model_id", ""),
        )

    def read(self) -> Iterator[Columns]:
        """Yield all items, from the first, a part at a time."""
        first = 0
        with _readable():
            for batch in self._batches(self.layout.part_rows()):
                yield self._part(batch, first)
                first += batch.num_rows

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _batches(self, rows: int, names: list[str] | None = None) -> Iterator[Any]:
        names = names or self._names
        if self._parquet is not None:
            for batch in self._parquet.iter_batches(rows, columns=names):
                if batch.num_rows:
                    yield batch
            return
        for i in range(self._ipc.num_record_batches):
            batch = self._ipc.get_batch(i)
            for begin in range(0, batch.num_rows, rows):
                yield batch.slice(begin, rows)

    def _width(self, name: str) -> int:
        """Return how long the first value of a column is; 0 if there is none."""
        batch = next(self._batches(1, [name]), None)
        if batch is None:
            return 0
        column = _whole(batch.column(batch.schema.get_field_index(name)), name, 0)
        return int(_lengths(column)[0].as_py())

    def _part(self, batch: Any, first: int) -> Columns:
        n, layout = batch.num_rows, self.layout
        found = {
            name: _whole(batch.column(batch.schema.get_field_index(name)), name, first)
            for name in self._names
        }
        features = None
        if "features" in found:
            features = _features(found["features"], layout, first)
        return Columns(
            ids=found["ids"].to_pylist(),
            codes=_codes(found["codes"], layout.code_bytes, first),
            features=features,
            payloads=_or_empty(found, "payloads", n, b""),
            tags=_or_empty(found, "tags", n, ()),
            expires_unix_ms=_or_empty(found, "expires_unix_ms", n, 0),
        )


def _parquet_file(source: Any) -> Any:
    return pq.ParquetFile(source, page_checksum_verification=True)


def _check_type(name: str, kind: Any) -> None:
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if name == "ids":
        right, form = types.is_string(kind) or types.is_large_string(kind), "string"
    elif name in ("codes", "payloads"):
        fixed = types.is_fixed_size_binary(kind)
        right = types.is_binary(kind) or types.is_large_binary(kind) or fixed
        form = "binary, of ceil(n_bits / 8) bytes" if name == "codes" else "binary"
    elif name == "features":
        right = is_list and (types.is_float16(kind.value_type) or types.is_float32(kind.value_type))
        right = right and not (types.is_fixed_size_list(kind) and not kind.list_size)
        form = "fixed_size_list of dim float16 or float32"
    elif name == "tags":
        right = is_list and (
            types.is_string(kind.value_type) or types.is_large_string(kind.value_type)
        )
        form = "list of string"
    else:
        right, form = types.is_integer(kind), "uint64"
    if not right:
        raise InvalidInputError(f"is {kind}: write {form}", field=name)


def _whole(column: Any, name: str, first: int) -> Any:
    """Return a column; InvalidInputError, naming the row, for bytes that cannot be its values."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        for i in range(len(column)):
            try:
                column.slice(i, 1).validate(full=True)
            except pa.ArrowInvalid as reason:
                raise InvalidInputError(str(reason), field=f"{name}[{first + i}]") from None
        raise InvalidInputError(str(error), field=name) from None
    if column.null_count and name in ("ids", "codes", "features"):
        raise InvalidInputError("is null", field=f"{name}[{first + _first(column.is_null())}]")
    return column


def _or_empty(found: dict[str, Any], name: str, n: int, empty: Any) -> list[Any]:
    """Return a column's values, `empty` for those that are not there."""
    if name not in found:
        return [empty] * n
    return [empty if value is None else value for value in found[name].to_pylist()]


def _codes(column: Any, width: int, first: int) -> NDArray[np.uint8]:
    n = len(column)
    if pa.types.is_fixed_size_binary(column.type):
        data = np.frombuffer(column.buffers()[1], dtype=np.uint8)
        begin = column.offset * width
        return data[begin : begin + n * width].reshape(n, width)
    _check_widths(column, width, first, "codes", "bytes")
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8).reshape(n, width)


def _features(column: Any, layout: Layout, first: int) -> NDArray[Any]:
    if not pa.types.is_fixed_size_list(column.type):
        _check_widths(column, layout.dim, first, "features", "numbers")
    numbers = column.flatten()
    if numbers.null_count:
        row = first + _first(numbers.is_null()) // layout.dim
        raise InvalidInputError("holds null", field=f"features[{row}]")
    dtype = layout.feature_dtype.numpy
    found = np.asarray(numbers.to_numpy(), dtype=dtype)
    return found.reshape(len(column), layout.dim)


def _lengths(column: Any) -> Any:
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.binary_length(column)
    return pc.list_value_length(column)


def _check_widths(column: Any, width: int, first: int, name: str, unit: str) -> None:
    lengths = _lengths(column).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        raise InvalidInputError(
            f"has {lengths[wrong[0]]} {unit}, the first one has {width}",
            field=f"{name}[{first + int(wrong[0])}]",
        )


def _first(flags: Any) -> int:
    return int(np.flatnonzero(flags.to_numpy(zero_copy_only=False))[0])


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise InvalidInputError(f"{text[:80]!r} is no number", field=name)
    return int(text)


@contextmanager
def _readable() -> Iterator[None]:
    """Say of a damaged file that it is one."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(f"is no such file that can be read: {line}") from None
