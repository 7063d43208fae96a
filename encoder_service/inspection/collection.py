"""The codes of a collection, read over the wire."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hashlens import Client, codes
from hashlens.types import CollectionInfo, Embedding

_LEAST_S = 60.0
_ROWS_PER_S = 5000
"""Far below what was seen; only bounds the reading."""


class Reservoir:
    """Keeps a uniform sample of the rows that pass by, however many they are.

    Parameters
    ----------
    n_rows
        Size of the sample.
    width
        Bytes of a row.
    random
        Draws.
    """

    def __init__(self, n_rows: int, width: int, random: np.random.Generator) -> None:
        self._n_rows = n_rows
        self._random = random
        self._rows = [np.empty((0, width), dtype=np.uint8)]
        self._tickets = [np.empty(0)]
        self._n_held = 0

    def add(self, rows: NDArray[np.uint8]) -> None:
        """Let rows pass by: uint8, shape ``[n, width]``."""
        self._rows.append(rows)
        self._tickets.append(self._random.random((rows.shape[0],)))
        self._n_held += rows.shape[0]
        if self._n_held > 2 * self._n_rows:
            self._shrink()

    def sample(self) -> NDArray[np.uint8]:
        """Return the sample, in the order in which its rows came by."""
        self._shrink()
        return self._rows[0]

    def _shrink(self) -> None:
        """Keep the rows with the lowest tickets: each set of rows is as likely as any other."""
        rows, tickets = np.concatenate(self._rows), np.concatenate(self._tickets)
        if tickets.shape[0] > self._n_rows:
            kept = np.sort(np.argpartition(tickets, self._n_rows)[: self._n_rows])
            rows, tickets = rows[kept], tickets[kept]
        self._rows, self._tickets, self._n_held = [rows], [tickets], rows.shape[0]


def read_codes(
    client: Client,
    info: CollectionInfo,
    *,
    max_rows: int,
    random: np.random.Generator,
    on_progress: Callable[[int], None] = lambda n: None,
) -> tuple[NDArray[np.uint8], int]:
    """Read a collection's codes: all of them, or a sample.

    Parameters
    ----------
    client
        Speaks to the search service.
    info
        The collection.
    max_rows
        Of more, so many are drawn.
    random
        Draws them.
    on_progress
        Told of rows as they come.

    Returns
    -------
    packed
        uint8, shape ``[n, n_bytes]``, `n` at most `max_rows`.
    n_items
        How many the collection holds.

    Raises
    ------
    HashlensError
        As `Client.stream_ball`.
    """
    spec = info.spec
    width = codes.n_bytes(spec.n_bits)
    kept = Reservoir(max_rows, width, random)
    n_items = 0
    # A ball as wide as the code is everything, whatever its centre.
    parts = client.stream_ball(
        spec.name,
        embedding=Embedding(code=bytes(width), n_bits=spec.n_bits, model_id=spec.model_id),
        radius_bits=spec.n_bits,
        with_payload=False,
        with_code=True,
        deadline_s=_LEAST_S + info.n_items / _ROWS_PER_S,
    )
    for part in parts:
        packed = b"".join(hit.code for hit in part.hits if hit.code is not None)
        kept.add(np.frombuffer(packed, dtype=np.uint8).reshape(-1, width))
        n_items += len(part.hits)
        on_progress(len(part.hits))
    return kept.sample(), n_items
