"""The two kinds of source: files, and arrays in memory."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoder_service.data.types import OnProgress, Source, Split, nobody
from encoder_service.decode import DecodeLimits, decode
from hashlens.cpus import usable_cpus
from hashlens.errors import InvalidInputError

BLOCK = 500
"""Images between two reports of progress."""

_LIMITS = DecodeLimits()

_ADVICE = " Or leave out such files with --skip-unreadable."


class FileSource:
    """Images that are files of their own.

    Parameters
    ----------
    root
        Folder that the names are relative to.
    names
        Path of each file relative to `root`, with ``/``.
    labels
        int64 ``[n]`` or bool ``[n, n_classes]``.
    classes
        Class names.
    licence
        Licence and source, if known.
    """

    skipped: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: NDArray[Any],
        classes: Sequence[str],
        licence: str = "",
    ) -> None:
        self._root = root
        self._names = names
        self.labels = labels
        self.classes = tuple(classes)
        self.licence = licence

    def __len__(self) -> int:
        return len(self._names)

    def image_bytes(self, i: int) -> bytes:
        """Return the file's bytes; InvalidInputError if it cannot be read."""
        path = self._root / self._names[i]
        try:
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= _LIMITS.max_bytes:
                return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidInputError(
                f"{path}: cannot be read ({reason}). Mend or remove it.{_ADVICE}", field="data"
            ) from error
        # Not even opened: a pipe would be waited for, and a device has no end.
        problem = (
            f"has {status.st_size:,} bytes, the limit is {_LIMITS.max_bytes:,}"
            if stat.S_ISREG(status.st_mode)
            else "is no regular file"
        )
        raise InvalidInputError(f"{path}: {problem}. Mend or remove it.{_ADVICE}", field="data")

    def picture(self, i: int, least_px: int = 0) -> Image.Image:
        """Decode the file; InvalidInputError, with its name, if it is no whole image."""
        data = self.image_bytes(i)
        try:
            return decode(data, _LIMITS, least_px)
        except InvalidInputError as error:
            raise InvalidInputError(
                f"{self._root / self._names[i]}: {error.message}{_ADVICE}", field="data"
            ) from error

    def name(self, i: int) -> str:
        """Return the file's path relative to the split."""
        return self._names[i]


class PictureSource:
    """Images of a data set that keeps many in one file.

    Parameters
    ----------
    split
        Goes into the names.
    picture
        Returns an image by its position, of any mode; safe to call from many threads.
    labels
        int64 ``[n]`` or bool ``[n, n_classes]``.
    classes
        Class names.
    licence
        Licence and source.
    """

    skipped: tuple[str, ...] = ()

    def __init__(
        self,
        split: Split,
        picture: Callable[[int], Image.Image],
        labels: NDArray[Any],
        classes: Sequence[str],
        licence: str,
    ) -> None:
        self._split = split
        self._picture = picture
        self.labels = labels
        self.classes = tuple(classes)
        self.licence = licence

    def __len__(self) -> int:
        return len(self.labels)

    def image_bytes(self, i: int) -> bytes:
        """Return the image as PNG, which loses nothing."""
        buffer = io.BytesIO()
        # These images are tiny, and the bytes go to this machine's service: speed over size.
        self.picture(i).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def picture(self, i: int, least_px: int = 0) -> Image.Image:
        """Return the image, mode RGB."""
        return self._picture(i).convert("RGB")

    def name(self, i: int) -> str:
        """Return ``split/position``."""
        return f"{self._split}/{i:06d}"


class PartOfSource:
    """Some rows of a source, perhaps with other labels.

    Parameters
    ----------
    whole
        The source.
    rows
        Which, in which order; int64 ``[n]``.
    labels, classes
        Take the place of the source's own; None for those.
    skipped
        Is added to what the source has skipped.
    """

    def __init__(
        self,
        whole: Source,
        rows: NDArray[np.int64],
        labels: NDArray[Any] | None = None,
        classes: Sequence[str] | None = None,
        skipped: tuple[str, ...] = (),
    ) -> None:
        self._whole = whole
        self._rows = rows
        self.labels: NDArray[Any] = whole.labels[rows] if labels is None else labels
        self.classes = whole.classes if classes is None else tuple(classes)
        self.licence = whole.licence
        self.skipped = (*whole.skipped, *skipped)

    def __len__(self) -> int:
        return len(self._rows)

    def image_bytes(self, i: int) -> bytes:
        """Return what a client would send."""
        return self._whole.image_bytes(int(self._rows[i]))

    def picture(self, i: int, least_px: int = 0) -> Image.Image:
        """Return the image, mode RGB."""
        return self._whole.picture(int(self._rows[i]), least_px)

    def name(self, i: int) -> str:
        """Return its name in the whole."""
        return self._whole.name(int(self._rows[i]))


def without_unreadable(source: Source, on_progress: OnProgress = nobody) -> Source:
    """Decode every image once and leave out those that are none.

    Parameters
    ----------
    source
        What to look through.
    on_progress
        Told how far it is.

    Returns
    -------
    Source
        With `Source.skipped` saying what is gone and why.
    """

    def problem(i: int) -> str:
        try:
            source.picture(i)
        except InvalidInputError as error:
            return error.message.removesuffix(_ADVICE)
        return ""

    problems: list[str] = []
    remaining = iter(range(len(source)))
    with ThreadPoolExecutor(usable_cpus()) as pool:
        while block := list(islice(remaining, BLOCK)):
            problems.extend(pool.map(problem, block))
            on_progress(len(problems), len(source))
    kept = np.array([i for i, text in enumerate(problems) if not text], np.int64)
    if len(kept) == len(source):
        return source
    return PartOfSource(source, kept, skipped=tuple(filter(None, problems)))
