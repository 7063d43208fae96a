"""Labelled images, ready to train on: decoded, resized and cropped once, as the service does it.

Two kinds of source: a folder of IDX files (Fashion-MNIST and its siblings), and a tree with one
folder of images per class.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from hashlens.errors import InvalidInputError

T = TypeVar("T")

Split = Literal["train", "test"]

OnProgress = Callable[[int, int], None]
"""Called with images done and images in all."""

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

_IDX_PREFIX: dict[Split, str] = {"train": "train", "test": "t10k"}

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class LabelledPixels:
    """A data set in memory."""

    pixels: NDArray[np.uint8]
    """Shape ``[n, s, s, 3]``, resized and cropped, not yet normalised."""
    labels: NDArray[np.int64]
    """Shape ``[n]``, positions in `classes`."""
    classes: tuple[str, ...]
    licence: str = ""
    """Licence and source of the images, if known."""

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, rows: NDArray[np.int64]) -> LabelledPixels:
        """Return the chosen rows, as copies."""
        return LabelledPixels(self.pixels[rows], self.labels[rows], self.classes, self.licence)


def load_split(
    root: Path | None,
    split: Split,
    preprocessing: Preprocessing,
    on_progress: OnProgress = lambda done, total: None,
) -> LabelledPixels:
    """Read a split and bring it to the network's size as serving would.

    Parameters
    ----------
    root
        Folder of IDX files or of ``train/CLASS/*`` and ``test/CLASS/*``; None for where Debian's
        package puts Fashion-MNIST.
    split
        Which part.
    preprocessing
        Decides the size.
    on_progress
        Told how far it is.

    Raises
    ------
    InvalidInputError
        There is no such data; the message says where to get it.
    """
    if root is not None and (root / split).is_dir():
        return _load_tree(root / split, preprocessing, on_progress)
    images, labels = read_fashion_mnist(find_fashion_mnist(root), split)
    pixels = _prepare(
        lambda image: preprocessing.resize_crop(enlarge(image)),
        images,
        len(images),
        preprocessing,
        on_progress,
    )
    return LabelledPixels(
        pixels, labels.astype(np.int64), FASHION_MNIST_CLASSES, FASHION_MNIST_LICENCE
    )


def has_test_split(root: Path | None) -> bool:
    """Tell whether `load_split` would find a test split beside the train split."""
    return root is None or not (root / "train").is_dir() or (root / "test").is_dir()


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
    folder = root or FASHION_MNIST_PATH
    if all(_idx_file(folder, f"{prefix}-images-idx3") for prefix in _IDX_PREFIX.values()):
        return folder
    raise InvalidInputError(
        f"there is no Fashion-MNIST in {folder}, and no train/CLASS/ folders. Install Debian's "
        "package dataset-fashion-mnist; or download the four .gz files that "
        "https://github.com/zalandoresearch/fashion-mnist lists and give their folder with --data; "
        "or, where there is internet, use --download.",
        field="data",
    )


def download_fashion_mnist(root: Path) -> Path:
    """Let torchvision download Fashion-MNIST below `root`; return the folder of the IDX files.

    Raises
    ------
    InvalidInputError
        The internet cannot be reached.
    """
    # Only this path needs torchvision's data sets, which are slow to import.
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise InvalidInputError(
            f"cannot download Fashion-MNIST: {' '.join(str(error).split())}. Install Debian's "
            "package dataset-fashion-mnist, or download it elsewhere and give its folder with "
            "--data.",
            field="download",
        ) from error
    return find_fashion_mnist(root / "FashionMNIST" / "raw")


def read_fashion_mnist(folder: Path, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read a split as it is: images uint8 ``[n, 28, 28]`` and labels uint8 ``[n]``."""
    arrays = []
    for stem in (f"{_IDX_PREFIX[split]}-images-idx3", f"{_IDX_PREFIX[split]}-labels-idx1"):
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
    except (OSError, EOFError) as error:
        raise InvalidInputError(f"{path}: cannot be read: {error}.", field="data") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise InvalidInputError(f"{path}: not an IDX file of unsigned bytes.", field="data")
    n_axes = data[3]
    start = 4 + 4 * n_axes
    shape = struct.unpack(f">{n_axes}I", data[4:start]) if len(data) >= start else ()
    if not shape or len(data) - start != int(np.prod(shape)):
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


def _load_tree(
    folder: Path, preprocessing: Preprocessing, on_progress: OnProgress
) -> LabelledPixels:
    """Read ``folder/CLASS/*``; classes in the order of their names."""
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    ]
    if len(classes) < 2 or not files:
        raise InvalidInputError(
            f"{folder}: needs at least two folders of images, one for each class.", field="data"
        )
    limits = DecodeLimits()

    def prepare(file: tuple[Path, int]) -> NDArray[np.uint8]:
        path, _ = file
        try:
            return preprocessing.resize_crop(decode(path.read_bytes(), limits))
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}: {error.message}", field="data") from error

    pixels = _prepare(prepare, files, len(files), preprocessing, on_progress)
    return LabelledPixels(pixels, np.array([label for _, label in files], np.int64), classes)


def _prepare(
    prepare: Callable[[T], NDArray[np.uint8]],
    images: Iterable[T],
    n: int,
    preprocessing: Preprocessing,
    on_progress: OnProgress,
) -> NDArray[np.uint8]:
    """Bring all images to the network's size, several at a time, in their order."""
    pixels: NDArray[Any] = np.empty((n, preprocessing.crop, preprocessing.crop, 3), np.uint8)
    remaining = iter(images)
    done = 0
    with ThreadPoolExecutor() as pool:
        # By blocks, so that no more than one block of results waits to be stored.
        while block := list(islice(remaining, 500)):
            for prepared in pool.map(prepare, block):
                pixels[done] = prepared
                done += 1
            on_progress(done, n)
    return pixels


def _idx_file(folder: Path, stem: str) -> Path | None:
    candidates = (folder / f"{stem}-ubyte{suffix}" for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)
