"""MNIST and its siblings, from files as they are published and as torchvision keeps them."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoder_service.data.config import DataConfig
from encoder_service.data.idx import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_PATH,
    UPSCALE,
    enlarge,
    find_fashion_mnist,
    read_fashion_mnist,
    read_idx,
)
from encoder_service.data.images import load_images
from encoder_service.data.source import has_split, open_split
from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from hashlens.errors import InvalidInputError
from tests.unit.encoder.conftest import needs_fashion_mnist, write_idx, write_small_fashion_mnist

SMALL = Preprocessing(resize=32, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


# --- the files ---


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
    for data in (b"no gzip", whole[:-5], whole[:12] + b"\xff" + whole[13:], whole[:10] + b"\xff"):
        (tmp_path / "a.gz").write_bytes(data)
        with pytest.raises(InvalidInputError, match="cannot be read"):
            read_idx(tmp_path / "a.gz")


def test_enlarge() -> None:
    image = np.zeros((28, 28), np.uint8)
    image[14:] = 200
    big = enlarge(image)
    assert (big.mode, big.size) == ("RGB", (112, 112))
    assert big.getpixel((50, 5)) == (0, 0, 0)
    assert big.getpixel((50, 105)) == (200, 200, 200)


# --- Fashion-MNIST ---


def test_training_sees_what_serving_sees(tmp_path: Path) -> None:
    """No skew: PNG bytes through decode and preprocess give the cached training pixels."""
    write_small_fashion_mnist(tmp_path)
    source = open_split(DataConfig(data=tmp_path), "train")
    data = load_images(source, SMALL)
    images, labels = read_fashion_mnist(tmp_path, "train")
    np.testing.assert_array_equal(data.labels, labels)
    cached = SMALL.normalise(data.batch(np.arange(len(data)))).transpose(0, 3, 1, 2)
    for row in range(0, len(images), 17):
        small = Image.fromarray(images[row])
        big = small.resize((28 * UPSCALE, 28 * UPSCALE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        big.save(buffer, "PNG")
        for sent in (buffer.getvalue(), source.image_bytes(row)):
            served = SMALL(decode(sent, DecodeLimits()))
            np.testing.assert_array_equal(served, cached[row])


def test_what_is_known_of_it(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    test = open_split(DataConfig(data=tmp_path), "test")
    assert len(test) == 60
    assert test.classes == FASHION_MNIST_CLASSES
    assert "Zalando SE, MIT" in test.licence
    assert test.name(12) == "test/000012"
    assert test.labels.dtype == np.int64
    assert has_split(DataConfig(data=tmp_path), "test")


def test_no_data(tmp_path: Path) -> None:
    for config in (DataConfig(data=tmp_path), DataConfig(data=tmp_path, dataset="fashion-mnist")):
        with pytest.raises(InvalidInputError, match=r"dataset-fashion-mnist.*--data.*--download"):
            open_split(config, "train")
    with pytest.raises(InvalidInputError, match="dataset-fashion-mnist"):
        find_fashion_mnist(tmp_path)
    write_small_fashion_mnist(tmp_path)
    assert find_fashion_mnist(tmp_path) == tmp_path
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InvalidInputError, match=r"train-labels-idx1-ubyte\.gz is missing"):
        open_split(DataConfig(data=tmp_path), "train")


def test_labels_of_another_file(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
    with pytest.raises(InvalidInputError, match="do not belong together"):
        open_split(DataConfig(data=tmp_path), "train")


@needs_fashion_mnist
def test_the_whole_data_set_reads() -> None:
    for split, n in (("train", 60_000), ("test", 10_000)):
        images, labels = read_fashion_mnist(FASHION_MNIST_PATH, split)  # type: ignore[arg-type]
        assert images.shape == (n, 28, 28)
        assert np.bincount(labels).tolist() == [n // 10] * 10
    assert len(open_split(DataConfig(), "test")) == 10_000


# --- its siblings, and torchvision's folders ---


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST"), ("kmnist", "KMNIST")],
)
def test_the_folders_of_torchvision(tmp_path: Path, dataset: str, folder: str) -> None:
    """Torchvision unpacks the files; what it reads from them is what is read here."""
    from torchvision import datasets

    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    write_small_fashion_mnist(raw, 30, 20, suffix="")
    theirs = getattr(datasets, folder)(str(tmp_path), train=False)
    for config in (
        DataConfig(data=tmp_path),
        DataConfig(data=tmp_path, dataset=dataset),
        DataConfig(data=tmp_path, dataset=folder, download=True),
        DataConfig(data=raw, dataset=dataset),
    ):
        ours = open_split(config, "test")
        assert ours.licence.startswith(folder[:5])
        assert ours.labels.tolist() == theirs.targets.tolist()
        shown = np.asarray(ours.picture(3))
        if dataset == "fashion-mnist":
            np.testing.assert_array_equal(shown, np.asarray(enlarge(theirs.data[3].numpy())))
        else:
            np.testing.assert_array_equal(shown[..., 1], theirs.data[3].numpy())
            assert shown.shape == (28, 28, 3)


def test_letters(tmp_path: Path) -> None:
    """EMNIST counts its letters from 1 and keeps them on their side."""
    prefixes = ("emnist-letters-train", "emnist-letters-test")
    write_small_fashion_mnist(tmp_path, 52, 26, prefixes)
    for prefix, n in zip(prefixes, (52, 26), strict=True):
        labels = (np.arange(n) % 26 + 1).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    images = read_idx(tmp_path / "emnist-letters-test-images-idx3-ubyte.gz")
    source = open_split(DataConfig(data=tmp_path), "test")
    assert source.classes[source.labels[2]] == "c"
    np.testing.assert_array_equal(np.asarray(source.picture(2))[..., 0], images[2].T)


def test_several_data_sets_in_one_root(tmp_path: Path) -> None:
    for folder in ("MNIST", "KMNIST"):
        (tmp_path / folder / "raw").mkdir(parents=True)
        write_small_fashion_mnist(tmp_path / folder / "raw", 30, 20)
    with pytest.raises(InvalidInputError, match=r"kmnist, mnist.*--dataset") as caught:
        open_split(DataConfig(data=tmp_path), "train")
    assert caught.value.field == "dataset"
    assert len(open_split(DataConfig(data=tmp_path, dataset="MNIST"), "train")) == 30


def test_labels_that_the_data_set_does_not_have(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(200, dtype=np.uint8) % 11)
    with pytest.raises(InvalidInputError, match="labels are 0 to 10") as caught:
        open_split(DataConfig(data=tmp_path), "train")
    assert caught.value.field == "dataset"


def test_only_one_split_is_there(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    for path in tmp_path.glob("t10k-*"):
        path.unlink()
    config = DataConfig(data=tmp_path)
    assert len(open_split(config, "train")) == 200
    assert not has_split(config, "test")
    with pytest.raises(InvalidInputError, match="there is no FashionMNIST"):
        open_split(config, "test")
    with pytest.raises(InvalidInputError, match=r"there is no MNIST in \(no --data given\)"):
        open_split(DataConfig(dataset="mnist"), "train")


# --- downloads ---


@pytest.mark.usefixtures("no_internet")
def test_download_without_internet(tmp_path: Path) -> None:
    for config in (
        DataConfig(data=tmp_path, download=True),
        DataConfig(data=tmp_path / "new", dataset="emnist", download=True),
    ):
        with pytest.raises(InvalidInputError, match=r"cannot download.*--data") as caught:
            open_split(config, "train")
        assert caught.value.field == "download"
        assert has_split(config, "test")


def test_download_to_nowhere() -> None:
    with pytest.raises(InvalidInputError, match="say with --data where to download to"):
        open_split(DataConfig(dataset="mnist", download=True), "train")


@pytest.mark.usefixtures("no_internet")
def test_what_is_there_is_not_downloaded(tmp_path: Path) -> None:
    write_small_fashion_mnist(tmp_path)
    assert len(open_split(DataConfig(data=tmp_path, download=True), "train")) == 200
