"""Whether a query and its options fit a snapshot, whoever asks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.types import MAX_K, Embedding, Rank, SearchOptions
from search_service import margins
from search_service.snapshot import Snapshot


def check_options(snapshot: Snapshot, options: SearchOptions) -> None:
    """Refuse options that are out of range.

    Raises
    ------
    InvalidInputError
        With the field's path in a search request.
    """
    if not 1 <= options.k <= MAX_K:
        raise InvalidInputError(f"k is {options.k}. Ask for 1 to {MAX_K} hits.", field="options.k")
    radius_bits = options.max_hamming_bits
    if radius_bits is not None and not 0 <= radius_bits <= snapshot.n_bits:
        raise InvalidInputError(
            f"max_hamming_bits is {radius_bits}. Codes here have {snapshot.n_bits} bits: give 0 to "
            f"{snapshot.n_bits}, or leave it out.",
            field="options.max_hamming_bits",
        )
    if options.min_pool < 0:
        raise InvalidInputError(
            f"min_pool is {options.min_pool}. Give 0 or more.", field="options.min_pool"
        )
    if options.max_pool is not None and options.max_pool < options.k:
        raise InvalidInputError(
            f"max_pool is {options.max_pool}, less than k. Give at least {options.k}, or leave it "
            "out.",
            field="options.max_pool",
        )
    if options.packed and (options.with_feature or options.with_explanation):
        raise InvalidInputError(
            "Packed hits carry no features and no explanations. Leave one of them out.",
            field="options.packed",
        )
    if options.rank is Rank.EUCLIDEAN and snapshot.dim == 0:
        raise InvalidInputError(
            "The collection has no features to rank by. Ask for rank hamming.", field="options.rank"
        )


def check_query(snapshot: Snapshot, query: Embedding, *, with_feature: bool) -> None:
    """Refuse a query that does not fit a snapshot.

    Raises
    ------
    InvalidInputError
        With the field's path in a search request.
    PreconditionError
        Another model made the query.
    """
    if snapshot.model_id and query.model_id != snapshot.model_id:
        raise PreconditionError(
            f"The query is of model {query.model_id!r}, the collection of {snapshot.model_id!r}. "
            "Encode the query with the collection's model."
        )
    if query.n_bits != snapshot.n_bits:
        raise InvalidInputError(
            f"The code has {query.n_bits} bits, the collection's have {snapshot.n_bits}. Encode "
            "the query with the collection's model.",
            field="query.embedding.code.n_bits",
        )
    if len(query.code) != codes.n_bytes(query.n_bits):
        raise InvalidInputError(
            f"The code is {len(query.code)} bytes long. {query.n_bits} bits take "
            f"{codes.n_bytes(query.n_bits)}.",
            field="query.embedding.code.bits",
        )
    if not codes.padding_is_zero(query.code, query.n_bits):
        raise InvalidInputError(
            "The code's padding bits are set. Set the unused high bits of the last byte to 0.",
            field="query.embedding.code.bits",
        )
    margins.check(query)
    if with_feature:
        _check_feature(snapshot, query.feature)


def _check_feature(snapshot: Snapshot, feature: NDArray[np.generic] | None) -> None:
    if feature is None:
        raise InvalidInputError(
            "The query has no feature to rank by. Send it, or ask for rank hamming.",
            field="query.embedding.feature",
        )
    if feature.dtype not in (np.float32, np.float16):
        raise InvalidInputError(
            f"The feature is {feature.dtype}. Send float32 or float16.",
            field="query.embedding.feature.dtype",
        )
    if feature.shape != (snapshot.dim,):
        raise InvalidInputError(
            f"The feature has shape {list(feature.shape)}. The collection's have [{snapshot.dim}].",
            field="query.embedding.feature.dim",
        )
    if not np.isfinite(feature).all():
        raise InvalidInputError(
            "The feature holds NaN or infinity. Send finite numbers.",
            field="query.embedding.feature.values",
        )
