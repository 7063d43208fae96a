"""How much of the query's certainty each row contradicts: the weights of the bits that differ.

Hamming distance counts the differing bits; the asymmetric distance adds up what each weighs. It is
a sum of small integers, so neither order nor machine changes it.

The weights of all 256 patterns of a byte are added up once; then a row costs one look-up per byte,
however many bits differ. One thread is enough: few rows are asked for, and starting others would
take longer.
"""

from __future__ import annotations

import numpy as np
from numba import types

from search_service.kernels.compile import (
    I64_IN,
    INT64,
    U8_IN,
    U32_OUT,
    U64_IN,
    VOID,
    helper,
    kernel,
)
from search_service.kernels.hamming import MAX_WORDS


@helper
def _sums_by_byte(weights):  # type: ignore[no-untyped-def]
    n_bytes = weights.shape[0] // 8
    sums = np.zeros((n_bytes, 256), dtype=np.uint16)  # 8 * 255 at most
    for byte in range(n_bytes):
        for bit in range(8):
            weight = weights[8 * byte + bit]
            for pattern in range(1 << bit):
                sums[byte, pattern + (1 << bit)] = sums[byte, pattern] + weight
    return sums


@kernel(VOID(types.UniTuple(U64_IN, MAX_WORDS), INT64, U64_IN, U8_IN, I64_IN, U32_OUT))
def distances(words, n_words, query, weights, rows, out):  # type: ignore[no-untyped-def]
    """Add up, for each of `rows`, the weights of the bits where it differs from a query.

    Parameters
    ----------
    words
        Codes by 64-bit word: eight uint64 arrays, shape ``[n]``; those after `n_words` are not
        read.
    n_words
        Words per code.
    query
        uint64, shape ``[n_words]``.
    weights
        uint8, one for each bit, shape ``[64 * n_words]``; padding bits do not differ, so theirs
        add nothing.
    rows
        int64, shape ``[m]``, each below ``n``.
    out
        Written: uint32, shape ``[m]``.
    """
    sums = _sums_by_byte(weights)
    out[:] = 0
    for j in range(n_words):
        column = words[j]
        word = query[j]
        sums_of_word = sums[8 * j : 8 * j + 8]
        for i in range(rows.shape[0]):
            differing = column[rows[i]] ^ word
            total = np.uint32(0)
            for byte in range(8):
                pattern = (differing >> np.uint64(8 * byte)) & np.uint64(0xFF)
                total += np.uint32(sums_of_word[byte, pattern])
            out[i] += total
