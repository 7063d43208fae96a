"""Items out of NumPy's .npz, whoever wrote it, without loading it as a whole."""

from __future__ import annotations

import lzma
import math
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hashlens.cli.transfer.columns import (
    Columns,
    Layout,
    check_format,
    check_n_bits,
    feature_dtype_of,
)
from hashlens.errors import InvalidInputError
from hashlens.types import MAX_ID_BYTES, MAX_PAYLOAD_BYTES, MAX_TAG_BYTES, MAX_TAGS, FeatureDtype

_MAX_TAGS_BYTES = MAX_TAGS * (MAX_TAG_BYTES + 1)
_MAX_SCALAR_BYTES = 4096

_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
"""What `zipfile` raises for a file that is damaged, encrypted or packed as it cannot unpack."""


class NpzReader:
    """Reads a .npz file. Nothing in it is ever unpickled.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    InvalidInputError
        A member is missing, or has another dtype or shape than the schema says.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            with _readable():
                self._archive = zipfile.ZipFile(self._file)
                self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        archive = self._archive
        self._members = {
            name.removesuffix(".npy"): _Member(archive, name)
            for name in archive.namelist()
            if name.endswith(".npy")
        }
        for name in ("ids", "codes"):
            if name not in self._members:
                raise InvalidInputError("is not in the file, but has to be", field=name)
        codes = self._members["codes"]
        codes.check("|u1", 2, "uint8, shape [n, ceil(n_bits / 8)], as numpy.packbits makes it")
        self.n_items = codes.shape[0]
        features = self._members.get("features")
        dim, dtype = 0, FeatureDtype.F16
        if features is not None:
            dtype = feature_dtype_of(features.dtype.str)
            features.check(features.dtype.str, 2, "float16 or float32, shape [n, dim]")
            dim = features.shape[1]
        said_dim = self._number("dim", dim)
        if said_dim != dim:
            raise InvalidInputError(f"{said_dim}, but features have {dim} numbers", field="dim")
        n_bits = self._number("n_bits", 0)
        check_format(self._text("format"))
        self.layout = Layout(
            code_bytes=codes.shape[1],
            dim=dim,
            feature_dtype=dtype,
            n_bits=check_n_bits(n_bits) if "n_bits" in self._members else 0,
            model_id=self._text("model_id"),
        )
        expires = self._members.get("expires_unix_ms")
        if expires is not None and (expires.dtype.kind not in "ui" or len(expires.shape) != 1):
            raise InvalidInputError("integers, shape [n]", field="expires_unix_ms")
        for name in ("ids", "payloads", "tags"):
            self._check_blobs(name)
        for name in ("ids", "ids_ends", "features", "payloads", "payloads_ends", "tags"):
            self._check_length(name)
        for name in ("tags_ends", "expires_unix_ms"):
            self._check_length(name)

    def read(self) -> Iterator[Columns]:
        """Yield all items, from the first, a part at a time."""
        with _readable(), ExitStack() as stack:
            streams = {
                name: stack.enter_context(member.rows())
                for name, member in self._members.items()
                if len(member.shape) > 0
            }
            texts = [self._members[name] for name in ("ids", "tags") if name in self._members]
            beside_bytes = sum(m.dtype.itemsize for m in texts if m.dtype.kind == "U")
            step = self.layout.part_rows(beside_bytes)
            for first in range(0, self.n_items, step):
                n = min(step, self.n_items - first)
                yield self._part(streams, first, n)
            for rows in streams.values():
                rows.end()

    def close(self) -> None:
        """Close the file."""
        self._archive.close()
        self._file.close()

    def _part(self, streams: dict[str, _Rows], first: int, n: int) -> Columns:
        payloads = [b""] * n
        if "payloads" in streams:
            payloads = _blobs(streams, "payloads", first, n, MAX_PAYLOAD_BYTES)
        tags: list[tuple[str, ...]] = [()] * n
        if "tags" in streams:
            lines = _texts(streams, "tags", first, n, _MAX_TAGS_BYTES)
            tags = [tuple(line.split("\n")) if line else () for line in lines]
        expires = [0] * n
        if "expires_unix_ms" in streams:
            expires = streams["expires_unix_ms"].take(n).tolist()
        return Columns(
            ids=_texts(streams, "ids", first, n, MAX_ID_BYTES),
            codes=streams["codes"].take(n),
            features=streams["features"].take(n) if "features" in streams else None,
            payloads=payloads,
            tags=tags,
            expires_unix_ms=expires,
        )

    def _check_blobs(self, name: str) -> None:
        member, ends = self._members.get(name), self._members.get(f"{name}_ends")
        if member is None:
            return
        if member.dtype.kind == "U" and name != "payloads":
            if len(member.shape) != 1 or ends is not None:
                raise InvalidInputError(f"text, shape [n], without {name}_ends", field=name)
            return
        text = "" if name == "payloads" else "text, shape [n], or "
        member.check("|u1", 1, f"{text}bytes (uint8), one after the other, with {name}_ends")
        if ends is None:
            raise InvalidInputError(f"say where each of {name} ends", field=f"{name}_ends")
        if ends.dtype.kind not in "ui" or len(ends.shape) != 1:
            raise InvalidInputError("integers, shape [n]", field=f"{name}_ends")

    def _check_length(self, name: str) -> None:
        member = self._members.get(name)
        if member is None or f"{name}_ends" in self._members:
            return  # Its bytes are as many as the ends say.
        if member.shape[0] != self.n_items:
            raise InvalidInputError(
                f"{member.shape[0]} rows, but codes have {self.n_items}", field=name
            )

    def _number(self, name: str, otherwise: int) -> int:
        member = self._members.get(name)
        if member is None:
            return otherwise
        if member.dtype.kind not in "ui" or member.shape:
            raise InvalidInputError("is one integer", field=name)
        return int(member.scalar())

    def _text(self, name: str) -> str:
        member = self._members.get(name)
        if member is None:
            return ""
        if member.dtype.kind != "U" or member.shape:
            raise InvalidInputError("is one text", field=name)
        return str(member.scalar())


class _Member:
    """One array of the file."""

    def __init__(self, archive: zipfile.ZipFile, entry: str) -> None:
        self.name = entry.removesuffix(".npy")
        self._archive = archive
        self._entry = entry
        with archive.open(entry) as stream:
            try:
                shape, fortran, dtype = self._header(stream)
            except ValueError as error:
                raise InvalidInputError(f"is no NumPy array: {error}", field=self.name) from None
            header_bytes = stream.tell()
        if dtype.hasobject:
            raise InvalidInputError("holds Python objects: they are not read", field=self.name)
        if fortran:
            raise InvalidInputError(
                "is in column order: save numpy.ascontiguousarray of it", field=self.name
            )
        n_bytes = math.prod(shape) * dtype.itemsize
        if header_bytes + n_bytes != archive.getinfo(entry).file_size:
            raise InvalidInputError("is not as long as its shape says", field=self.name)
        self.shape, self.dtype, self._n_bytes = shape, dtype, n_bytes

    def check(self, dtype: str, n_axes: int, form: str) -> None:
        """Raise InvalidInputError, saying the right form, for another dtype or shape."""
        wide = n_axes < 2 or (len(self.shape) == 2 and self.shape[1] > 0)
        if self.dtype.str != dtype or len(self.shape) != n_axes or not wide:
            shape = list(self.shape)
            raise InvalidInputError(
                f"is {self.dtype}, shape {shape}: write {form}", field=self.name
            )

    def scalar(self) -> Any:
        """Return the value of an array without axes."""
        if self._n_bytes > _MAX_SCALAR_BYTES:
            raise InvalidInputError("is too long", field=self.name)
        with self.rows() as rows:
            if self.dtype.kind == "U":
                return _texts({self.name: rows}, self.name, 0, 1, 0)[0]
            return rows.take(1)[0].item()

    @contextmanager
    def rows(self) -> Iterator[_Rows]:
        """Open it for reading from its first row."""
        with self._archive.open(self._entry) as stream:
            self._header(stream)
            yield _Rows(stream, self)

    @staticmethod
    def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
        raise ValueError(f"version {version} of the .npy format is not read")


class _Rows:
    """Reads on in one member."""

    def __init__(self, stream: IO[bytes], member: _Member) -> None:
        self._stream = stream
        self.dtype = member.dtype
        self._name = member.name
        self._row_shape = member.shape[1:]
        self.position = 0
        """Bytes that were taken."""

    def take(self, n: int) -> NDArray[Any]:
        """Return the next `n` rows."""
        data = self.take_bytes(n * math.prod(self._row_shape) * self.dtype.itemsize)
        return np.frombuffer(data, dtype=self.dtype).reshape(n, *self._row_shape)

    def take_bytes(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        data = self._stream.read(n_bytes)
        if len(data) != n_bytes:
            raise InvalidInputError("is cut off", field=self._name)
        self.position += n_bytes
        return data

    def end(self) -> None:
        """Check that nothing is left, and the checksum."""
        if self._stream.read(1):
            raise InvalidInputError(
                f"goes on behind the last end, {self.position}", field=self._name
            )


def _blobs(streams: dict[str, _Rows], name: str, first: int, n: int, longest: int) -> list[bytes]:
    """Return the next `n` byte strings, checked for length before they are read."""
    begin = streams[name].position
    ends = [int(end) for end in streams[f"{name}_ends"].take(n)]
    starts = [begin, *ends[:-1]]
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not start <= end <= start + longest:
            raise InvalidInputError(
                f"{end} cannot be the end of what begins at {start}: 0 to {longest} bytes are "
                "allowed",
                field=f"{name}_ends[{first + i}]",
            )
    data = streams[name].take_bytes(ends[-1] - begin)
    return [data[s - begin : e - begin] for s, e in zip(starts, ends, strict=True)]


def _texts(streams: dict[str, _Rows], name: str, first: int, n: int, longest: int) -> list[str]:
    """Return the next `n` texts."""
    if streams[name].dtype.kind == "U":
        column = streams[name].take(n)
        if column.dtype.itemsize:
            letters = column.view(column.dtype.str[0] + "u4").reshape(n, -1)
            wrong = np.flatnonzero((letters > sys.maxunicode).any(axis=1))
            if len(wrong):
                raise InvalidInputError("is no text", field=f"{name}[{first + int(wrong[0])}]")
        return [str(text) for text in column.tolist()]
    found = []
    for i, blob in enumerate(_blobs(streams, name, first, n, longest)):
        try:
            found.append(blob.decode())
        except UnicodeDecodeError:
            raise InvalidInputError("is not UTF-8", field=f"{name}[{first + i}]") from None
    return found


@contextmanager
def _readable() -> Iterator[None]:
    """Say of a damaged zip file that it is one."""
    try:
        yield
    except _DAMAGE as error:
        raise InvalidInputError(f"is no .npz file that can be read: {error}") from None
