"""What the parts of a scan have found, put together."""

from __future__ import annotations

from search_service.kernels.compile import (
    I64_IN_3D,
    I64_OUT,
    I64_OUT_2D,
    INT64,
    U16_IN_3D,
    U16_OUT,
    VOID,
    kernel,
)
from search_service.kernels.hamming import CEILING, N_STORED, NEAREST_MISSED, NEVER


@kernel(VOID(I64_IN_3D, I64_IN_3D, I64_OUT_2D, I64_OUT_2D))
def settle(states, counts, balls, summary):  # type: ignore[no-untyped-def]
    """Add up what the parts of a scan found.

    Parameters
    ----------
    states, counts
        As `search_service.kernels.hamming.scan` wrote them.
    balls
        Written: int64, shape ``[n_queries, n_bits + 1]``, rows within each radius; complete up to
        the query's lowest ceiling.
    summary
        Written: int64, shape ``[n_queries, 2]``: the lowest ceiling, and the distance of the
        nearest row that found no room, `NEVER` if all did.
    """
    for q in range(states.shape[1]):
        summary[q, 0] = summary[q, 1] = NEVER
        for part in range(states.shape[0]):
            summary[q, 0] = min(summary[q, 0], states[part, q, CEILING])
            summary[q, 1] = min(summary[q, 1], states[part, q, NEAREST_MISSED])
        within = 0
        for distance in range(counts.shape[2]):
            for part in range(counts.shape[0]):
                within += counts[part, q, distance]
            balls[q, distance] = within


@kernel(INT64(I64_IN_3D, I64_IN_3D, U16_IN_3D, INT64, INT64, I64_OUT, U16_OUT))
def gather(states, rows, row_bits, query, radius_bits, out_rows, out_bits):  # type: ignore[no-untyped-def]
    """Put the parts' lists of one query together, without what is beyond a radius.

    Parameters
    ----------
    states, rows, row_bits
        As `search_service.kernels.hamming.scan` wrote them.
    query
        Which one.
    radius_bits
        Largest distance that is kept.
    out_rows, out_bits
        Written: int64 and uint16, with room for all of them, in row order.

    Returns
    -------
    int
        How many there are.
    """
    n = 0
    for part in range(states.shape[0]):
        listed, distances = rows[part, query], row_bits[part, query]
        for i in range(states[part, query, N_STORED]):
            if distances[i] <= radius_bits:
                out_rows[n] = listed[i]
                out_bits[n] = distances[i]
                n += 1
    return n
