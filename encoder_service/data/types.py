"""What a labelled split is, whatever it is read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "test"]

OnProgress = Callable[[int, int], None]
"""Called with images done and images in all."""


class Source(Protocol):
    """A labelled split, of which nothing is decoded yet. Safe to read from many threads."""

    @property
    def labels(self) -> NDArray[Any]:
        """int64 ``[n]``, positions in `classes`; or bool ``[n, n_classes]``, several each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""

    @property
    def licence(self) -> str:
        """Licence and source of the images; empty if unknown."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """What was left out because it cannot be read: name and reason of each."""

    def __len__(self) -> int: ...

    def image_bytes(self, i: int) -> bytes:
        """Return what a client would send: the file's own bytes, or a lossless PNG."""

    def picture(self, i: int, least_px: int = 0) -> Image.Image:
        """Return the image, mode RGB: exactly what `decode` makes of `image_bytes`."""

    def name(self, i: int) -> str:
        """Return the file's path relative to the split, or ``test/000123``."""


def nobody(done: int, total: int) -> None:
    """Be told of progress, and do nothing."""
