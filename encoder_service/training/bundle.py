"""Make the bundled demo images: ``python -m encoder_service.training.bundle``.

The first 500 images of each class of the Fashion-MNIST *test* split, in the data set's order. The
same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from encoder_service.data.idx import (
    FASHION_MNIST_CLASSES,
    find_fashion_mnist,
    read_fashion_mnist,
)

PER_CLASS = 500

_README = f"""\
{PER_CLASS * len(FASHION_MNIST_CLASSES)} images of the Fashion-MNIST test split: the first \
{PER_CLASS} of each class, in the data set's order.
Source: https://github.com/zalandoresearch/fashion-mnist, (c) 2017 Zalando SE, MIT licence, see
LICENSE. Made by `python -m encoder_service.training.bundle`. Format: IDX, gzipped.
"""


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the Fashion-MNIST files; without: where Debian's package puts them.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("hashlens/cli/data/fashion-mnist-test"),
    show_default=True,
)
def main(data: Path | None, output: Path) -> None:
    """Write the bundled images."""
    write_bundle(find_fashion_mnist(data), output)


def write_bundle(source: Path, output: Path) -> None:
    """Write images, labels, class names and the note on their source.

    Parameters
    ----------
    source
        Folder of the whole data set.
    output
        Folder to write to; made if it is missing.
    """
    images, labels = read_fashion_mnist(source, "test")
    rows = np.sort(
        np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in np.unique(labels)])
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "images-idx3-ubyte.gz").write_bytes(_idx(images[rows]))
    (output / "labels-idx1-ubyte.gz").write_bytes(_idx(labels[rows]))
    (output / "classes.txt").write_text("\n".join(FASHION_MNIST_CLASSES) + "\n", "utf-8")
    (output / "README").write_text(_README, "utf-8")


def _idx(array: NDArray[np.uint8]) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    # No time stamp: the same images give the same file.
    return gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0)


if __name__ == "__main__":
    main()
