"""torchvision's data sets, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoder_service.data.sources import FileSource, PictureSource
from encoder_service.data.types import Split
from hashlens.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class VisionSet:
    """How a data set is asked of torchvision."""

    torchvision: str
    """Name of its class."""
    train: Mapping[str, Any]
    """Arguments for the train split."""
    test: Mapping[str, Any]
    """Arguments for the test split."""
    folder: str = ""
    """What it puts below its root, to know it by; empty if that is no folder of its own."""
    licence: str = ""
    classes: tuple[str, ...] = field(default=())
    """Class names, where torchvision has none."""


_BY_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_BY_NAME: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})

SETS: Mapping[str, VisionSet] = MappingProxyType(
    {
        "cifar10": VisionSet(
            "CIFAR10",
            *_BY_FLAG,
            "cifar-10-batches-py",
            "CIFAR-10 (A. Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), no "
            "licence stated",
        ),
        "cifar100": VisionSet(
            "CIFAR100",
            *_BY_FLAG,
            "cifar-100-python",
            "CIFAR-100 (A. Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), no "
            "licence stated",
        ),
        "svhn": VisionSet(
            "SVHN",
            *_BY_NAME,
            licence="SVHN (Y. Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers), for "
            "non-commercial use only",
            classes=tuple("0123456789"),
        ),
        "stl10": VisionSet(
            "STL10",
            *_BY_NAME,
            "stl10_binary",
            "STL-10 (A. Coates et al. 2011, https://cs.stanford.edu/~acoates/stl10), images of "
            "ImageNet, no licence stated",
        ),
        "flowers102": VisionSet(
            "Flowers102",
            *_BY_NAME,
            "flowers-102",
            "Oxford 102 Flowers (M.-E. Nilsback, A. Zisserman 2008, "
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102), no licence stated",
        ),
        "pets": VisionSet(
            "OxfordIIITPet",
            {"split": "trainval"},
            {"split": "test"},
            "oxford-iiit-pet",
            "Oxford-IIIT Pet (O. M. Parkhi et al. 2012, "
            "https://www.robots.ox.ac.uk/~vgg/data/pets), CC BY-SA 4.0",
        ),
        "food101": VisionSet(
            "Food101",
            *_BY_NAME,
            "food-101",
            "Food-101 (L. Bossard et al. 2014, "
            "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101), images of foodspotting, "
            "for research",
        ),
        "voc2007": VisionSet(
            "VOCDetection",
            {"year": "2007", "image_set": "trainval"},
            {"year": "2007", "image_set": "test"},
            "VOCdevkit",
            "PASCAL VOC 2007 (M. Everingham et al., "
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2007), images under Flickr's terms",
        ),
    }
)
"""By the name that ``--dataset`` takes. Others are found by the name of torchvision's class."""

_FILE_LISTS = ("_image_files", "_images", "images", "_samples", "samples", "imgs")
"""Attributes in which torchvision's classes keep their files, alone or each with its label."""

_LABEL_LISTS = ("targets", "labels", "_labels", "y")
"""Attributes in which they keep their labels."""


def open_vision(
    dataset: str, root: Path | None, split: Split, *, download: bool
) -> FileSource | PictureSource:
    """Open a split of a data set that torchvision reads.

    Parameters
    ----------
    dataset
        A key of `SETS`, or the name of a class of ``torchvision.datasets`` that takes ``root`` and
        ``train`` or ``split``; case, ``-`` and ``_`` do not matter.
    root
        torchvision's root.
    split
        Which part.
    download
        Let torchvision download it into `root` if it is not there.

    Returns
    -------
    FileSource or PictureSource
        The first if it keeps each image in a file of its own: those bytes are what is sent.

    Raises
    ------
    InvalidInputError
        There is no data set of that name, or it is not there, or cannot be downloaded.
    """
    kind = SETS.get(dataset) or _look_up(dataset)
    arguments = kind.train if split == "train" else kind.test
    data = construct(kind.torchvision, dataset, root, arguments, download=download)
    if kind.torchvision == "VOCDetection":
        return _open_voc(data, kind.licence)
    files, labels = _files_of(data)
    if labels is None:
        labels = _labels_of(data)
    classes = kind.classes or _classes_of(data, labels)
    if labels is None or not all(0 <= label < len(classes) for label in np.unique(labels)):
        raise InvalidInputError(
            f"torchvision's {kind.torchvision} has no class label for each image. Put the images "
            "in folders, train/CLASS/ and test/CLASS/, and use --dataset folder.",
            field="dataset",
        )
    if files is not None:
        names, folder = _relative(files)
        return FileSource(folder, names, labels, classes, kind.licence)

    def picture(i: int) -> Image.Image:
        image: Image.Image = data[i][0]
        return image

    return PictureSource(split, picture, labels, classes, kind.licence)


def recognise(root: Path) -> list[str]:
    """Return the names of the data sets whose folders are below `root`."""
    return [name for name, kind in SETS.items() if kind.folder and (root / kind.folder).is_dir()]


def bare(name: str) -> str:
    """Return a data set's name without what users spell differently."""
    return name.lower().replace("-", "").replace("_", "")


