"""The images that the package brings, and how they were made."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from encoder_service.data.idx import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_PATH,
    read_fashion_mnist,
)
from encoder_service.training.bundle import write_bundle
from hashlens.cli.demo_data import load_demo_images
from tests.unit.encoder.conftest import needs_fashion_mnist, write_small_fashion_mnist

BUNDLE = Path(__file__).parents[3] / "hashlens" / "cli" / "data" / "fashion-mnist-test"


def test_bundled_images() -> None:
    images, labels, names = load_demo_images()
    assert (images.shape, images.dtype) == ((5000, 28, 28), np.uint8)
    assert labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    assert names == FASHION_MNIST_CLASSES
    assert len(np.unique(images.reshape(5000, -1), axis=0)) > 4990


def test_bundled_files_are_small_and_say_where_they_are_from() -> None:
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) <= 3_000_000
    assert "Zalando SE" in (BUNDLE / "LICENSE").read_text()
    assert "MIT License" in (BUNDLE / "LICENSE").read_text()
    assert "test split" in (BUNDLE / "README").read_text()


@needs_fashion_mnist
def test_bundled_images_are_of_the_test_split(tmp_path: Path) -> None:
    write_bundle(FASHION_MNIST_PATH, tmp_path)
    for path in tmp_path.iterdir():
        fresh, bundled = path.read_bytes(), (BUNDLE / path.name).read_bytes()
        if path.suffix == ".gz":
            # Libraries compress differently.
            fresh, bundled = gzip.decompress(fresh), gzip.decompress(bundled)
        assert fresh == bundled, path.name


def test_bundle_from_a_small_source(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    write_bundle(tmp_path, tmp_path / "out")
    _, labels = read_fashion_mnist(tmp_path, "test")
    header = gzip.decompress((tmp_path / "out" / "images-idx3-ubyte.gz").read_bytes())[:16]
    assert struct.unpack(">BBBB3I", header) == (0, 0, 8, 3, len(labels), 28, 28)
