"""The images that a checkpoint's codes are judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from encoder_service.data import folder, table
from encoder_service.data.config import DataConfig
from encoder_service.data.idx import enlarge, recognise
from encoder_service.data.source import has_split, open_split
from encoder_service.data.sources import FileSource, PartOfSource, PictureSource
from encoder_service.data.types import Source, Split
from encoder_service.decode import DecodeLimits
from hashlens.cli.demo_data import load_demo_images
from hashlens.cli.scan import scan
from hashlens.errors import InvalidInputError


def open_pictures(config: DataConfig, split: Split | None) -> tuple[Source, str]:
    """Open the images that a configuration means; labels are not needed.

    Parameters
    ----------
    config
        Which data. Without a folder and a name: the images that come with the package.
    split
        Which part; None for the test split where there is one.

    Returns
    -------
    source
        The images.
    what
        What they are, for people.

    Raises
    ------
    InvalidInputError
        There are none, as `open_split`.
    """
    if config.data is None and config.dataset == "auto":
        return _bundled(), "the Fashion-MNIST test images that come with Hashlens"
    if config.data is not None and config.dataset in ("auto", "folder") and _is_flat(config.data):
        return _flat(config.data), f"the images in {config.data}"
    if split is None:
        split = "test" if has_split(config, "test") else "train"
    where = config.data if config.dataset == "auto" else config.dataset
    return open_split(config, split), f"the {split} split of {where}"


def some_of(source: Source, n: int, random: np.random.Generator) -> Source:
    """Return at most `n` images, drawn without replacement, in the source's order."""
    if len(source) <= n:
        return source
    return PartOfSource(source, np.sort(random.choice(len(source), size=n, replace=False)))


def _bundled() -> Source:
    images, labels, classes = load_demo_images()
    return PictureSource(
        "test", lambda i: enlarge(images[i]), labels.astype(np.int64), classes, "MIT"
    )


def _is_flat(root: Path) -> bool:
    """Tell whether a folder has files alone, and none of those that say what they are."""
    return (
        root.is_dir()
        and not folder.has_folders(root)
        and not recognise(root)
        and not any(table.find_table(root, split) for split in folder.SPLITS)
    )


def _flat(root: Path) -> Source:
    found = scan(root.absolute(), DecodeLimits().max_bytes)
    if not found.files:
        raise InvalidInputError(f"{root}: there are no images in it.", field="data")
    names = [Path(file.path).name for file in found.files]
    return FileSource(root, names, np.zeros(len(names), np.int64), ("no class",))
