"""Items into NumPy's .npz."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from hashlens.cli.transfer.columns import FORMAT, Columns, Layout

_COPY_BYTES = 2**20


class NpzWriter:
    """Writes a .npz file.

    A zip file takes one member after the other, so the columns wait in unnamed files beside it.

    Parameters
    ----------
    file
        Where it goes, seekable.
    layout
        What all items have.
    folder
        Where there is room for all columns.
    """

    def __init__(self, file: BinaryIO, layout: Layout, folder: Path) -> None:
        self._file = file
        self._layout = layout
        self._folder = folder
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._ends: dict[str, int] = {}
        self._n_items = 0
        self._any_expires = False

    def write(self, columns: Columns) -> None:
        """Append some."""
        self._n_items += len(columns)
        self._spool("codes", columns.codes.tobytes())
        if columns.features is not None:
            self._spool("features", columns.features.tobytes())
        self._blobs("ids", [item_id.encode() for item_id in columns.ids])
        self._blobs("payloads", columns.payloads)
        self._blobs("tags", ["\n".join(tags).encode() for tags in columns.tags])
        expires = np.array(columns.expires_unix_ms, dtype="<u8")
        self._any_expires = self._any_expires or bool(expires.any())
        self._spool("expires_unix_ms", expires.tobytes())

    def finish(self) -> None:
        """Write the zip file."""
        layout, n = self._layout, self._n_items
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            self._array(archive, "format", np.array(FORMAT))
            self._array(archive, "model_id", np.array(layout.model_id))
            self._array(archive, "n_bits", np.array(layout.n_bits, dtype="<i8"))
            self._array(archive, "dim", np.array(layout.dim, dtype="<i8"))
            self._column(archive, "ids", "|u1", (self._ends.get("ids", 0),))
            self._column(archive, "ids_ends", "<u8", (n,))
            self._column(archive, "codes", "|u1", (n, layout.code_bytes))
            if layout.dim:
                dtype = layout.feature_dtype.numpy.str
                self._column(archive, "features", dtype, (n, layout.dim))
            for name in ("payloads", "tags"):
                if self._ends.get(name):
                    self._column(archive, name, "|u1", (self._ends[name],))
                    self._column(archive, f"{name}_ends", "<u8", (n,))
            if self._any_expires:
                self._column(archive, "expires_unix_ms", "<u8", (n,))

    def abandon(self) -> None:
        """Remove the unnamed files."""
        self._stack.close()

    def _blobs(self, name: str, blobs: Sequence[bytes]) -> None:
        begin = self._ends.get(name, 0)
        ends = list(itertools.accumulate(map(len, blobs), initial=begin))[1:]
        self._spool(name, b"".join(blobs))
        self._spool(f"{name}_ends", np.array(ends, dtype="<u8").tobytes())
        self._ends[name] = ends[-1] if ends else begin

    def _spool(self, name: str, data: bytes) -> None:
        if name not in self._spools:
            spool = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - the stack closes it
            self._spools[name] = self._stack.enter_context(spool)
        self._spools[name].write(data)

    def _array(self, archive: zipfile.ZipFile, name: str, array: np.ndarray[Any, Any]) -> None:
        with archive.open(_entry(name), "w") as member:
            np.lib.format.write_array(member, array, allow_pickle=False)

    def _column(
        self, archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]
    ) -> None:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        with archive.open(_entry(name), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            spool = self._spools.get(name)
            if spool is not None:
                spool.seek(0)
                shutil.copyfileobj(spool, member, _COPY_BYTES)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return a member without a date: the same items make the same file."""
    return zipfile.ZipInfo(f"{name}.npy")
