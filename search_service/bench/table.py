"""A table of features for `hashlens bench fine`, in the files and mappings of the store."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.bench import data
from search_service.sketch import Sketch, row_bytes
from search_service.snapshot import Snapshot, read_only
from search_service.storage import layout
from search_service.storage.arrays import Arrays

_MIN_QUERIES, _MAX_QUERIES = 5, 250
_SPREAD_BYTES = 1 << 28
"""Of all pools together in a sketch, the smallest form: more than caches hold, so that no pool is
found in one from the time before."""

_N_BITS = 64
_BLOCK_ROWS = 4096
_SEGMENT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """What to draw."""

    rows: int
    dim: int
    pool: int
    """Rows of a query's pool, of its own class as far as that goes."""
    seed: int

    @property
    def n_queries(self) -> int:
        """How many queries there are."""
        wanted = -(-_SPREAD_BYTES // (self.pool * row_bytes(self.dim)))
        return min(max(wanted, _MIN_QUERIES), _MAX_QUERIES)


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A query and its pool."""

    feature: NDArray[np.float32]
    rows: NDArray[np.int64]
    """The pool, ascending."""
    bits: NDArray[np.uint16]
    """Hamming distances: zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table on disk, mapped, with a sketch of all its rows."""

    snapshot: Snapshot
    files: dict[Path, NDArray[Any]]
    """What of `snapshot` is in which file."""
    queries: list[Query]
    sketch: Sketch

    @property
    def row_bytes(self) -> int:
        """What a feature takes in its file."""
        return self.snapshot.dim * self.snapshot.feature_dtype.numpy.itemsize


@contextmanager
def made(shape: Shape, dtype: FeatureDtype, folder: Path | None) -> Iterator[Table]:
    """Write a table, map it, and remove it in the end.

    Parameters
    ----------
    shape
        What to draw.
    dtype
        How features are stored.
    folder
        Where it lies meanwhile; None for the system's temporary folder.

    Raises
    ------
    PreconditionError
        There is no room for it.
    """
    folder = Path(tempfile.mkdtemp(prefix="hashlens-bench-", dir=folder))
    try:
        yield _written(shape, dtype, folder)
    finally:
        shutil.rmtree(folder)


def _written(shape: Shape, dtype: FeatureDtype, folder: Path) -> Table:
    spec = CollectionSpec("bench", "bench", _N_BITS, shape.dim, dtype)
    needed = shape.rows * layout.feature_bytes(spec)
    if shutil.disk_usage(folder).free < 1.1 * needed:
        raise PreconditionError(
            f"{folder.parent} has no room for {needed / 1e9:.1f} GB. Give fewer --rows or --dir."
        )
    drawn = data.make_codes(
        "trained", shape.rows, _N_BITS, n_queries=shape.n_queries, seed=shape.seed
    )
    arrays = Arrays.create(
        folder,
        spec,
        generation=0,
        rows_per_segment=layout.rows_per_segment(spec, _SEGMENT_BYTES),
    )
    try:
        for lo in range(0, shape.rows, _BLOCK_ROWS):
            part = slice(lo, lo + _BLOCK_ROWS)
            features = data.make_features(
                drawn.classes[part], shape.dim, dtype.numpy, seed=shape.seed, first_row=lo
            )
            arrays.append(
                packed=drawn.packed[part],
                records=np.zeros(len(features), dtype=layout.ROW),
                ids=b"",
                payloads=b"",
                tags=b"",
                features=features.tobytes(),
                deaths=np.zeros(0, dtype=layout.DEATH),
            )
        for file in arrays.state()[1]:
            file.sync()  # what is not on disk cannot leave memory
        names = [
            layout.features_file(0, segment, dtype) for segment in range(len(arrays.features()))
        ]
        snapshot = Snapshot.from_arrays(drawn.packed, n_bits=_N_BITS)
        snapshot = replace(
            snapshot,
            dim=shape.dim,
            feature_dtype=dtype,
            features=tuple(read_only(segment) for segment in arrays.features()),
            rows_per_segment=arrays.rows_per_segment,
        )
    finally:
        arrays.close()
    sketch = Sketch(shape.dim)
    while (larger := sketch.extended(snapshot, max_bytes=1 << 40)) is not sketch:
        sketch = larger
    files = {folder / name: part for name, part in zip(names, snapshot.features, strict=True)}
    return Table(snapshot, files, _queries(shape, drawn), sketch)


def _queries(shape: Shape, drawn: data.CodeSet) -> list[Query]:
    """Draw queries beside rows of the table; a pool is of its query's class as far as that goes."""
    rng = np.random.default_rng(shape.seed)
    labels = rng.integers(0, data.N_CLASSES, shape.n_queries).astype(np.uint8)
    features = data.make_features(
        labels, shape.dim, np.dtype(np.float32), seed=shape.seed, first_row=shape.rows
    )
    queries = []
    for label, feature in zip(labels.tolist(), features, strict=True):
        order = rng.permutation(shape.rows)
        own = drawn.classes[order] == label
        pool = np.concatenate([order[own], order[~own]])[: shape.pool]
        rows = np.sort(pool).astype(np.int64)
        bits = np.zeros(len(rows), dtype=np.uint16)
        queries.append(Query(feature, rows, bits))
    return queries
