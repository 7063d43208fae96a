"""The claim's data: room for it, its rows, and putting its pages out of memory."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.cli.demo_data import load_demo_images
from hashlens.client import Client
from hashlens.errors import LimitError, PreconditionError
from hashlens.types import CollectionSpec
from search_service.bench import load

_SLACK = 1.3
"""Room allocated ahead, and what the file system keeps for itself."""

_LOG_BYTES = 3 << 30
"""The store's own file: its log within the budget, twice while it is rewritten."""

_ROW_BYTES = 160
"""Of a row beside code and feature: its records here, its bucket and log entry in the store."""


def needed_bytes(*specs: CollectionSpec) -> int:
    """Return how much disk collections of their expected rows take while they are built."""
    rows_bytes = sum(
        spec.expected_rows
        * (spec.dim * spec.feature_dtype.n_bytes + codes.n_bytes(spec.n_bits) + _ROW_BYTES)
        for spec in specs
    )
    # A small log never reaches its budget.
    return int(rows_bytes * _SLACK) + min(_LOG_BYTES, 2 * rows_bytes)


def check_room(folder: Path, *specs: CollectionSpec) -> None:
    """Raise LimitError now rather than a full disk in the middle."""
    needed, free = needed_bytes(*specs), shutil.disk_usage(folder).free
    if needed > free:
        raise LimitError(
            f"this needs {needed / 1e9:.1f} GB of disk, and {folder} has {free / 1e9:.1f} GB free: "
            "give --data another disk, or ask for fewer --rows or a smaller --dim"
        )


def build(client: Client, rows: load.Rows, callers: int) -> load.Written | None:
    """Fill a collection, unless an earlier run has filled it.

    Returns
    -------
    Written or None
        None where all rows were there.

    Raises
    ------
    PreconditionError
        Something else is in it.
    """
    spec = rows.spec
    n = spec.expected_rows
    client.create_collection(spec.name, spec=spec)
    found = client.collection(spec.name)
    if found.n_items == n and found.n_dead_rows == 0:
        return None
    if found.version:
        raise PreconditionError(
            f"the folder has {found.n_items} rows of {spec.name}, which another run left: give "
            "--data another folder"
        )
    return load.write(client, rows, 0, n, callers=callers)


def drop_pages(data_dir: Path) -> int:
    """Put the pages of all features out of memory; return how many bytes they are.

    Only what no process has mapped goes, so the search service must not run. How much is read from
    disk afterwards says whether it worked.
    """
    total = 0
    if not hasattr(os, "posix_fadvise"):
        return total
    for path in sorted((data_dir / "collections").glob("*/features-*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    return total


def pictures(n: int) -> list[bytes]:
    """Return bundled pictures, enlarged eight times, as PNG."""
    pixels, _, _ = load_demo_images()
    chosen = pixels[np.linspace(0, len(pixels) - 1, n).astype(np.int64)]
    return [_png(np.repeat(np.repeat(picture, 8, axis=0), 8, axis=1)) for picture in chosen]


def _png(grey: NDArray[np.uint8]) -> bytes:
    height, width = grey.shape
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), grey], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(lines.tobytes())),
            (b"IEND", b""),
        )
    )
