"""`hashlens evaluate --local`: protocols, outputs, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from encoder_service.data.config import DataConfig
from encoder_service.data.images import ImageSet, load_images
from encoder_service.data.source import open_split
from encoder_service.encoder import Encoder
from encoder_service.evaluation.command import evaluate
from encoder_service.evaluation.config import EvaluateConfig
from encoder_service.evaluation.local import encode_images, measure
from encoder_service.evaluation.protocols import choose_parts
from encoder_service.model.checkpoint import Checkpoint, save_checkpoint
from hashlens.errors import InvalidInputError, PreconditionError

COLOURS = {"cat": (200, 60, 60), "dog": (60, 60, 200), "Ähre": (60, 200, 60), "new": (220, 220, 40)}


def write_images(root: Path, classes: tuple[str, ...], n: int = 6, side: int = 40) -> None:
    """Write ``train/CLASS/*`` and ``test/CLASS/*``: noise about a colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                noise = rng.normal(0, 50, (side, side, 3))
                pixels = np.clip(COLOURS.get(name, (90, 90, 90)) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def data(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    write_images(tmp_path / "data", checkpoint.classes)
    return tmp_path / "data"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


def numbers(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, (result.output, result.exception)
    plain: dict[str, Any] = json.loads(result.stdout)
    return plain


def refused(*arguments: object) -> str:
    result = run("--local", *arguments)
    assert isinstance(result.exception, InvalidInputError | PreconditionError), result.output
    return result.exception.message


# -- encoding --------------------------------------------------------------------------------------


def test_encoding_is_the_encoders(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    images = ImageSet.from_pixels(pixels, np.arange(300) % 3, ("dog", "cat", "Ähre"))
    told: list[tuple[int, int]] = []
    got = encode_images(
        checkpoint, images, device="cpu", on_progress=lambda *done: told.append(done)
    )
    want = Encoder(checkpoint, "cpu").encode(
        checkpoint.preprocessing.normalise(pixels).transpose(0, 3, 1, 2)
    )
    assert np.array_equal(got.codes, want.codes)
    assert np.array_equal(got.features, want.features.astype(np.float16))
    assert np.array_equal(got.activations, want.activations)
    assert told[-1] == (300, 300)
    layer = checkpoint.network.classifier
    scores = want.activations @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    # The data order their classes in another way than the model.
    assert got.predicted is not None
    assert got.predicted.tolist() == np.array([1, 0, 2])[scores.argmax(axis=1)].tolist()


def test_measure_names_protocol_ranking_and_metric(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 3
    pixels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    images = ImageSet.from_pixels(pixels, labels, checkpoint.classes)
    found = measure(checkpoint, images, images.take(np.arange(20)), device="cpu")
    assert set(found) == {
        "test_accuracy",
        "test_distinct_codes",
        "database_distinct_codes",
        *(
            f"{protocol}_{ranking}_{metric}"
            for protocol in ("lin2015", "split")
            for ranking in ("coarse", "two_stage", "exhaustive")
            for metric in ("map_full", "precision_at_10", "tie_aware_map_full")
        ),
    }
    # Queries that are in the database find themselves first, unless they are left out.
    assert found["lin2015_exhaustive_map_full"] > found["split_exhaustive_map_full"]
    assert all(isinstance(value, float) for value in found.values())


# -- protocols -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "n_database"), [("lin2015", 18), ("split", 17)])
def test_who_asks_whom(
    protocol: str, n_database: int, data: Path, checkpoint_file: Path, checkpoint: Checkpoint
) -> None:
    found = numbers(
        "--local", "--data", data, "--checkpoint", checkpoint_file, "--protocol", protocol
    )
    assert (found["protocol"], found["backend"]) == (protocol, "local")
    assert (found["n_queries"], found["n_database"]) == (18, n_database)
    assert found["checkpoint"]["model_id"] == checkpoint.model_id
    assert 0 <= found["accuracy"] <= 1
    assert found["two_stage"]["map_full"] > 0.4  # colours are plain to any network
    assert found["verdict"]["level"] in ("healthy", "crowded", "collapsed")


def test_queries_are_drawn_by_the_seed(data: Path, checkpoint: Checkpoint) -> None:
    for protocol in ("split", "lin2015"):
        drawn = [
            choose_parts(
                EvaluateConfig(data=data, queries=5, seed=seed, protocol=protocol), checkpoint
            )
            for seed in (1, 1, 2)
        ]
        names = [
            [
                parts.asking.name(int(row))
                for row in (np.arange(5) if parts.query_rows is None else parts.query_rows)
            ]
            for parts in drawn
        ]
        assert len(set(names[0])) == 5
        assert names[0] == names[1] != names[2]
        assert len(drawn[0].database) == 18


def test_unseen_classes(data: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    write_images(tmp_path / "all", (*checkpoint.classes, "new", "newer"), n=4)
    path = tmp_path / "some.safetensors"
    recipe = {**checkpoint.recipe, "unseen_classes": "new, newer"}
    save_checkpoint(replace(checkpoint, recipe=recipe), path)
    options = ("--data", tmp_path / "all", "--checkpoint", path)
    found = numbers("--local", *options, "--protocol", "unseen-classes")
    assert (found["n_queries"], found["n_database"]) == (8, 7)
    assert list(found["by_class"]) == ["new", "newer"]
    assert found["accuracy"] is None
    # The other protocols say where these classes belong.
    assert "--protocol unseen-classes" in refused(*options)
    named = ("--protocol", "unseen-classes", "--unseen-classes")
    assert "trained on 'cat'" in refused(*options, *named, "cat,new")
    assert "no class 'old'" in refused(*options, *named, "old,new")
    assert "two classes or more" in refused(*options, *named, "new")
    assert numbers("--local", *options, *named, "cat,new", "--force")["n_queries"] == 8
    plain = tmp_path / "plain.safetensors"
    save_checkpoint(checkpoint, plain)
    assert "left no class out" in refused(
        "--data", data, "--checkpoint", plain, "--protocol", "unseen-classes"
    )


def test_data_of_other_classes_are_refused(tmp_path: Path, checkpoint_file: Path) -> None:
    write_images(tmp_path / "other", ("cat", "new"), n=3)
    options = ("--data", tmp_path / "other", "--checkpoint", checkpoint_file)
    assert "does not know the data's 'new'" in refused(*options)
    assert numbers("--local", *options, "--force")["accuracy"] is None


def test_an_unreadable_image_is_named(data: Path, checkpoint_file: Path) -> None:
    (data / "test/dog/3.png").write_bytes(b"\x89PNG\r\n\x1a\n what came of it")
    said = refused("--data", data, "--checkpoint", checkpoint_file)
    assert "dog/3.png" in said


def test_no_data_and_one_class_are_refused(tmp_path: Path, checkpoint_file: Path) -> None:
    write_images(tmp_path / "one", ("cat",), n=3)
    options = ("--checkpoint", checkpoint_file, "--data")
    assert "only one class" in refused(*options, tmp_path / "one")
    assert str(tmp_path / "nowhere") in refused(*options, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--encoder", "127.0.0.1:1"), "--encoder and --search, or neither"),
        (("--local", "--encoder", "a:1", "--search", "b:1"), "--local uses no services"),
        (("--unseen-classes", "cat"), "belongs to the protocol"),
        (("--queries", "1"), "2 or more"),
        (("--json", "nowhere/at/all.json"), "no folder"),
    ],
)
def test_options_that_contradict_each_other(options: tuple[str, ...], said: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert said in re.sub(r"\s+", " ", result.output)


# -- outputs ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Counts elements and keeps where pictures come from."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]


def test_table_json_plots_and_page(tmp_path: Path, checkpoint: Checkpoint) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    classes = ("cat", "dog", hostile)
    write_images(tmp_path / "data", classes)
    path = tmp_path / "m.safetensors"
    save_checkpoint(replace(checkpoint, classes=classes, data_licence="<script>"), path)
    result = run(
        *("--local", "--data", tmp_path / "data", "--checkpoint", path),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "plots"),
        *("--html", tmp_path / "report.html"),
    )
    assert result.exit_code == 0, result.output
    plain = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert f"{plain['two_stage']['map_full']:.3f}" in result.stdout
    assert f"{plain['distinct_codes']} different codes" in result.stdout
    for name in ("precision_at_k", "precision_recall", "classes", "confusion"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as plot:
            assert plot.width > 500
            assert len(plot.convert("RGB").getcolors(1 << 20) or ()) > 50
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.tags.count("article") == 12  # four queries of each class
    assert page.tags.count("li") >= 120
    assert "script" not in page.tags
    assert all(source.startswith("data:image/") for source in page.sources)
    assert page.tags.count("img") == 4 + 12 + 120
    assert "&lt;img src=x onerror" in text
    assert f"{plain['coarse']['map_full']:.3f}" in text
    assert "training has seen neither" in text


def test_pictures_are_what_the_service_decodes(data: Path, checkpoint: Checkpoint) -> None:
    source = open_split(DataConfig(data=data), "test")
    images = load_images(source, checkpoint.preprocessing)
    assert images.side == checkpoint.preprocessing.crop
    want = checkpoint.preprocessing.resize_crop(source.picture(4))
    assert np.array_equal(images.batch(np.array([4]))[0], want)
