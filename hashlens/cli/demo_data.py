"""The images that come with the package: 5 000 of the Fashion-MNIST test split."""

from __future__ import annotations

import gzip
from importlib import resources

import numpy as np
from numpy.typing import NDArray

_IMAGES = "images-idx3-ubyte.gz"
_LABELS = "labels-idx1-ubyte.gz"
_CLASSES = "classes.txt"


def load_demo_images() -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[str, ...]]:
    """Read the bundled images.

    Returns
    -------
    images
        uint8, shape ``[5000, 28, 28]``, grey, garments bright on black; read-only.
    labels
        uint8, shape ``[5000]``, positions in the class names; read-only.
    class_names
        The ten kinds of garment.

    Notes
    -----
    Source and licence stand beside the files. They are the first 500 test images of each class,
    in the data set's order; no training has seen them.
    """
    folder = resources.files("hashlens.cli") / "data" / "fashion-mnist-test"
    # IDX: a header of four bytes and four more for each axis, then the bytes themselves.
    images = np.frombuffer(gzip.decompress((folder / _IMAGES).read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / _LABELS).read_bytes()), np.uint8, offset=8)
    names = tuple((folder / _CLASSES).read_text("utf-8").splitlines())
    return images.reshape(len(labels), 28, 28), labels, names
