"""Parts of a split: held-out images, chosen classes, chosen rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from encoder_service.data.images import ImageSet
from encoder_service.data.sources import PartOfSource
from encoder_service.data.types import Source
from hashlens.errors import InvalidInputError


def holdout(labels: NDArray[Any], n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose images to keep out of training: at random, of each class its share.

    The same arguments give the same rows on every machine.

    Parameters
    ----------
    labels
        int64 ``[n_images]``; or bool ``[n_images, n_classes]``, of which the choice is simply
        random.
    n
        How many to keep out.
    seed
        Decides which.

    Returns
    -------
    train_rows, holdout_rows
        int64, ascending; together every row once.

    Raises
    ------
    InvalidInputError
        So many cannot be kept out without a class losing its last image.
    """
    n_images = len(labels)
    random = np.random.default_rng(seed)
    groups = np.zeros(n_images, np.int64) if labels.ndim == 2 else labels.astype(np.int64)
    # A row's key is how far down its shuffled class it stands: the smallest keys are of every
    # class its share. The last of each class stays.
    keys = np.empty(n_images)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        keys[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
        keys[members[keys[members].argmax()]] = np.inf
    n_free = int(np.isfinite(keys).sum())
    if not 0 <= n <= n_free:
        raise InvalidInputError(
            f"of {n_images} images, one of each class for training, 0 to {n_free} can be held "
            f"out, not {n}.",
            field="holdout",
        )
    # Classes of one size have the same keys: chance decides between them.
    order = np.lexsort((random.random(n_images), keys))
    return np.sort(order[n:]), np.sort(order[:n])


def take(source: Source, rows: NDArray[np.int64]) -> Source:
    """Return the chosen rows of a source, in the order given; nothing is read."""
    return PartOfSource(source, rows)


@overload
def select_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet: ...


@overload
def select_classes(images: Source, classes: Sequence[str]) -> Source: ...


def select_classes(images: ImageSet | Source, classes: Sequence[str]) -> ImageSet | Source:
    """Return only the images of some classes, with labels that count those classes.

    Of multi-label images those stay that have labels among `classes` and none else: so nothing of
    the other classes is seen.

    Parameters
    ----------
    images
        A source, of which nothing is read, or an image set.
    classes
        Names to keep; the new labels are positions in it.

    Raises
    ------
    InvalidInputError
        A name is unknown or given twice, there are fewer than two, or one has no image.
    """
    if unknown := [name for name in classes if name not in images.classes]:
        raise InvalidInputError(
            f"there is no class {_listed(unknown)}. The classes are {_listed(images.classes)}.",
            field="classes",
        )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise InvalidInputError(
            f"give two classes or more, each once; not {_listed(classes)}.", field="classes"
        )
    columns = np.array([images.classes.index(name) for name in classes], np.int64)
    old = images.labels
    labels: NDArray[Any]
    if old.ndim == 2:
        inside = old[:, columns]
        rows = np.flatnonzero(inside.any(axis=1) & (inside.sum(axis=1) == old.sum(axis=1)))
        labels = inside[rows]
        counts = labels.sum(axis=0)
    else:
        new = np.full(len(images.classes), -1, np.int64)
        new[columns] = np.arange(len(columns))
        rows = np.flatnonzero(new[old] >= 0)
        labels = new[old[rows]]
        counts = np.bincount(labels, minlength=len(columns))
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise InvalidInputError(
            f"no image is left of {_listed(missing)}. Leave out the class, or add images.",
            field="classes",
        )
    if isinstance(images, ImageSet):
        return images.relabelled(rows, labels, classes)
    return PartOfSource(images, rows, labels, classes)


def _listed(names: Sequence[str]) -> str:
    """Name up to 20."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more
