"""Pixels of a split, as serving would see them: from memory if they fit, else decoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder_service.data.sources import BLOCK
from encoder_service.data.types import OnProgress, Source, nobody
from encoder_service.preprocess import Preprocessing
from hashlens.cpus import usable_cpus

Fetch = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Rows of the whole split -> pixels ``[m, side, side, 3]``, a new array."""


class ImageSet:
    """Labelled pixels. Cheap to take parts of: those share the pixels.

    Parameters
    ----------
    fetch
        Returns the pixels of rows of the whole split.
    rows
        Which rows of it this set has, int64 ``[n]``.
    labels
        int64 ``[n]``, positions in `classes`; or bool ``[n, n_classes]``, several for each image.
    classes
        Class names.
    side
        Of the images, in pixels.
    licence
        Licence and source of the images, if known.
    """

    def __init__(
        self,
        fetch: Fetch,
        rows: NDArray[np.int64],
        labels: NDArray[Any],
        classes: Sequence[str],
        side: int,
        licence: str = "",
    ) -> None:
        self._fetch = fetch
        self._rows = rows
        self.labels = labels
        self.classes = tuple(classes)
        self.side = side
        self.licence = licence

    @classmethod
    def from_pixels(
        cls,
        pixels: NDArray[np.uint8],
        labels: NDArray[Any],
        classes: Sequence[str],
        licence: str = "",
    ) -> ImageSet:
        """Make a set of images in memory, uint8 ``[n, side, side, 3]``; they are not copied."""
        rows = np.arange(len(pixels))
        return cls(pixels.__getitem__, rows, labels, classes, pixels.shape[1], licence)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def multi_label(self) -> bool:
        """Whether an image may be of several classes."""
        return self.labels.ndim == 2

    def batch(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images; safe to call from many threads.

        Parameters
        ----------
        rows
            Positions in this set, int64 ``[m]``.

        Returns
        -------
        ndarray
            uint8, shape ``[m, side, side, 3]``, resized and cropped, not normalised; a new array.

        Raises
        ------
        InvalidInputError
            An image that is decoded on demand cannot be; the message names the file.
        """
        return self._fetch(self._rows[rows])

    def take(self, rows: NDArray[np.int64]) -> ImageSet:
        """Return the chosen rows, in the order given."""
        return self.relabelled(rows, self.labels[rows], self.classes)

    def relabelled(
        self, rows: NDArray[np.int64], labels: NDArray[Any], classes: Sequence[str]
    ) -> ImageSet:
        """Return the chosen rows with other labels, those of `classes`."""
        return ImageSet(self._fetch, self._rows[rows], labels, classes, self.side, self.licence)


def load_images(
    source: Source,
    preprocessing: Preprocessing,
    *,
    side: int | None = None,
    max_cache_bytes: int = 4 << 30,
    on_progress: OnProgress = nobody,
) -> ImageSet:
    """Bring a split to the network's size, by the code that serving uses.

    Parameters
    ----------
    source
        What to read.
    preprocessing
        Decides size, shape and interpolation.
    side
        None for ``preprocessing.crop``: what serving sees. ``preprocessing.resize`` for the square
        before the crop, of which training cuts its own: the centre of it is what serving sees, but
        for rounding, where resize - crop is even.
    max_cache_bytes
        If the pixels take no more, they are decoded now and kept; otherwise `ImageSet.batch`
        decodes them, with the same result.
    on_progress
        Told how far it is; not called when nothing is decoded yet.

    Raises
    ------
    InvalidInputError
        An image cannot be decoded; the message names the file.
    """
    square = preprocessing if side is None else replace(preprocessing, crop=side)
    side = square.crop
    n = len(source)

    def prepare(row: int) -> NDArray[np.uint8]:
        return square.resize_crop(source.picture(row, square.least_px))

    # Pillow lets go of the interpreter while it decodes, so threads do.
    pool = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="decode")

    def fetch(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        pixels = np.empty((len(rows), side, side, 3), np.uint8)
        for position, image in enumerate(pool.map(prepare, rows.tolist())):
            pixels[position] = image
        return pixels

    every = np.arange(n)
    if n * side * side * 3 > max_cache_bytes:
        return ImageSet(fetch, every, source.labels, source.classes, side, source.licence)
    pixels = np.empty((n, side, side, 3), np.uint8)
    with pool:
        # By blocks, so that no more than one block of results waits to be stored.
        for start in range(0, n, BLOCK):
            block = every[start : start + BLOCK]
            pixels[start : start + BLOCK] = fetch(block)
            on_progress(start + len(block), n)
    return ImageSet.from_pixels(pixels, source.labels, source.classes, source.licence)
