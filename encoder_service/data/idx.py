"""Data sets in IDX files: MNIST and its siblings. Read here, as torchvision's copy or as it is."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoder_service.data.sources import PictureSource
from encoder_service.data.types import Split
from hashlens.errors import InvalidInputError

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Class names in label order, from the data set's own documentation."""

FASHION_MNIST_LICENCE = (
    "Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist), (c) 2017 Zalando SE, MIT"
)

FASHION_MNIST_PATH = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

UPSCALE = 4
"""Fashion-MNIST's 28 x 28 images reach the service enlarged by this, bicubic: so they do here."""

_MAX_AXES = 3
"""Of images; labels have one."""


@dataclass(frozen=True, slots=True)
class IdxSet:
    """A data set of small grey images."""

    torchvision: str
    """Name of torchvision's class, and of the folder below its root."""
    classes: tuple[str, ...]
    licence: str
    advice: str
    """Where to get it without torchvision."""
    prefixes: tuple[str, str] = ("train", "t10k")
    """How the names of the files of train and test begin."""
    options: tuple[tuple[str, str], ...] = ()
    """Further arguments of torchvision's class."""
    first_label: int = 0
    """Label of the first class."""
    enlarged: bool = False
    """Whether images are enlarged by `UPSCALE`."""
    transposed: bool = False
    """Whether rows are columns."""


SETS: Mapping[str, IdxSet] = MappingProxyType(
    {
        "fashion-mnist": IdxSet(
            "FashionMNIST",
            FASHION_MNIST_CLASSES,
            FASHION_MNIST_LICENCE,
            "Install Debian's package dataset-fashion-mnist; or download the four .gz files that "
            "https://github.com/zalandoresearch/fashion-mnist lists",
            enlarged=True,
        ),
        "mnist": IdxSet(
            "MNIST",
            tuple("0123456789"),
            "MNIST (Y. LeCun, C. Cortes, C. Burges, http://yann.lecun.com/exdb/mnist), "
            "CC BY-SA 3.0",
            "Get train-images-idx3-ubyte.gz and its three siblings",
        ),
        "kmnist": IdxSet(
            "KMNIST",
            ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
            "KMNIST (https://github.com/rois-codh/kmnist), CC BY-SA 4.0",
            "Get the four .gz files that https://github.com/rois-codh/kmnist lists",
        ),
        "emnist": IdxSet(
            "EMNIST",
            tuple(ascii_lowercase),
            "EMNIST Letters (G. Cohen et al. 2017, from NIST Special Database 19), no licence "
            "stated",
            "Get emnist-letters-train-images-idx3-ubyte.gz and its three siblings",
            prefixes=("emnist-letters-train", "emnist-letters-test"),
            options=(("split", "letters"),),
            first_label=1,
            transposed=True,
        ),
    }
)
"""By the name that ``--dataset`` takes. Of EMNIST, its 26 letters in either case."""


def open_idx(dataset: str, root: Path | None, split: Split, *, download: bool) -> PictureSource:
    """Open a split of one of `SETS`.

    Parameters
    ----------
    dataset
        A key of `SETS`.
    root
        Folder of the IDX files, gzipped or not, or the root that torchvision puts them below;
        None for where Debian's package puts Fashion-MNIST.
    split
        Which part.
    download
        Let torchvision download it into `root` if it is not there.

    Raises
    ------
    InvalidInputError
        There is no such data; the message says where to get it.
    """
    kind = SETS[dataset]
    folder = find_idx(dataset, root, split)
    if folder is None and download:
        folder = _download(dataset, root, split)
    if folder is None:
        raise _nothing_there(dataset, root)
    images, labels = _read_pair(folder, kind, split)
    positions = labels.astype(np.int64) - kind.first_label
    if positions.size and not 0 <= positions.min() <= positions.max() < len(kind.classes):
        raise InvalidInputError(
            f"{folder}: its labels are {labels.min()} to {labels.max()}, which are not those of "
            f"{dataset}. Say with --dataset what it is.",
            field="dataset",
        )

    def picture(i: int) -> Image.Image:
        image = images[i].T if kind.transposed else images[i]
        return enlarge(image) if kind.enlarged else Image.fromarray(image)

    return PictureSource(split, picture, positions, kind.classes, kind.licence)


def find_idx(dataset: str, root: Path | None, split: Split) -> Path | None:
    """Return the folder that holds the images of a split, or None."""
    kind = SETS[dataset]
    stem = f"{_prefix(kind, split)}-images-idx3"
    return next((f for f in _places(dataset, root) if _idx_file(f, stem)), None)


