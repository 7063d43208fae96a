"""Soft codes: how sure the query was of each bit, used to order rows of equal Hamming distance.

A bit of the query whose H lies near 0.5 may as well have been the other; one near 0 or 1 hardly.
So of two rows that differ from the query in as many bits, that one is nearer which differs in the
less sure ones. Weighted distances of this kind are known as asymmetric, because only the query's
side is not rounded to bits: Gordo, Perronnin, Gong, Lazebnik, "Asymmetric Distances for Binary
Embeddings", PAMI 2014.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError
from hashlens.types import Embedding, Rank, SearchOptions
from search_service.cancel import Cancel
from search_service.kernels import asymmetric, hamming
from search_service.snapshot import Snapshot

_BLOCK_ROWS = 1 << 20
"""Rows between two looks at the cancel flag, a few milliseconds."""

_NO_WORDS = np.empty(0, dtype=np.uint64)


def bit_weights(activations: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return what each bit weighs in the asymmetric distance.

    That is ``2 * 255 * |H - 0.5|``, computed in float64 and rounded to the nearest integer, halves
    to even: integers, so that sums are exact and the same everywhere. Only how sure a bit is
    counts. What it is, the code says: activations that contradict it change no bit, and weigh as
    much as those that agree.

    Parameters
    ----------
    activations
        H of the query, in 0..1: shape ``[n_bits]``.

    Returns
    -------
    ndarray
        uint8, shape ``[n_bits]``.
    """
    sure = np.abs(activations.astype(np.float64) - 0.5)
    weights: NDArray[np.uint8] = np.rint(510 * sure).astype(np.uint8)
    return weights


def weights_of(query: Embedding, options: SearchOptions) -> NDArray[np.uint8] | None:
    """Return the bits' weights; None if the query came without H or they are to be ignored."""
    if query.activations is None or options.ignore_margins:
        return None
    return bit_weights(query.activations)


def are_wanted(options: SearchOptions, dim: int) -> bool:
    """Tell whether an answer may depend on the query's margins.

    Parameters
    ----------
    options
        What is asked for.
    dim
        Width of the collection's features; 0 if there are none.
    """
    by_hamming = options.rank is Rank.HAMMING or (options.rank is Rank.AUTO and dim == 0)
    return not options.ignore_margins and (by_hamming or options.max_pool is not None)


def check(query: Embedding) -> None:
    """Raise InvalidInputError unless the query's activations, if any, are one in 0..1 per bit."""
    activations = query.activations
    if activations is None:
        return
    if activations.shape != (query.n_bits,):
        raise InvalidInputError(
            f"The activations have shape {list(activations.shape)}. Send one for each of the "
            f"{query.n_bits} bits, or none.",
            field="query.embedding.activations",
        )
    if not bool(np.all((activations >= 0) & (activations <= 1))):
        raise InvalidInputError(
            "Activations lie in 0..1. Send the sigmoid's outputs.",
            field="query.embedding.activations",
        )


def distances_to(
    snapshot: Snapshot,
    rows: NDArray[np.int64],
    query: NDArray[np.uint64],
    weights: NDArray[np.uint8],
    cancel: Cancel,
) -> NDArray[np.uint32]:
    """Compute the asymmetric distance of a query to each of `rows`.

    Parameters
    ----------
    snapshot
        Where the codes are.
    rows
        int64, shape ``[n]``.
    query
        The code as 64-bit words: uint64, shape ``[n_words]``.
    weights
        Of `bit_weights`, shape ``[n_bits]``.
    cancel
        Polled between blocks.

    Returns
    -------
    ndarray
        uint32, shape ``[n]``: the sum of the weights of the bits that differ.

    Raises
    ------
    CancelledError, DeadlineError
        As `cancel` says.
    """
    n_words = len(snapshot.words)
    words = snapshot.words + (_NO_WORDS,) * (hamming.MAX_WORDS - n_words)
    by_word = np.zeros(64 * codes.n_words(snapshot.n_bits), dtype=np.uint8)
    by_word[: snapshot.n_bits] = weights
    distances = np.empty(rows.shape[0], dtype=np.uint32)
    for lo in range(0, rows.shape[0], _BLOCK_ROWS):
        cancel.check()
        part = slice(lo, lo + _BLOCK_ROWS)
        asymmetric.distances(words, n_words, query, by_word, rows[part], distances[part])
    return distances
