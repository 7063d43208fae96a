"""A whole Hamming ball, block by block: however large it is, little of it is held at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import Hit
from search_service import coarse
from search_service.cancel import Cancel
from search_service.scan import Scratch
from search_service.snapshot import Snapshot

BLOCK_ROWS = 1 << 20
"""Rows that are scanned at a time: a fraction of a millisecond, after which others get a turn."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The rows of one block that are within the radius."""

    rows: NDArray[np.int64]
    """Of the whole snapshot, ascending, shape ``[n]``."""
    hamming_bits: NDArray[np.uint16]
    """Their distances, shape ``[n]``."""
    histogram: NDArray[np.int64]
    """How many there are at each distance, shape ``[radius_bits + 1]``."""


class BallScanner:
    """Finds the rows within a radius, in one block of rows. Not for two scans at once."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def scan(
        self, snapshot: Snapshot, code: bytes, radius_bits: int, first_row: int, cancel: Cancel
    ) -> Part:
        """Scan the `BLOCK_ROWS` rows from `first_row` on.

        Parameters
        ----------
        snapshot
            What to scan.
        code
            The centre, packed, as long as the snapshot's codes.
        radius_bits
            0 to the snapshot's `n_bits`.
        first_row
            Below the snapshot's `rows`.
        cancel
            Polled before the scan.

        Returns
        -------
        Part
            Without dead rows.

        Raises
        ------
        CancelledError, DeadlineError
            As `cancel` says.
        """
        block = _block(snapshot, first_row)
        query = codes.as_words(np.frombuffer(code, dtype=np.uint8)[np.newaxis])[:, 0]
        pool = coarse.find_pool(
            block,
            query,
            radius_bits=radius_bits,
            n_wanted=0,
            max_rows=None,
            scratch=self._scratch,
            cancel=cancel,
        )
        return Part(pool.rows + first_row, pool.hamming_bits, pool.histogram)


def hits_of(
    snapshot: Snapshot, part: Part, place: slice, *, with_payload: bool, with_code: bool
) -> list[Hit]:
    """Read some rows of a part.

    Parameters
    ----------
    snapshot
        Where they are.
    part
        Of this snapshot.
    place
        Which of the part's rows.
    with_payload, with_code
        What to read beside the id.
    """
    rows = part.rows[place]
    n = rows.shape[0]
    payloads = snapshot.payloads_of(rows) if with_payload else [b""] * n
    packed = [code.tobytes() for code in snapshot.codes_of(rows)] if with_code else [None] * n
    return [
        Hit(id=item_id, hamming_bits=bits, distance=None, payload=payload, code=code)
        for item_id, bits, payload, code in zip(
            snapshot.ids_of(rows), part.hamming_bits[place].tolist(), payloads, packed, strict=True
        )
    ]


def _block(snapshot: Snapshot, first_row: int) -> Snapshot:
    """Return views of some rows, as a snapshot of codes only."""
    rows = slice(first_row, first_row + BLOCK_ROWS)
    dead = None if snapshot.dead is None else snapshot.dead[rows]
    words = tuple(word[rows] for word in snapshot.words)
    n = words[0].shape[0]
    return Snapshot(
        n_bits=snapshot.n_bits,
        dim=0,
        feature_dtype=snapshot.feature_dtype,
        version=snapshot.version,
        rows=n,
        n_alive=n if dead is None else n - int(np.count_nonzero(dead)),
        words=words,
        ids=snapshot.ids,
        dead=dead,
    )
