"""Find labelled images: a folder of the user's own, or a data set that torchvision knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from encoder_service.data import folder, idx, table, vision
from encoder_service.data.config import DataConfig
from encoder_service.data.sources import without_unreadable
from encoder_service.data.types import OnProgress, Source, Split, nobody
from hashlens.errors import InvalidInputError

__all__ = ["OnProgress", "Source", "Split", "has_split", "open_split"]


def open_split(config: DataConfig, split: Split, on_progress: OnProgress = nobody) -> Source:
    """Open a labelled split; no image is decoded but to see whether it can be.

    A folder of the user's own has one of three shapes:

    * ``train/CLASS/*`` and ``test/CLASS/*``, at any depth below the class;
    * ``CLASS/*``: of each class a fifth is the test split, chosen by a hash of the path, see
      `folder.open_divided_tree`;
    * ``train.csv`` and ``test.csv`` (or ``.tsv``), see `table.open_table`: also for images of
      several classes.

    Parameters
    ----------
    config
        Which data. ``dataset="auto"`` takes what is in ``data``.
    split
        Which part.
    on_progress
        Told how far it is when ``skip_unreadable`` looks through all images.

    Raises
    ------
    InvalidInputError
        The data is not there or not as it should be; the message says where to get it or what to
        mend, `field` is ``data``, ``dataset`` or ``download``.
    """
    with _readable():
        source = _open(config, split)
    if config.skip_unreadable:
        source = without_unreadable(source, on_progress)
    _check(source, config, split)
    return source


def has_split(config: DataConfig, split: Split) -> bool:
    """Tell whether there is such a split to be opened; nothing is downloaded.

    Of a data set that torchvision reads, the files are not looked for: it has both.
    """
    with _readable():
        dataset = _resolve(config)
        if dataset == "folder":
            root = _folder(config.data)
            if any(table.find_table(root, name) for name in folder.SPLITS):
                return table.find_table(root, split) is not None
            return not folder.is_split_tree(root) or (root / split).is_dir()
        if dataset in idx.SETS:
            return config.download or idx.find_idx(dataset, config.data, split) is not None
        return True


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what the file system refuses into an error that says what to mend."""
    try:
        yield
    except OSError as error:
        raise InvalidInputError(
            f"{error.filename}: cannot be read ({error.strerror or error}). Mend its permissions, "
            "or remove it.",
            field="data",
        ) from error


def _open(config: DataConfig, split: Split) -> Source:
    dataset = _resolve(config)
    if dataset == "folder":
        return _open_folder(config, split)
    if dataset in idx.SETS:
        return idx.open_idx(dataset, config.data, split, download=config.download)
    return vision.open_vision(dataset, config.data, split, download=config.download)


def _resolve(config: DataConfig) -> str:
    """Return ``folder``, or the data set's name as the tables of data sets spell it."""
    if config.dataset != "auto":
        known = {vision.bare(name): name for name in ("folder", *idx.SETS, *vision.SETS)}
        return known.get(vision.bare(config.dataset), config.dataset)
    root = config.data
    if root is None:
        return "fashion-mnist"
    if root.is_dir():
        if folder.is_split_tree(root) or any(
            table.find_table(root, name) for name in folder.SPLITS
        ):
            return "folder"
        found = sorted({*idx.recognise(root), *vision.recognise(root)})
        if len(found) > 1:
            raise InvalidInputError(
                f"{root} holds {', '.join(found)}. Say which with --dataset.", field="dataset"
            )
        if found:
            return found[0]
        if folder.has_folders(root):
            return "folder"
    return "fashion-mnist"


def _open_folder(config: DataConfig, split: Split) -> Source:
    root = _folder(config.data)
    if any(table.find_table(root, name) for name in folder.SPLITS):
        return table.open_table(root, split, check_files=not config.skip_unreadable)
    if folder.is_split_tree(root):
        return folder.open_split_tree(root, split)
    return folder.open_divided_tree(root, split)


def _folder(data: Path | None) -> Path:
    if data is None:
        raise InvalidInputError("say with --data where the images are.", field="data")
    if not data.is_dir():
        raise InvalidInputError(
            f"there is no folder {data}. Say with --data where the images are.", field="data"
        )
    return data


def _check(source: Source, config: DataConfig, split: Split) -> None:
    """Refuse what nothing can be learned from, or found in."""
    where = config.data or config.dataset
    if not len(source):
        raise InvalidInputError(f"{where}: the {split} split has no images.", field="data")
    if len(source.classes) < 2:
        raise InvalidInputError(
            f"{where}: there is only one class, {source.classes[0]!r}. To tell images apart takes "
            "two or more: add images of another.",
            field="data",
        )
    for name in source.classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            # Said now, not after a training whose checkpoint then cannot be written.
            raise InvalidInputError(
                f"{where}: the class name {name!r} is not valid UTF-8. Rename it.", field="data"
            ) from error
    if split == "train":
        labels = source.labels
        present = set(np.flatnonzero(labels.any(axis=0)) if labels.ndim == 2 else labels)
        if empty := [name for i, name in enumerate(source.classes) if i not in present]:
            raise InvalidInputError(
                f"{where}: there is no image of {', '.join(map(repr, empty[:20]))} to train on. "
                "Add some, or remove the class.",
                field="data",
            )
