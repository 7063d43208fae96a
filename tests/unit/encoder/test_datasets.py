from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from encoder_service.training.bundle import write_bundle
from encoder_service.training.datasets import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_PATH,
    UPSCALE,
    download_fashion_mnist,
    enlarge,
    find_fashion_mnist,
    has_test_split,
    load_split,
    read_fashion_mnist,
    read_idx,
)
from hashlens.cli.demo_data import load_demo_images
from hashlens.errors import InvalidInputError
from tests.unit.encoder.conftest import write_idx, write_small_fashion_mnist

SMALL = Preprocessing(resize=32, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST_PATH.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


@pytest.mark.parametrize("name", ["a", "a.gz"])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
def test_idx_round_trip(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / name, array)
    np.testing.assert_array_equal(read_idx(tmp_path / name), array)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not an IDX"),
        (b"\0\0\x0d\x01\0\0\0\x01x", "not an IDX"),
        (b"\0\0\x08\0", "its length does not fit"),
        (b"\0\0\x08\x03\0\0", "its length does not fit"),
        (b"\0\0\x08\x01\0\0\0\x05abcd", "its length does not fit"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", "its length does not fit"),
    ],
)
def test_broken_idx(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InvalidInputError, match=match):
        read_idx(tmp_path / "a")


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"\0\0\x08\x01\0\0\0\x01x")
    for data in (b"no gzip", whole[:-5], whole[:12] + b"\xff" + whole[13:]):
        (tmp_path / "a.gz").write_bytes(data)
        with pytest.raises(InvalidInputError, match="cannot be read"):
            read_idx(tmp_path / "a.gz")


def test_training_sees_what_serving_sees(tmp_path: Path) -> None:
    """No skew: PNG bytes through decode and preprocess give the cached training pixels."""
    write_small_fashion_mnist(tmp_path)
    data = load_split(tmp_path, "train", SMALL)
    images, labels = read_fashion_mnist(tmp_path, "train")
    np.testing.assert_array_equal(data.labels, labels)
    cached = SMALL.normalise(data.pixels).transpose(0, 3, 1, 2)
    for row in range(0, len(images), 17):
        small = Image.fromarray(images[row])
        big = small.resize((28 * UPSCALE, 28 * UPSCALE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        big.save(buffer, "PNG")
        served = SMALL(decode(buffer.getvalue(), DecodeLimits()))
        np.testing.assert_array_equal(served, cached[row])


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    told: list[tuple[int, int]] = []
    data = load_split(tmp_path, "test", SMALL, lambda *far: told.append(far))
    assert told[-1] == (len(data), len(data))
    assert data.classes == FASHION_MNIST_CLASSES
    assert "MIT" in data.licence


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"dataset-fashion-mnist.*--data.*--download"):
        find_fashion_mnist(tmp_path)
    write_small_fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InvalidInputError, match=r"train-labels-idx1-ubyte\.gz is missing"):
        load_split(tmp_path, "train", SMALL)


def test_labels_of_another_file(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
    with pytest.raises(InvalidInputError, match="do not belong together"):
        load_split(tmp_path, "train", SMALL)


def test_download_without_internet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy that refuses every connection stands for the missing internet.
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(InvalidInputError, match=r"cannot download.*dataset-fashion-mnist"):
        download_fashion_mnist(tmp_path)


def make_tree(root: Path) -> None:
    for split, n in (("train", 6), ("test", 2)):
        for name, colour in (("red", "red"), ("blue", "blue")):
            folder = root / split / name / "deeper"
            folder.mkdir(parents=True)
            for i in range(n):
                kind = ("png", "jpg")[i % 2]
                Image.new("RGB", (40 + i, 50), colour).save(folder / f"{i}.{kind}")
            (folder / "notes.txt").write_text("no image")


def test_image_tree(tmp_path: Path) -> None:
    make_tree(tmp_path)
    data = load_split(tmp_path, "train", SMALL)
    assert data.classes == ("blue", "red")
    assert data.pixels.shape == (12, 32, 32, 3)
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    # Red and blue samples of the middle pixel follow the label.
    middle = data.pixels[:, 16, 16]
    assert ((middle[:, 0] > 200) == (data.labels == 1)).all()
    assert ((middle[:, 2] > 200) == (data.labels == 0)).all()
    assert len(load_split(tmp_path, "test", SMALL)) == 4


def test_broken_image_in_a_tree_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InvalidInputError, match=r"broken\.png: the PNG image is damaged"):
        load_split(tmp_path, "train", SMALL)


def test_tree_with_one_class(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match="at least two folders"):
        load_split(tmp_path, "train", SMALL)


def test_has_test_split(tmp_path: Path) -> None:
    assert has_test_split(None)
    assert has_test_split(tmp_path)
    (tmp_path / "train").mkdir()
    assert not has_test_split(tmp_path)
    (tmp_path / "test").mkdir()
    assert has_test_split(tmp_path)


def test_enlarge() -> None:
    image = np.zeros((28, 28), np.uint8)
    image[14:] = 200
    big = enlarge(image)
    assert (big.mode, big.size) == ("RGB", (112, 112))
    assert big.getpixel((50, 5)) == (0, 0, 0)
    assert big.getpixel((50, 105)) == (200, 200, 200)


# --- the bundled images ---

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


@needs_fashion_mnist
def test_the_whole_data_set_reads() -> None:
    for split, n in (("train", 60_000), ("test", 10_000)):
        images, labels = read_fashion_mnist(FASHION_MNIST_PATH, split)  # type: ignore[arg-type]
        assert images.shape == (n, 28, 28)
        assert np.bincount(labels).tolist() == [n // 10] * 10


def test_bundle_from_a_small_source(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    write_bundle(tmp_path, tmp_path / "out")
    _, labels = read_fashion_mnist(tmp_path, "test")
    header = gzip.decompress((tmp_path / "out" / "images-idx3-ubyte.gz").read_bytes())[:16]
    assert struct.unpack(">BBBB3I", header) == (0, 0, 8, 3, len(labels), 28, 28)
