"""Rows into a collection through the client, by several callers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens.cli.ingest import pipelined
from hashlens.client import Client
from hashlens.errors import OverloadedError, UnavailableError
from hashlens.types import CollectionSpec, Embedding, Item
from search_service.bench.data import CodeSet, make_features

CHUNK_ITEMS = 4096
"""Items that a caller hands over at once; the client cuts them as it does for everybody."""

CALL_DEADLINE_S = 120.0

_BLOCK_ROWS = 4096
_WRITABLE_S = 600.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to write: codes in memory, features made again whenever they are needed, or kept."""

    codes: CodeSet
    spec: CollectionSpec
    seed: int
    id_digits: int = 9
    """Length of an id, in bytes."""
    kept: NDArray[Any] | None = None
    """Features of the first rows, so that who times writing does not time making them."""

    def keeping(self, n: int) -> Rows:
        """Return the same rows with the features of the first `n` made."""
        return replace(self, kept=self.features(np.arange(n)) if self.spec.dim else None)

    def id_of(self, row: int) -> str:
        """Return a row's id."""
        return f"{row:0{self.id_digits}d}"

    def features(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the features of rows: shape ``[n, dim]``."""
        if self.kept is not None:
            return self.kept[rows]
        classes = self.codes.classes[rows]
        dtype = self.spec.feature_dtype.numpy
        return make_features(classes, self.spec.dim, dtype, seed=self.seed, rows=rows)

    def embeddings(self, first: int, stop: int) -> list[Embedding]:
        """Return what is written of rows."""
        spec = self.spec
        features = self.features(np.arange(first, stop)) if spec.dim else None
        return [
            Embedding(
                code=self.codes.packed[row].tobytes(),
                n_bits=spec.n_bits,
                model_id=spec.model_id,
                feature=None if features is None else features[row - first],
            )
            for row in range(first, stop)
        ]


@dataclass(frozen=True, slots=True)
class Written:
    """How fast rows were written."""

    items: int
    acknowledged_s: float
    searchable_s: float
    """Until a search that asks for the last version would be answered."""


def write(
    client: Client,
    rows: Rows,
    first: int,
    stop: int,
    *,
    callers: int,
    on_written: Callable[[int], None] = lambda n: None,
) -> Written:
    """Write rows ``[first, stop)`` and wait until the service's replica has them.

    Parameters
    ----------
    client
        Of the service that has the collection.
    rows
        What to write.
    first, stop
        Which of them.
    callers
        Upserts in flight.
    on_written
        Called with the rows of each Upsert, in their order.
    """
    name = rows.spec.name

    def chunks() -> Iterator[list[Item]]:
        for lo in range(first, stop, _BLOCK_ROWS):
            embeddings = rows.embeddings(lo, min(lo + _BLOCK_ROWS, stop))
            for at in range(0, len(embeddings), CHUNK_ITEMS):
                yield [
                    Item(rows.id_of(row), embedding)
                    for row, embedding in enumerate(embeddings[at : at + CHUNK_ITEMS], lo + at)
                ]

    began_s = time.monotonic()
    for n in pipelined(lambda chunk: _upsert(client, name, chunk), chunks(), callers):
        on_written(n)
    acknowledged_s = time.monotonic() - began_s
    client.collection(name, deadline_s=CALL_DEADLINE_S)  # Waits for what this client wrote.
    return Written(stop - first, acknowledged_s, time.monotonic() - began_s)


def wait_writable(client: Client, name: str) -> None:
    """Wait until the store has read its own file after a start; searching needs it not.

    Raises
    ------
    UnavailableError
        It takes too long.
    """
    give_up_s = time.monotonic() + _WRITABLE_S
    while not client.collection(name).writable:
        if time.monotonic() > give_up_s:
            raise UnavailableError(f"{name} cannot be written {_WRITABLE_S:g} s after a start")
        time.sleep(0.05)


def _upsert(client: Client, name: str, chunk: list[Item]) -> int:
    for attempt in range(10):
        try:
            written = client.upsert(name, chunk, deadline_s=CALL_DEADLINE_S)
        except OverloadedError as error:
            if attempt == 9:
                raise
            time.sleep(error.retry_after_s)
        else:
            written.raise_for_failures()
            return written.n_written
    raise AssertionError("the last attempt returns or raises")
