"""Names, files and checkpoints that somebody made to do harm, or that went wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from encoder_service.data.config import DataConfig
from encoder_service.data.idx import read_idx
from encoder_service.data.source import Source, open_split
from encoder_service.decode import DecodeLimits
from encoder_service.model.checkpoint import (
    HEADER_KEY,
    Checkpoint,
    load_checkpoint,
    read_metadata,
)
from encoder_service.training.sweep import SweepConfig, cells
from hashlens.errors import InvalidInputError
from tests.support.pictures import make_tree, picture
from tests.support.training import run_train


def row_of(source: Source, name: str) -> int:
    return [source.name(i) for i in range(len(source))].index(name)


# --- images ---


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    make_tree(tmp_path)
    os.mkfifo(tmp_path / "train" / "red" / "pipe.png")
    (tmp_path / "train" / "red" / "zero.png").symlink_to("/dev/zero")
    source = open_split(DataConfig(data=tmp_path), "train")
    for name in ("red/pipe.png", "red/zero.png"):
        with pytest.raises(InvalidInputError, match="is no regular file") as caught:
            source.picture(row_of(source, name))
        assert name in caught.value.message
        assert caught.value.field == "data"
    left = open_split(DataConfig(data=tmp_path, skip_unreadable=True), "train")
    assert [text.split(": ")[1] for text in left.skipped] == [
        "is no regular file. Mend or remove it."
    ] * 2


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    make_tree(tmp_path)
    with (tmp_path / "train" / "red" / "large.png").open("wb") as file:
        file.truncate(DecodeLimits().max_bytes + 1)
    source = open_split(DataConfig(data=tmp_path), "train")
    with pytest.raises(InvalidInputError, match="the limit is 20,971,520"):
        source.image_bytes(row_of(source, "red/large.png"))


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        picture(name, 0).save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("red.png,a\nblue.png,b\nx\0.png,a\n")
    source = open_split(DataConfig(data=tmp_path, skip_unreadable=True), "train")
    assert len(source) == 2
    assert "null byte" in source.skipped[0]


@pytest.mark.parametrize(
    "shape",
    [
        # Their product is 2**64, which is 0 in 64 bits: as many bytes as there are.
        (65_536,) * 4,
        (1,) * 200,
    ],
)
def test_an_idx_header_that_no_array_can_have(tmp_path: Path, shape: tuple[int, ...]) -> None:
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    (tmp_path / "a").write_bytes(header + (b"" if shape[0] > 1 else b"x"))
    with pytest.raises(InvalidInputError, match="its length does not fit"):
        read_idx(tmp_path / "a")


# --- labels ---


def test_an_image_of_both_splits_is_refused(tmp_path: Path) -> None:
    for i, name in enumerate(("red", "blue", "green")):
        picture(name, i).save(tmp_path / f"{i}.png")
    (tmp_path / "train.csv").write_text("0.png,a\n1.png,b\n")
    (tmp_path / "test.csv").write_text("file,labels\n2.png,a\n1.png,b\n")
    for split, lines in (("train", "line 2: 1.png.*line 3"), ("test", "line 3: 1.png.*line 2")):
        with pytest.raises(InvalidInputError, match=lines) as caught:
            open_split(DataConfig(data=tmp_path), split)  # type: ignore[arg-type]
        assert "cannot be tested on" in caught.value.message
        assert caught.value.field == "data"


def test_a_class_name_that_is_not_utf8_is_refused_before_training(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for split in ("train", "test"):
        red = tmp_path / split / "red"
        red.rename(os.fsdecode(os.fsencode(red) + b"\xff"))
    with pytest.raises(InvalidInputError, match="not valid UTF-8") as caught:
        open_split(DataConfig(data=tmp_path), "train")
    assert caught.value.field == "data"
    caught.value.message.encode()


def test_class_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    lines = []
    for i in range(24):
        name, label = (("red", "a[/b]"), ("blue", "b\x1b[31m"))[i % 2]
        picture(name, i).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{label}\n")
    (tmp_path / "train.csv").write_text("".join(lines))
    result = run_train(tmp_path, "--no-evaluate", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "a[/b], b\\x1b[31m" in result.stdout
    assert "\x1b[31m" not in result.output


# --- checkpoints ---


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's metadata in place."""
    plain = read_metadata(path)
    state = safetensors.torch.load_file(path)
    change(plain)
    path.write_bytes(safetensors.torch.save(state, {HEADER_KEY: json.dumps(plain)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(metrics={"test_accuracy": "0.9 [/b]"}),
        lambda plain: plain.update(metrics={"test_accuracy": float("nan")}),
        lambda plain: plain.update(metrics={"test_accuracy": [1, 2]}),
        lambda plain: plain.update(n_bits=float("inf")),
        lambda plain: plain["preprocessing"].update(resize=float("inf")),
        lambda plain: plain["preprocessing"].update(mean=[0.5, 0.5, float("nan")]),
        lambda plain: plain["preprocessing"].update(std=[0.5, 0.5, float("inf")]),
        lambda plain: plain.update(classes=["cat", "dog", "\ud800"]),
    ],
)
def test_metadata_that_cannot_be_is_refused(
    checkpoint_file: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(checkpoint_file, change)
    with pytest.raises(InvalidInputError):
        load_checkpoint(checkpoint_file)


def test_a_class_name_that_cannot_be_written_makes_no_checkpoint(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="not valid UTF-8"):
        replace(checkpoint, classes=("cat", "dog", "bad\udcff"))


# --- settings ---


@pytest.mark.parametrize("bits", ["12,0", "12,513"])
def test_a_sweep_refuses_impossible_codes_before_it_trains(bits: str) -> None:
    with pytest.raises(InvalidInputError, match="each 1 to 512") as caught:
        cells(SweepConfig(bits=bits))
    assert caught.value.field == "bits"
