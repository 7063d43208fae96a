"""Hits by column, as `search_service.proto` has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError
from hashlens.packed import PackedHits
from hashlens.v1 import search_service_pb2 as spb


def packed_hits_to_proto(hits: PackedHits, n_bits: int) -> spb.PackedHits:
    """Return the wire form; `n_bits` is the width of the collection's codes."""
    message = spb.PackedHits(
        ids=hits.id_bytes,
        id_ends=_little(hits.id_ends),
        hamming_bits=_little(hits.hamming_bits),
    )
    if hits.distances is not None:
        message.distances = _little(hits.distances)
    if hits.payload_ends is not None:
        message.payloads = hits.payload_bytes
        message.payload_ends = _little(hits.payload_ends)
    if hits.codes is not None:
        message.codes = hits.codes.tobytes()
        message.n_bits = n_bits
    return message


def packed_hits_from_proto(message: spb.PackedHits) -> PackedHits:
    """Return read-only views of the message's bytes.

    Raises
    ------
    InvalidInputError
        The columns do not fit each other.
    """
    has_distances, has_payloads = message.HasField("distances"), message.HasField("payload_ends")
    try:
        hits = PackedHits(
            id_bytes=message.ids,
            id_ends=np.frombuffer(message.id_ends, dtype="<u4"),
            hamming_bits=np.frombuffer(message.hamming_bits, dtype="<u2"),
            distances=np.frombuffer(message.distances, dtype="<f4") if has_distances else None,
            payload_bytes=message.payloads,
            payload_ends=np.frombuffer(message.payload_ends, "<u4") if has_payloads else None,
            codes=_codes_from_proto(message) if message.n_bits else None,
        )
        _check_text(hits)
    except ValueError as error:  # NumPy's for a number cut in two, or ours
        raise InvalidInputError(f"these are no packed hits: {error}", field="packed") from None
    return hits


def _codes_from_proto(message: spb.PackedHits) -> NDArray[np.uint8]:
    shape = len(message.hamming_bits) // 2, codes.n_bytes(message.n_bits)
    return np.frombuffer(message.codes, dtype=np.uint8).reshape(shape)


def _check_text(hits: PackedHits) -> None:
    """Raise ValueError unless each id is UTF-8: all of it is, and none begins inside a letter."""
    text = hits.id_bytes.decode()
    if len(text) != len(hits.id_bytes):
        data = np.frombuffer(hits.id_bytes, dtype=np.uint8)
        starts = hits.id_ends[:-1]
        if bool(((data[starts[starts < len(data)]] & 0xC0) == 0x80).any()):
            raise ValueError("an id ends inside a letter")


def _little(column: NDArray[Any]) -> bytes:
    return column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()