def recognise(root: Path) -> list[str]:
    """Return the names of the data sets in torchvision's folders below `root`.

    Files in `root` itself are taken for Fashion-MNIST, as MNIST's have the same names; EMNIST's
    have not.
    """
    found = [
        name
        for name, kind in SETS.items()
        if (root / kind.torchvision / "raw").is_dir()
        and any(find_idx(name, root / kind.torchvision / "raw", split) for split in _SPLITS)
    ]
    if not found:
        found = [
            name
            for name in ("fashion-mnist", "emnist")
            if any(find_idx(name, root, split) == root for split in _SPLITS)
        ]
    return found


def find_fashion_mnist(root: Path | None = None) -> Path:
    """Return the folder that holds the Fashion-MNIST files.

    Parameters
    ----------
    root
        Where to look; None for where Debian's package puts them.

    Raises
    ------
    InvalidInputError
        They are not there; the message says where to get them.
    """
    folders = {find_idx("fashion-mnist", root, split) for split in _SPLITS}
    if len(folders) == 1 and (folder := folders.pop()) is not None:
        return folder
    raise _nothing_there("fashion-mnist", root)


def read_fashion_mnist(folder: Path, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read a split as it is: images uint8 ``[n, 28, 28]`` and labels uint8 ``[n]``."""
    return _read_pair(folder, SETS["fashion-mnist"], split)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Returns
    -------
    ndarray
        uint8, with the shape the file states; read-only.

    Raises
    ------
    InvalidInputError
        The file is no such thing, or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(f"{path}: cannot be read: {error}.", field="data") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise InvalidInputError(f"{path}: not an IDX file of unsigned bytes.", field="data")
    n_axes = data[3]
    start = 4 + 4 * n_axes
    shape = struct.unpack(f">{n_axes}I", data[4:start]) if len(data) >= start else ()
    if not 1 <= n_axes <= _MAX_AXES or len(data) - start != math.prod(shape):
        raise InvalidInputError(
            f"{path}: its header says {list(shape)}, which its length does not fit.", field="data"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def enlarge(image: NDArray[np.uint8]) -> Image.Image:
    """Enlarge a small grey image as the demo does before it sends it.

    Parameters
    ----------
    image
        uint8, shape ``[h, w]``.

    Returns
    -------
    Image
        Mode RGB, `UPSCALE` times as wide and high.
    """
    grey = Image.fromarray(image)
    size = (grey.width * UPSCALE, grey.height * UPSCALE)
    return grey.resize(size, Image.Resampling.BICUBIC).convert("RGB")


_SPLITS: tuple[Split, Split] = ("train", "test")


def _places(dataset: str, root: Path | None) -> Iterator[Path]:
    """Yield where the files may be, the likelier first."""
    if root is None:
        if dataset == "fashion-mnist":
            yield FASHION_MNIST_PATH
        return
    below = SETS[dataset].torchvision
    yield from (root / below / "raw", root / below, root)


def _prefix(kind: IdxSet, split: Split) -> str:
    return kind.prefixes[_SPLITS.index(split)]


def _read_pair(
    folder: Path, kind: IdxSet, split: Split
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    arrays = []
    for what in ("images-idx3", "labels-idx1"):
        stem = f"{_prefix(kind, split)}-{what}"
        path = _idx_file(folder, stem)
        if path is None:
            raise InvalidInputError(f"{folder}: {stem}-ubyte.gz is missing.", field="data")
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise InvalidInputError(
            f"{folder}: images {images.shape} and labels {labels.shape} do not belong together.",
            field="data",
        )
    return images, labels


def _idx_file(folder: Path, stem: str) -> Path | None:
    candidates = (folder / f"{stem}-ubyte{suffix}" for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _download(dataset: str, root: Path | None, split: Split) -> Path | None:
    # Only a download needs torchvision's data sets, which are slow to import.
    from encoder_service.data.vision import construct

    kind = SETS[dataset]
    arguments: dict[str, Any] = {**dict(kind.options), "train": split == "train"}
    construct(kind.torchvision, dataset, root, arguments, download=True, advice=kind.advice)
    return find_idx(dataset, root, split)


def _nothing_there(dataset: str, root: Path | None) -> InvalidInputError:
    where = root or (FASHION_MNIST_PATH if dataset == "fashion-mnist" else "(no --data given)")
    also = ", and no train/CLASS/ folders" if dataset == "fashion-mnist" and root else ""
    return InvalidInputError(
        f"there is no {SETS[dataset].torchvision} in {where}{also}. {SETS[dataset].advice} and "
        "give their folder with --data; or, where there is internet, use --download.",
        field="data",
    )
