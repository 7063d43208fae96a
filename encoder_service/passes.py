"""Which numbers of images may share a forward pass, and how a batch is cut into such passes.

The libraries behind a pass choose how to add up by its shape, never by the numbers in it. So two
shapes whose every layer rounds alike on many random numbers do so on all, and who is alone need not
pay for a crowd. See docs/adr/0010.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Traces = Callable[[NDArray[np.float32]], NDArray[np.uint32]]
"""Runs n images in one pass; returns a checksum of each image's part of each layer's output, shape
``[n, n_layers]``. The last layer alone would not do: few of the numbers on the way may differ, and
a maximum or a sigmoid hide those."""

_TRIED = 4
"""Images on which two numbers of threads are compared: thousands of numbers in each layer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How batches are computed."""

    sizes: tuple[int, ...]
    """Images of the passes that are used, ascending."""
    n_threads_alone: int
    """Of a pass that has no others beside it; else each has one."""


def same_bits(one: Traces, other: Traces, size: int, image_shape: tuple[int, ...]) -> bool:
    """Tell whether every layer gives the same bits in two ways of running passes of one size."""
    rng = np.random.default_rng(1)
    parts = [
        rng.standard_normal((size, *image_shape), dtype=np.float32)
        for _ in range(max(1, _TRIED // size))
    ]
    return all(np.array_equal(one(part), other(part)) for part in parts)


def agreeing_sizes(
    traces: Traces, reference: int, sizes: Sequence[int], image_shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the sizes of pass in which every layer gives the same bits as in the reference's.

    Parameters
    ----------
    traces
        The forward pass.
    reference
        The size that decides.
    sizes
        Which to try; the largest is a multiple of all, `reference` included.
    image_shape
        Shape of one image.

    Returns
    -------
    tuple
        Ascending, `reference` among them.
    """
    rng = np.random.default_rng(0)
    images = rng.standard_normal((max(*sizes, reference), *image_shape), dtype=np.float32)

    def of(size: int) -> NDArray[np.uint32]:
        return np.concatenate([traces(part) for part in np.split(images, len(images) // size)])

    wanted = of(reference)
    agreeing = [size for size in sizes if size != reference and np.array_equal(of(size), wanted)]
    return tuple(sorted([reference, *agreeing]))


def cut(n: int, sizes: Sequence[int], n_beside: int = 1) -> list[tuple[slice, int]]:
    """Cut a batch into few passes with little padding.

    Parameters
    ----------
    n
        Images of the batch.
    sizes
        Sizes of pass, ascending, each a multiple of the one before.
    n_beside
        Passes that run side by side: a batch makes so many, if it is large enough.

    Returns
    -------
    list
        Rows of the batch, and the size of the pass that they take, in order; the largest first.
    """
    share = -(-n // n_beside)
    passes = []
    start = 0
    while start < n:
        left = min(n - start, share)
        filled = -(-left // sizes[0]) * sizes[0]
        # A larger pass costs less for an image than several small ones; an eighth of it may be
        # padding.
        fits = [size for size in sizes if size <= filled or 7 * size <= 8 * left]
        size = fits[-1]
        passes.append((slice(start, min(start + size, n)), size))
        start += size
    return passes