def construct(
    torchvision: str,
    dataset: str,
    root: Path | None,
    arguments: Mapping[str, Any],
    *,
    download: bool,
    advice: str = "",
) -> Any:
    """Make torchvision's data set, with its errors turned into advice.

    Parameters
    ----------
    torchvision
        Name of its class.
    dataset
        What the user calls it.
    root
        torchvision's root.
    arguments
        Of the split.
    download
        Whether it may download; what is there is not downloaded again.
    advice
        Where else to get it.

    Raises
    ------
    InvalidInputError
        It is not there, damaged, or cannot be downloaded.
    """
    if root is None:
        what = "to download to" if download else f"the files of {dataset} are"
        raise InvalidInputError(f"say with --data where {what}.", field="data")
    from torchvision import datasets

    keywords = {**arguments, "download": True} if download else dict(arguments)
    try:
        return getattr(datasets, torchvision)(str(root), **keywords)
    except ImportError as error:
        raise InvalidInputError(
            f"torchvision's {torchvision} needs another package: {_one_line(error)}. Install it.",
            field="dataset",
        ) from error
    # A class that cannot download does not know the word: TypeError.
    except (OSError, RuntimeError, ValueError, TypeError, EOFError) as error:
        elsewhere = advice or "Download it on a machine with internet with torchvision"
        if download:
            raise InvalidInputError(
                f"cannot download {torchvision}: {_one_line(error)}. {elsewhere} and give its "
                "folder with --data.",
                field="download",
            ) from error
        raise InvalidInputError(
            f"torchvision finds no {torchvision} in {root}, or a damaged one: "
            f"{_one_line(error)}. {elsewhere} and give its root with --data; or, where there is "
            "internet, use --download.",
            field="data",
        ) from error


def _look_up(dataset: str) -> VisionSet:
    """Return torchvision's class of that name, if it has splits."""
    from torchvision import datasets

    by_name = {bare(name): name for name in datasets.__all__}
    name = by_name.get(bare(dataset))
    if known := [kind for kind in SETS.values() if kind.torchvision == name]:
        return known[0]
    if name is not None:
        parameters = inspect.signature(getattr(datasets, name)).parameters
        if "root" in parameters and "split" in parameters:
            return VisionSet(name, *_BY_NAME, licence=_unknown_licence(name))
        if "root" in parameters and "train" in parameters:
            return VisionSet(name, *_BY_FLAG, licence=_unknown_licence(name))
    from encoder_service.data.idx import SETS as IDX_SETS

    problem = "has no train and test split in torchvision" if name else "is no data set"
    raise InvalidInputError(
        f"{dataset!r} {problem}. Use auto, folder, {', '.join([*IDX_SETS, *SETS])}, or the name of "
        "another class of torchvision.datasets with a train and a test split.",
        field="dataset",
    )


def _unknown_licence(name: str) -> str:
    return f"torchvision's {name}: its authors state the terms"


def _files_of(data: Any) -> tuple[list[Path] | None, NDArray[np.int64] | None]:
    """Return the files, if each image is one, and the labels, if they are kept with them."""
    for attribute in _FILE_LISTS:
        entries = getattr(data, attribute, None)
        if not isinstance(entries, list) or len(entries) != len(data) or not entries:
            continue
        if all(isinstance(entry, str | Path) for entry in entries):
            return [Path(entry) for entry in entries], None
        if all(isinstance(e, tuple) and isinstance(e[0], str | Path) for e in entries):
            labels = np.array([int(entry[1]) for entry in entries], np.int64)
            return [Path(entry[0]) for entry in entries], labels
    return None, None


def _labels_of(data: Any) -> NDArray[np.int64] | None:
    for attribute in _LABEL_LISTS:
        values = getattr(data, attribute, None)
        if values is not None and len(values) == len(data):
            labels = np.asarray(values)
            if labels.ndim == 1 and labels.dtype.kind in "iu":
                return labels.astype(np.int64)
    return None


def _classes_of(data: Any, labels: NDArray[np.int64] | None) -> tuple[str, ...]:
    """Return the data set's class names, or the labels as text."""
    names = getattr(data, "classes", None)
    if not names:
        n_classes = 0 if labels is None or not labels.size else int(labels.max()) + 1
        return tuple(map(str, range(n_classes)))
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _relative(files: list[Path]) -> tuple[list[str], Path]:
    """Return the paths relative to the deepest folder that all are in, and that folder."""
    folder = files[0].parent
    while not all(path.is_relative_to(folder) for path in files):
        folder = folder.parent
    return [path.relative_to(folder).as_posix() for path in files], folder


def _open_voc(data: Any, licence: str) -> FileSource:
    """Label each image with the kinds of objects in it, but those marked as difficult."""
    objects = [_objects_in(Path(path)) for path in data.annotations]
    classes = VOC_CLASSES
    labels = np.array([[name in found for name in classes] for found in objects], bool)
    kept = np.flatnonzero(labels.any(axis=1))
    names, folder = _relative([Path(path) for path in data.images])
    return FileSource(folder, [names[row] for row in kept], labels[kept], classes, licence)


VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""PASCAL VOC's classes, in the order of its documentation."""


def _objects_in(path: Path) -> set[str]:
    try:
        found = ElementTree.parse(path).findall("object")
    except (OSError, ElementTree.ParseError) as error:
        raise InvalidInputError(f"{path}: cannot be read: {error}.", field="data") from error
    return {
        entry.findtext("name", "") for entry in found if entry.findtext("difficult", "0") != "1"
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
