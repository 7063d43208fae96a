"""How many threads a kernel is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba

_BYTES_PER_THREAD = 1 << 20
"""Read by a kernel for each thread that it uses: waking one for less costs more than it saves, and
where the cores are busy, waiting for it costs much more."""


@contextmanager
def threads_for(n_bytes: int) -> Iterator[None]:
    """Let kernels use as many threads as it takes to read so much, up to as many as they have."""
    most = numba.get_num_threads()
    n_threads = min(most, 1 + n_bytes // _BYTES_PER_THREAD)
    if n_threads == most:
        yield
        return
    numba.set_num_threads(n_threads)
    try:
        yield
    finally:
        numba.set_num_threads(most)
