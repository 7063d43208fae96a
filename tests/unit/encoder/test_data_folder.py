"""Images of the user's own: trees and tables, and what is said when they are not as they should."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from encoder_service.data.config import DataConfig
from encoder_service.data.source import Source, Split, has_split, open_split
from encoder_service.decode import DecodeLimits, decode
from hashlens.errors import InvalidInputError
from tests.support.pictures import make_tree, make_undivided_tree, picture


def opened(root: Path, split: Split = "train", **settings: object) -> Source:
    return open_split(DataConfig(data=root, **settings), split)  # type: ignore[arg-type]


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def refused(root: Path, split: Split = "train", **settings: object) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        opened(root, split, **settings)
    return caught.value


# --- trees ---


def test_a_tree_with_splits(tmp_path: Path) -> None:
    make_tree(tmp_path)
    train = opened(tmp_path)
    assert train.classes == ("blue", "red")
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    assert train.labels.dtype == np.int64
    assert names(train)[:2] == ["blue/deeper/0.png", "blue/deeper/1.jpg"]
    assert len(opened(tmp_path, "test")) == 4
    assert opened(tmp_path, dataset="folder").classes == train.classes
    for i in range(len(train)):
        data = train.image_bytes(i)
        assert data == (tmp_path / "train" / train.name(i)).read_bytes()
        shown = train.picture(i)
        assert shown.mode == "RGB"
        assert shown.tobytes() == decode(data, DecodeLimits()).tobytes()
        red, _, blue = shown.getpixel((5, 5))  # type: ignore[misc]
        assert (red > blue) == (train.labels[i] == 1)


def test_which_splits_there_are(tmp_path: Path) -> None:
    (tmp_path / "train" / "red").mkdir(parents=True)
    config = DataConfig(data=tmp_path)
    assert has_split(config, "train")
    assert not has_split(config, "test")
    assert refused(tmp_path, "test").message.startswith(f"there is no folder {tmp_path / 'test'}")
    (tmp_path / "test").mkdir()
    assert has_split(config, "test")


def test_the_test_split_may_lack_a_class_but_has_none_of_its_own(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for path in (tmp_path / "test" / "blue" / "deeper").iterdir():
        path.unlink()
    (tmp_path / "test" / "blue" / "deeper").rmdir()
    (tmp_path / "test" / "blue").rmdir()
    test = opened(tmp_path, "test")
    assert test.classes == ("blue", "red")
    assert test.labels.tolist() == [1, 1]
    (tmp_path / "test" / "Blue").mkdir()
    for split in ("train", "test"):
        error = refused(tmp_path, split)  # type: ignore[arg-type]
        assert "'Blue'" in error.message
        assert "same classes" in error.message
        assert error.field == "data"


def test_a_tree_without_splits_is_divided(tmp_path: Path) -> None:
    counts = {"red": 25, "blue": 3, "green": 2}
    make_undivided_tree(tmp_path, counts)
    parts = {split: opened(tmp_path, split) for split in ("train", "test")}  # type: ignore[arg-type]
    assert np.bincount(parts["test"].labels).tolist() == [1, 1, 5]
    assert np.bincount(parts["train"].labels).tolist() == [2, 1, 20]
    assert not set(names(parts["train"])) & set(names(parts["test"]))
    assert len(parts["train"]) + len(parts["test"]) == sum(counts.values())
    assert has_split(DataConfig(data=tmp_path), "test")
    # The hash is fixed: another machine, or version, must make the same test split.
    assert names(parts["test"]) == DIVIDED
    for part in parts.values():
        for i in range(len(part)):
            assert part.name(i).startswith(part.classes[part.labels[i]] + "/")


DIVIDED = [
    *("blue/2.png", "green/0.png"),
    *("red/1.png", "red/19.png", "red/21.png", "red/3.png", "red/4.png"),
]


def test_a_class_of_one_image_is_trained_on(tmp_path: Path) -> None:
    make_undivided_tree(tmp_path, {"red": 1, "blue": 5})
    assert np.bincount(opened(tmp_path).labels).tolist() == [4, 1]
    assert opened(tmp_path, "test").labels.tolist() == [0]


def test_one_class(tmp_path: Path) -> None:
    make_undivided_tree(tmp_path, {"red": 4})
    error = refused(tmp_path)
    assert "only one class, 'red'" in error.message
    assert error.field == "data"


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "void").mkdir()
    (tmp_path / "train" / "void" / "notes.txt").write_text("no image")
    error = refused(tmp_path)
    assert str(tmp_path / "train" / "void") in error.message
    assert "holds no images" in error.message


def test_no_images(tmp_path: Path) -> None:
    error = refused(tmp_path, dataset="folder")
    assert "there are no labelled images" in error.message
    (tmp_path / "train").mkdir()
    assert "the train split has no images" in refused(tmp_path).message
    assert "no folder" in refused(tmp_path / "nowhere", dataset="folder").message
    with pytest.raises(InvalidInputError, match="--data"):
        open_split(DataConfig(dataset="folder"), "train")


# --- images that cannot be read ---


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path)
    whole = tmp_path / "train" / "red" / "deeper" / "0.png"
    (tmp_path / "train" / "red" / "broken.png").write_bytes(whole.read_bytes()[:-40])
    source = opened(tmp_path)
    row = names(source).index("red/broken.png")
    with pytest.raises(InvalidInputError) as caught:
        source.picture(row)
    message = caught.value.message
    assert str(tmp_path / "train" / "red" / "broken.png") in message
    assert "damaged or incomplete" in message
    assert "--skip-unreadable" in message
    assert caught.value.field == "data"


def test_unreadable_images_can_be_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "blue" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "train" / "red" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    told: list[tuple[int, int]] = []
    config = DataConfig(data=tmp_path, skip_unreadable=True)
    source = open_split(config, "train", lambda *far: told.append(far))
    assert told[-1] == (14, 14)
    assert source.labels.tolist() == [0] * 6 + [1] * 6
    assert [text.split(": ")[0] for text in source.skipped] == [
        str(tmp_path / "train" / "blue" / "broken.png"),
        str(tmp_path / "train" / "red" / "gone.jpg"),
    ]
    assert not any("--skip-unreadable" in text for text in source.skipped)
    assert source.picture(len(source) - 1).mode == "RGB"
    assert not open_split(config, "test").skipped


def test_a_class_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "void").mkdir()
    (tmp_path / "train" / "void" / "broken.png").write_bytes(b"no image")
    assert "no image of 'void'" in refused(tmp_path, skip_unreadable=True).message


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "red" / "a.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = opened(tmp_path)
    with pytest.raises(InvalidInputError, match=r"a\.jpg: cannot be read \(No such file"):
        source.image_bytes(names(source).index("red/a.jpg"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    make_tree(tmp_path)
    closed = tmp_path / "train" / "red" / "deeper"
    closed.chmod(0)
    try:
        message = refused(tmp_path).message
        assert str(closed) in message
        assert "Mend its permissions" in message
    finally:
        closed.chmod(0o700)


# --- tables ---


def write_table(root: Path, text: str, name: str = "train.csv") -> None:
    (root / name).write_text(text, "utf-8")


@pytest.fixture
def beach(tmp_path: Path) -> Path:
    """A folder with pictures and a table of several labels for each."""
    for i, name in enumerate(("red", "blue", "green", "red")):
        picture(name, i).save(tmp_path / f"{i}.png")
    write_table(tmp_path, "file,labels\n0.png,sea;sky\n1.png,sky\n2.png,Ähre\n")
    write_table(tmp_path, "3.png,sea\n", "test.csv")
    return tmp_path


def test_images_of_several_classes(beach: Path) -> None:
    train, test = opened(beach), opened(beach, "test")
    assert train.classes == test.classes == ("sea", "sky", "Ähre")
    assert train.labels.dtype == bool
    assert train.labels.tolist() == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]
    assert test.labels.tolist() == [[True, False, False]]
    assert names(train) == ["0.png", "1.png", "2.png"]
    assert train.image_bytes(1) == (beach / "1.png").read_bytes()
    assert has_split(DataConfig(data=beach), "test")


def test_a_table_of_one_label_each_is_single_label(beach: Path) -> None:
    write_table(beach, "0.png,sea\n\n1.png,sky\n")
    assert opened(beach).labels.tolist() == [0, 1]
    assert opened(beach, "test").labels.tolist() == [0]
    # One image of several is enough, in either split, and both splits agree.
    write_table(beach, "3.png,sea;sky\n", "test.csv")
    assert opened(beach).labels.tolist() == [[True, False], [False, True]]


def test_tabs_quotes_and_a_byte_order_mark(beach: Path) -> None:
    (beach / "train.csv").unlink()
    (beach / "test.csv").unlink()
    (beach / "a,b.png").write_bytes((beach / "0.png").read_bytes())
    (beach / "train.tsv").write_bytes(b"\xef\xbb\xbffile\tlabels\na,b.png\tx\n1.png\ty; z\n")
    source = opened(beach)
    assert names(source) == ["a,b.png", "1.png"]
    assert source.classes == ("x", "y", "z")
    assert not has_split(DataConfig(data=beach), "test")
    assert "test.csv or .tsv" in refused(beach, "test").message
    (beach / "train.tsv").unlink()
    write_table(beach, '"a,b.png",x\n1.png,y\n')
    assert names(opened(beach)) == ["a,b.png", "1.png"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("0.png,sea\n1.png,sky;sea;sky\n", "line 2: a label stands there twice"),
        ("0.png,sea\n1.png,sky\n0.png,sky\n", r"line 3: 0\.png stands in line 1 already"),
        ("0.png,sea\n1.png\n", "line 2: a line has two columns"),
        ("0.png,sea\n1.png,sky;\n", "line 2: the file or a label is missing"),
        ("0.png,sea\n,sky\n", "line 2: the file or a label is missing"),
        ("0.png,sea\n1.png,\n", "line 2: the file or a label is missing"),
        ('0.png,"sea\n', "cannot be read as a table"),
        ("file,labels\n", "lists no images"),
        ("0.png,sea\n", "only one class, 'sea'"),
        ("0.png,sky\n1.png,town\n", r"test\.csv, line 1: no image to train on has.*'sea'"),
    ],
)
def test_a_wrong_table(beach: Path, text: str, wrong: str) -> None:
    write_table(beach, text)
    with pytest.raises(InvalidInputError, match=wrong) as caught:
        opened(beach)
    assert caught.value.field == "data"


def test_a_table_in_another_encoding(beach: Path) -> None:
    (beach / "train.csv").write_bytes("0.png,Ähre\n".encode("latin-1"))
    assert "UTF-8" in refused(beach).message


def test_a_file_that_the_table_lists_but_is_not_there(beach: Path) -> None:
    write_table(beach, "0.png,sea\n7.png,sky;sea\n")
    message = refused(beach).message
    assert "train.csv, line 2" in message
    assert "7.png" in message
    write_table(beach, "0.png,sea\n1.png,sky\n7.png,sky;sea\n")
    source = opened(beach, skip_unreadable=True)
    assert names(source) == ["0.png", "1.png"]
    assert "7.png" in source.skipped[0]
