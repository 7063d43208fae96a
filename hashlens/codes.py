"""The one definition of bit order.

Bit ``i`` of a code is bit ``i % 8`` (least significant first) of byte ``i // 8``. A code of
`n_bits` takes ``ceil(n_bits / 8)`` bytes; the padding bits of the last byte are zero. For scanning,
the bytes are read as little-endian 64-bit words, padded with zero bytes: bit ``i`` is then bit
``i % 64`` of word ``i // 64``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 512
"""The longest code, in bits."""


def n_bytes(n_bits: int) -> int:
    """Return the packed length of an `n_bits` code, in bytes."""
    return -(-n_bits // 8)


def n_words(n_bits: int) -> int:
    """Return how many 64-bit words an `n_bits` code takes."""
    return -(-n_bits // 64)


def pack(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack bits into bytes.

    Parameters
    ----------
    bits
        bool, shape ``[..., n_bits]``.

    Returns
    -------
    ndarray
        uint8, shape ``[..., n_bytes(n_bits)]``, a new array, padding bits zero.
    """
    return np.packbits(np.asarray(bits, dtype=np.bool_), axis=-1, bitorder="little")


def unpack(packed: NDArray[np.uint8], n_bits: int) -> NDArray[np.bool_]:
    """Unpack bytes into bits, the inverse of `pack`.

    Parameters
    ----------
    packed
        uint8, shape ``[..., n_bytes(n_bits)]``.
    n_bits
        Code length, in bits.

    Returns
    -------
    ndarray
        bool, shape ``[..., n_bits]``, a new array.
    """
    return np.unpackbits(packed, axis=-1, count=n_bits, bitorder="little").view(np.bool_)


def as_words(packed: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Rearrange packed codes into one array per 64-bit word, the form that is scanned.

    Parameters
    ----------
    packed
        uint8, shape ``[n, n_bytes]``.

    Returns
    -------
    ndarray
        uint64, shape ``[n_words, n]``, C-contiguous, a new array: word ``j`` of code ``i`` is
        ``[j, i]``.
    """
    n, width = packed.shape
    padded = np.zeros((n, -(-width // 8) * 8), dtype=np.uint8)
    padded[:, :width] = packed
    return np.ascontiguousarray(padded.view("<u8").T).astype(np.uint64, copy=False)


def from_words(words: NDArray[np.uint64], n_bits: int) -> NDArray[np.uint8]:
    """Rearrange words into packed codes, the inverse of `as_words`.

    Parameters
    ----------
    words
        uint64, shape ``[n_words, n]``.
    n_bits
        Code length, in bits.

    Returns
    -------
    ndarray
        uint8, shape ``[n, n_bytes(n_bits)]``, a new array.
    """
    rows = np.ascontiguousarray(words.T).astype("<u8", copy=False)
    width = 8 * words.shape[0]
    return rows.view(np.uint8).reshape(-1, width)[:, : n_bytes(n_bits)].copy()


def padding_is_zero(code: bytes, n_bits: int) -> bool:
    """Tell whether the unused high bits of the last byte are zero."""
    used_bits = n_bits % 8
    return used_bits == 0 or code[-1] >> used_bits == 0
