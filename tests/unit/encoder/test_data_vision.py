"""torchvision's data sets, from roots laid out as torchvision lays them out."""

from __future__ import annotations

import json
import pickle
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from encoder_service.data.config import DataConfig
from encoder_service.data.source import Source, has_split, open_split
from encoder_service.decode import DecodeLimits, decode
from hashlens.errors import InvalidInputError
from tests.support.pictures import picture


def check_serving_sees_the_same(source: Source) -> None:
    for i in range(len(source)):
        shown = source.picture(i)
        assert shown.mode == "RGB"
        assert decode(source.image_bytes(i), DecodeLimits()).tobytes() == shown.tobytes()


# --- many images in one file ---


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with CIFAR-10's files, of 4 images each.

    torchvision reads only files whose checksums it knows: those are exchanged, nothing else.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return md5(data, usedforsecurity=False).hexdigest()

    def batch(first: int) -> dict[str, object]:
        pixels = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [(first + i) % 10 for i in range(4)]}

    names = [f"data_batch_{i}" for i in range(1, 6)]
    train = [[name, write(name, batch(4 * i))] for i, name in enumerate(names)]
    test = [["test_batch", write("test_batch", batch(2))]]
    kinds = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    meta = {"label_names": [*kinds, "truck"]}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    checked = {**datasets.CIFAR10.meta, "md5": write("batches.meta", meta)}
    monkeypatch.setattr(datasets.CIFAR10, "meta", checked)
    return tmp_path


def test_cifar10(cifar: Path) -> None:
    train, test = (
        open_split(DataConfig(data=cifar, dataset="CIFAR-10"), split) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (20, 4)
    assert test.labels.tolist() == [2, 3, 4, 5]
    assert test.labels.dtype == np.int64
    assert [test.classes[label] for label in test.labels] == ["bird", "cat", "deer", "dog"]
    assert "cs.toronto.edu" in test.licence
    assert train.name(13) == "train/000013"
    stored = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]
    got = np.asarray(test.picture(3))
    np.testing.assert_array_equal(got.transpose(2, 0, 1).ravel(), stored[3])
    check_serving_sees_the_same(test)


def test_a_root_is_recognised(cifar: Path) -> None:
    assert open_split(DataConfig(data=cifar), "test").classes[0] == "airplane"
    assert has_split(DataConfig(data=cifar), "test")
    (cifar / "stl10_binary").mkdir()
    with pytest.raises(InvalidInputError, match=r"cifar10, stl10.*--dataset"):
        open_split(DataConfig(data=cifar), "test")


def test_a_damaged_file_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"not what it should be")
    with pytest.raises(InvalidInputError, match=r"not found or corrupted.*--download") as caught:
        open_split(DataConfig(data=tmp_path, dataset="cifar10"), "test")
    assert caught.value.field == "data"
    assert str(tmp_path) in caught.value.message


def test_street_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their labels count 1 to 10, and 10 is the digit 0."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    path = tmp_path / "test_32x32.mat"
    scipy.io.savemat(path, {"X": pixels, "y": np.array([[1], [10], [9], [10], [5]])})
    checksum = md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    known = {**datasets.SVHN.split_list, "test": ["", path.name, checksum]}
    monkeypatch.setattr(datasets.SVHN, "split_list", known)
    source = open_split(DataConfig(data=tmp_path, dataset="svhn"), "test")
    assert [source.classes[label] for label in source.labels] == ["1", "0", "9", "0", "5"]
    np.testing.assert_array_equal(np.asarray(source.picture(2)), pixels[..., 2])
    check_serving_sees_the_same(source)


# --- a file for each image ---


def test_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "images").mkdir()
    lines = []
    for i, (name, label) in enumerate([("Abyssinian_7", 1), ("american_bulldog_2", 2)]):
        picture("red", i).save(base / "images" / f"{name}.jpg")
        lines.append(f"{name} {label} 1 1\n")
    (base / "annotations" / "trainval.txt").write_text("".join(lines))
    for config in (DataConfig(data=tmp_path), DataConfig(data=tmp_path, dataset="OxfordIIITPet")):
        assert "CC BY-SA 4.0" in open_split(config, "train").licence
    source = open_split(DataConfig(data=tmp_path, dataset="pets"), "train")
    assert source.classes == ("Abyssinian", "American Bulldog")
    assert source.labels.tolist() == [0, 1]
    assert source.name(1) == "american_bulldog_2.jpg"
    assert source.image_bytes(1) == (base / "images" / "american_bulldog_2.jpg").read_bytes()
    check_serving_sees_the_same(source)
    with pytest.raises(InvalidInputError, match=r"finds no OxfordIIITPet.*test\.txt"):
        open_split(DataConfig(data=tmp_path), "test")


