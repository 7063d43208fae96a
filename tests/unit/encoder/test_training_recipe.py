"""What `hashlens train` can be told: recipes, where a value comes from, what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from encoder_service.data.augment import PRESETS
from encoder_service.preprocess import IMAGENET_MEAN, IMAGENET_STD
from encoder_service.training.recipe import (
    DEFAULT_RECIPE,
    RECIPES,
    Recipe,
    TrainConfig,
    make_recipe,
    make_train_config,
)
from encoder_service.training.run import make_preprocessing
from hashlens.config import options
from hashlens.errors import InvalidInputError

# --- the author's ---

LIN2015 = {
    # The network: AlexNet from ImageNet's weights, H and F8 on top, nothing between.
    "backbone": "alexnet",
    "init": "imagenet",
    "hash_norm": "none",
    "loss": "softmax",
    "label_smoothing": 0.0,
    "freeze": "",
    # The pictures: 256 x 256 by force, 227 at random, mirrored or not.
    "resize": 256,
    "crop": 227,
    "fit": "warp",
    "augment": "mirror",
    "holdout": 0.0,
    # The solver.
    "optimizer": "sgd",
    "learning_rate": 0.001,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "batch_size": 32,
    "steps": 50_000,
    "schedule": "step",
    "decay_every_steps": 25_000,
    "backbone_learning_rate_scale": 1.0,
    "depth_learning_rate_decay": 1.0,
    "classifier_learning_rate_scale": 10.0,
    "bias_learning_rate_scale": 2.0,
    # What came later.
    "ema": 0.0,
    "patience": 0,
    "amp": "none",
}


def test_lin2015_is_the_authors() -> None:
    recipe = make_recipe("lin2015")
    assert {name: getattr(recipe, name) for name in LIN2015} == LIN2015
    mirror = PRESETS["mirror"]
    assert (mirror.mirror, mirror.crop, mirror.shift, mirror.erase) == (0.5, "random", 0.0, 0.0)
    assert (mirror.scale, mirror.rotate_deg, mirror.brightness) == ((1.0, 1.0), 0.0, 0.0)
    preprocessing = make_preprocessing(recipe)
    assert (preprocessing.resize, preprocessing.crop, preprocessing.fit) == (256, 227, "warp")
    # As torchvision's weights were trained.
    assert (preprocessing.mean, preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_set_what_there_is(name: str) -> None:
    assert set(RECIPES[name]) <= {field.name for field in fields(Recipe)}  # type: ignore[index]
    assert make_recipe(name).recipe == name  # type: ignore[arg-type]


def test_a_recipe_tells_everything() -> None:
    plain = make_recipe("csq", n_bits=12).to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert Recipe(**plain) == make_recipe("csq", n_bits=12)
    # What does not decide the weights is not kept with them.
    assert make_train_config("csq", n_bits=12, output=Path("x")).to_json() == plain


# --- on the command line ---


@click.command()
@options(TrainConfig, "train", preset_field="recipe", presets=RECIPES)
def show(config: TrainConfig) -> None:
    click.echo(json.dumps(config.to_json()))


def shown(*arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    result = CliRunner().invoke(show, arguments, env=env)
    assert result.exit_code == 0, result.output
    plain: dict[str, Any] = json.loads(result.output)
    return plain


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_the_defaults(name: str) -> None:
    assert shown("--recipe", name) == make_recipe(name).to_json()  # type: ignore[arg-type]


def test_the_default_recipe() -> None:
    assert shown() == make_recipe(DEFAULT_RECIPE).to_json()


def test_options_environment_and_file_go_before_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("[train]\nmomentum = 0.5\nbatch_size = 8\nweight_decay = 0.25\n")
    arguments = ["--batch-size", "16", "--recipe", "lin2015", "--config", str(file)]
    found = shown(*arguments, env={"HASHLENS_TRAIN_WEIGHT_DECAY": "0.125"})
    assert (
        found == make_recipe("lin2015", batch_size=16, momentum=0.5, weight_decay=0.125).to_json()
    )
    # In any order.
    assert shown(*arguments[4:], *arguments[:4])["momentum"] == 0.5


def test_the_recipe_from_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('[train]\nrecipe = "ssdh"\nbatch_size = 8\n')
    assert shown("--config", str(file)) == make_recipe("ssdh", batch_size=8).to_json()
    env = {"HASHLENS_TRAIN_RECIPE": "csq", "HASHLENS_CONFIG": str(file)}
    assert shown(env=env) == make_recipe("csq", batch_size=8).to_json()
    assert shown("--recipe", "lin2015", env=env)["batch_size"] == 8
    assert shown("--recipe", "lin2015", "--no-nesterov")["nesterov"] is False
    assert shown("--recipe", "lin2015", "--nesterov")["nesterov"] is True


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--recipe", "lin2016"], "lin2015-modern"),
        (["--augment", "wild"], "strong"),
        (["--loss", "hinge"], "orthohash"),
        (["--epochs", "0"], "epochs is 1 to 100000, not 0"),
        (["--learning-rate", "nan"], "learning_rate is 0 to 10, not nan"),
        (["--patience", "3", "--holdout", "0"], "patience watches the hold-out"),
        (["--recipe", "lin2015", "--patience", "3"], "patience watches the hold-out"),
    ],
)
def test_refused(arguments: list[str], match: str) -> None:
    result = CliRunner().invoke(show, arguments)
    assert result.exit_code == 2
    assert match in " ".join(result.output.split())


def test_an_unknown_recipe_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('[train]\nrecipe = "lin2016"\n')
    result = CliRunner().invoke(show, ["--config", str(file)])
    assert result.exit_code == 2
    assert "lin2016" in result.output


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"ema": 1.0},
        {"holdout": 1.0},
        {"depth_learning_rate_decay": 0.0},
        {"margin": -0.1},
        {"seed": -1},
        {"learning_rate": float("nan")},
        {"recipe": "none"},
    ],
)
def test_recipe_ranges(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Recipe(**change)
    assert caught.value.field in change


def test_unseen_classes_are_a_list() -> None:
    assert make_recipe(unseen_classes=" Bag, Ankle boot ,,").unseen == ("Bag", "Ankle boot")
    assert make_recipe().unseen == ()
