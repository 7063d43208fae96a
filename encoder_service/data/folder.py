"""A tree of the user's own: one folder for each class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from encoder_service.data.sources import FileSource
from encoder_service.data.types import Split
from hashlens.cli.scan import EXTENSIONS
from hashlens.errors import InvalidInputError

SPLITS: tuple[Split, Split] = ("train", "test")

TEST_PART = 5
"""Of a tree without splits, one image in so many is a test image."""


def is_split_tree(root: Path) -> bool:
    """Tell whether the folder has ``train`` or ``test`` below it."""
    return any((root / split).is_dir() for split in SPLITS)


def has_folders(root: Path) -> bool:
    """Tell whether there is any folder below that is not hidden."""
    return bool(_folders(root))


def open_split_tree(root: Path, split: Split) -> FileSource:
    """Open ``root/split/CLASS/*``.

    The classes are the train split's folders, in the order of their names; without a train split,
    the test split's own. The test split need not have images of all.

    Raises
    ------
    InvalidInputError
        The split is not there, a class folder is empty, or the test split has a class that the
        train split lacks.
    """
    folder = root / split
    if not folder.is_dir():
        raise InvalidInputError(
            f"there is no folder {folder}. Put the images there, a folder for each class.",
            field="data",
        )
    by_split = {name: _folders(root / name) for name in SPLITS if (root / name).is_dir()}
    classes = by_split.get("train", by_split.get("test", []))
    if strange := sorted(set(by_split.get("test", [])) - set(classes)):
        raise InvalidInputError(
            f"{root / 'test'} has {_listed(strange)}, which {root / 'train'} lacks: train and test "
            f"are to have the same classes. Train has {_listed(classes)}. Rename or remove a "
            "folder.",
            field="data",
        )
    names, labels = _list_images(folder, by_split[split], classes)
    return FileSource(folder, names, labels, classes)


def open_divided_tree(root: Path, split: Split) -> FileSource:
    """Open the train or the test part of ``root/CLASS/*``.

    Of each class, a fifth is the test part, rounded, and at least one image of two: those whose
    path relative to `root` (NFC, UTF-8, with ``/``) has the least BLAKE2b hash of 8 bytes. So the
    parts are the same on every machine, whatever the order of listing.

    Raises
    ------
    InvalidInputError
        There are no class folders, or one is empty.
    """
    classes = _folders(root)
    if not classes:
        raise InvalidInputError(
            f"{root} has no train/CLASS/ folders, no CLASS/ folders and no train.csv: there are no "
            "labelled images.",
            field="data",
        )
    names, labels = _list_images(root, classes, classes)
    hashes = np.array([_hash(name) for name in names], np.uint64)
    is_test = np.zeros(len(names), bool)
    for label in range(len(classes)):
        rows = np.flatnonzero(labels == label)
        n_test = max(round(len(rows) / TEST_PART), int(len(rows) > 1))
        is_test[rows[np.argsort(hashes[rows], kind="stable")[:n_test]]] = True
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    return FileSource(root, [names[row] for row in rows], labels[rows], classes)


def _folders(root: Path) -> list[str]:
    """Return the names of the folders below, sorted, without hidden ones."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")


def _list_images(
    folder: Path, present: Sequence[str], classes: Sequence[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """Return the images of the class folders that are `present`, sorted, and their labels."""
    names: list[str] = []
    labels: list[int] = []
    for name in present:
        found = sorted(_images_below(folder, name))
        if not found:
            raise InvalidInputError(
                f"{folder / name}: this class folder holds no images ({', '.join(_SHOWN)}). Put "
                "some there, or remove the folder. A data set that torchvision reads is named with "
                "--dataset.",
                field="data",
            )
        names += found
        labels += [classes.index(name)] * len(found)
    return names, np.array(labels, np.int64)


_SHOWN = (".jpg", ".png", ".webp", ".gif", ".bmp", ".tif")


def _images_below(folder: Path, name: str) -> list[str]:
    """Return paths relative to `folder`; what a leading dot hides is left out."""
    found = []
    for directory, inner, files in os.walk(folder / name, onerror=_stop):
        inner[:] = [entry for entry in inner if entry[0] != "."]
        relative = Path(directory).relative_to(folder)
        found += [
            (relative / entry).as_posix()
            for entry in files
            if entry[0] != "." and os.path.splitext(entry)[1].lower() in EXTENSIONS  # noqa: PTH122
        ]
    return found


def _stop(error: OSError) -> NoReturn:
    """Let `os.walk` not pass over a folder that it cannot list."""
    raise error


def _hash(name: str) -> int:
    text = unicodedata.normalize("NFC", name)
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more