def test_food101(tmp_path: Path) -> None:
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for i, name in enumerate(("sushi", "pie", "pie")):
        (base / "images" / name).mkdir(parents=True, exist_ok=True)
        picture("blue", i).save(base / "images" / name / f"{i}.jpg")
    listed = {"sushi": ["sushi/0"], "pie": ["pie/1", "pie/2"]}
    (base / "meta" / "test.json").write_text(json.dumps(listed))
    source = open_split(DataConfig(data=tmp_path, dataset="food101"), "test")
    assert source.classes == ("pie", "sushi")
    assert [source.name(i) for i in range(3)] == ["sushi/0.jpg", "pie/1.jpg", "pie/2.jpg"]
    assert source.labels.tolist() == [1, 0, 0]
    (base / "images" / "pie" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    with pytest.raises(InvalidInputError, match=r"pie/1\.jpg: the JPEG image is damaged"):
        source.picture(1)
    config = DataConfig(data=tmp_path, dataset="food101", skip_unreadable=True)
    kept = open_split(config, "test")
    assert [kept.name(i) for i in range(2)] == ["sushi/0.jpg", "pie/2.jpg"]
    assert len(kept.skipped) == 1


def test_voc2007_has_several_labels(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (base / name).mkdir(parents=True)
    found = {"000001": [("dog", 0), ("person", 0), ("dog", 1)], "000002": [("cat", 1)]}
    found["000003"] = [("aeroplane", 0)]
    for i, (name, things) in enumerate(found.items()):
        picture("green", i).save(base / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{kind}</name><difficult>{hard}</difficult></object>"
            for kind, hard in things
        )
        text = f"<annotation>{objects}</annotation>"
        (base / "Annotations" / f"{name}.xml").write_text(text)
    (base / "ImageSets" / "Main" / "test.txt").write_text("\n".join(found) + "\n")
    source = open_split(DataConfig(data=tmp_path), "test")
    assert source.labels.dtype == bool
    assert source.labels.shape == (2, 20)
    # Of the second image nothing but a difficult object is known.
    assert [source.name(i) for i in range(2)] == ["000001.jpg", "000003.jpg"]
    kinds = [{source.classes[c] for c in np.flatnonzero(flags)} for flags in source.labels]
    assert kinds == [{"dog", "person"}, {"aeroplane"}]
    check_serving_sees_the_same(source)
    (base / "Annotations" / "000003.xml").write_text("<annotation>")
    with pytest.raises(InvalidInputError, match=r"000003\.xml: cannot be read"):
        open_split(DataConfig(data=tmp_path), "test")


# --- any other of its classes ---


def test_a_data_set_by_the_name_of_its_class(tmp_path: Path) -> None:
    """Files and labels are kept apart in one, together in the other."""
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    rendered = tmp_path / "rendered-sst2" / "test"
    for i, name in enumerate(("negative", "positive")):
        for folder in (base / "images" / name, rendered / name):
            folder.mkdir(parents=True)
            picture("red", i).save(folder / f"{i}.png")
    (base / "labels" / "test1.txt").write_text("positive/1.png\nnegative/0.png\n")
    for dataset, labels in (("dtd", [1, 0]), ("rendered-sst2", [0, 1])):
        source = open_split(DataConfig(data=tmp_path, dataset=dataset), "test")
        assert source.classes == ("negative", "positive")
        assert source.labels.tolist() == labels
        assert source.name(0) == f"{source.classes[labels[0]]}/{labels[0]}.png"
        assert "authors state the terms" in source.licence
        check_serving_sees_the_same(source)


@pytest.mark.parametrize(
    ("dataset", "wrong"),
    [
        ("cifar11", "'cifar11' is no data set. Use auto, folder, fashion-mnist"),
        ("eurosat", "'eurosat' has no train and test split in torchvision"),
        ("VisionDataset", "has no train and test split"),
        ("place-holder", "is no data set"),
    ],
)
def test_names_that_are_none(tmp_path: Path, dataset: str, wrong: str) -> None:
    with pytest.raises(InvalidInputError, match=wrong) as caught:
        open_split(DataConfig(data=tmp_path, dataset=dataset), "train")
    assert caught.value.field == "dataset"


def test_a_data_set_without_class_labels(tmp_path: Path) -> None:
    """Kitti's targets are boxes."""
    base = tmp_path / "Kitti" / "raw" / "training"
    for name in ("image_2", "label_2"):
        (base / name).mkdir(parents=True)
    for i in range(2):
        picture("red", i).save(base / "image_2" / f"{i}.png")
        (base / "label_2" / f"{i}.txt").write_text("Car 0.0 0 0.0 0 0 1 1 1 1 1 1 1 1 1\n")
    with pytest.raises(InvalidInputError, match="no class label for each image") as caught:
        open_split(DataConfig(data=tmp_path, dataset="kitti"), "train")
    assert caught.value.field == "dataset"


def test_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="say with --data where the files of cifar10 are"):
        open_split(DataConfig(dataset="cifar10"), "train")
    with pytest.raises(InvalidInputError, match="say with --data where to download to"):
        open_split(DataConfig(dataset="cifar10", download=True), "train")
    with pytest.raises(InvalidInputError, match="finds no Flowers102") as caught:
        open_split(DataConfig(dataset="flowers102", data=tmp_path / "none"), "train")
    assert caught.value.field == "data"


@pytest.mark.usefixtures("no_internet")
@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "pets", "voc2007", "fer2013"])
def test_downloads_that_fail(tmp_path: Path, dataset: str) -> None:
    """No internet, and a data set that torchvision does not download."""
    with pytest.raises(InvalidInputError, match=r"^cannot download .*--data") as caught:
        open_split(DataConfig(data=tmp_path, dataset=dataset, download=True), "train")
    assert caught.value.field == "download"
