"""Items by column: what is written in bulk without a message for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import Item

_LAST_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedItems:
    """Items by column: embeddings of one model, without tags and expiry.

    Raises
    ------
    ValueError
        The columns do not fit each other.
    """

    model_id: str
    n_bits: int
    """Code length, in bits."""
    id_bytes: bytes
    """The ids in UTF-8, one after the other."""
    id_ends: NDArray[np.uint32]
    """Where each ends in `id_bytes`, shape ``[n]``."""
    codes: NDArray[np.uint8]
    """Packed codes, shape ``[n, n_bytes(n_bits)]``."""
    features: NDArray[Any] | None = None
    """float32 or float16, shape ``[n, dim]``; None: codes only."""
    payload_bytes: bytes = b""
    """The payloads, one after the other."""
    payload_ends: NDArray[np.uint32] | None = None
    """Where each ends in `payload_bytes`, shape ``[n]``; None: all are empty."""

    def __post_init__(self) -> None:
        n = len(self.id_ends)
        fits = self.codes.shape == (n, codes.n_bytes(self.n_bits))
        fits = fits and (self.features is None or self.features.shape[:1] == (n,))
        fits = fits and (self.payload_ends is None or len(self.payload_ends) == n)
        if not fits:
            raise ValueError("the columns of packed items do not fit each other")

    def __len__(self) -> int:
        return len(self.id_ends)

    @classmethod
    def of(cls, items: Sequence[Item]) -> PackedItems | None:
        """Pack items; None if they cannot be: images, tags, an expiry, or not all of one kind."""
        embeddings = [item.embedding for item in items]
        first = embeddings[0] if embeddings else None
        if first is None or any(item.tags or item.expires_unix_ms for item in items):
            return None
        model_id, n_bits, feature = first.model_id, first.n_bits, first.feature
        code_bytes = codes.n_bytes(n_bits)
        dtype, shape = (None, None) if feature is None else (feature.dtype, feature.shape)
        for one in embeddings:
            if one is None or one.model_id != model_id or one.n_bits != n_bits:
                return None
            if len(one.code) != code_bytes or (one.feature is None) != (feature is None):
                return None
            if one.feature is not None and (one.feature.dtype, one.feature.shape) != (dtype, shape):
                return None
        known = [one for one in embeddings if one is not None]
        try:
            ids = [item.id.encode() for item in items]
        except UnicodeEncodeError:
            return None
        payloads = [item.payload for item in items]
        has_payloads = any(payloads)
        return cls(
            model_id=model_id,
            n_bits=n_bits,
            id_bytes=b"".join(ids),
            id_ends=_ends(ids),
            codes=np.frombuffer(b"".join([one.code for one in known]), dtype=np.uint8).reshape(
                len(items), code_bytes
            ),
            features=None if feature is None else _stacked([one.feature for one in known]),
            payload_bytes=b"".join(payloads),
            payload_ends=_ends(payloads) if has_payloads else None,
        )


def _stacked(features: list[NDArray[Any] | None]) -> NDArray[Any]:
    """Return features of one kind as rows, in bytes that can be sent as they are."""
    rows = [np.ascontiguousarray(feature) for feature in features if feature is not None]
    data = b"".join([row.data for row in rows])
    return np.frombuffer(data, dtype=rows[0].dtype).reshape(len(rows), -1)


def _ends(parts: list[bytes]) -> NDArray[np.uint32]:
    return np.cumsum([len(part) for part in parts]).astype("<u4")
