"""Rows to columns: what hits show, without an object for each of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hashlens.errors import InvalidInputError
from hashlens.packed import PackedHits
from search_service.kernels import texts
from search_service.snapshot import Snapshot, Texts

_MAX_BYTES = 1 << 31
"""Of the ids of one answer, which are short."""


def packed_hits(
    snapshot: Snapshot,
    rows: NDArray[np.int64],
    hamming_bits: NDArray[np.uint16],
    distances: NDArray[np.float32] | None,
    *,
    with_payload: bool,
    with_code: bool,
    max_payload_bytes: int,
) -> PackedHits:
    """Fetch what the hits of an answer show.

    Ids and payloads are copied twice, by a kernel out of the mapped files and into ``bytes``; the
    other columns are the arrays given.

    Parameters
    ----------
    snapshot
        What was searched.
    rows
        Of the hits, best first: int64, shape ``[n]``.
    hamming_bits, distances
        Theirs, same shape. `distances` None: Hamming distance alone ranked.
    with_payload, with_code
        What to fetch beside the ids.
    max_payload_bytes
        Longest payloads together.

    Raises
    ------
    InvalidInputError
        The payloads take more than that.
    """
    id_bytes, id_ends = _taken(snapshot.ids.id_texts(), rows, _MAX_BYTES)
    payload_bytes, payload_ends = b"", None
    if with_payload:
        payloads = snapshot.ids.payload_texts()
        if payloads is None:
            payload_ends = np.zeros(rows.shape[0], dtype=np.uint32)
        else:
            payload_bytes, payload_ends = _taken(payloads, rows, max_payload_bytes)
    return PackedHits(
        id_bytes=id_bytes,
        id_ends=id_ends,
        hamming_bits=hamming_bits,
        distances=distances,
        payload_bytes=payload_bytes,
        payload_ends=payload_ends,
        codes=snapshot.codes_of(rows) if with_code else None,
    )


def _taken(
    column: Texts, rows: NDArray[np.int64], max_bytes: int
) -> tuple[bytes, NDArray[np.uint32]]:
    ends = np.empty(rows.shape[0], dtype=np.uint32)
    n_bytes = texts.measure(column.ends, rows, ends)
    if n_bytes > max_bytes:
        raise InvalidInputError(
            f"The payloads of the hits take {n_bytes} bytes. Ask for fewer hits, or leave payloads "
            "out.",
            field="options.with_payload",
        )
    taken = np.empty(n_bytes, dtype=np.uint8)
    texts.take(column.data, column.ends, rows, taken)
    return taken.tobytes(), ends
