"""Recipes x backbones x bits: trained, evaluated, tabled. Goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from encoder_service.data.config import DataConfig
from encoder_service.training.recipe import Recipe, RecipeName, TrainConfig, make_train_config
from hashlens.codes import MAX_BITS
from hashlens.config import setting
from hashlens.errors import InvalidInputError

# torch takes seconds to import, and the command line reads this module.
if TYPE_CHECKING:
    from encoder_service.data.types import Split
    from encoder_service.evaluation.encodings import Encodings
    from encoder_service.evaluation.results import Evaluation
    from encoder_service.training.run import Observer

PROTOCOLS = ("lin2015", "split", "unseen-classes")

BACKBONE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "resnet9": {
        "resize": 28,
        "crop": 28,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
    },
    "alexnet": {
        "resize": 64,
        "crop": 64,
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
    },
}
"""What goes with a backbone, the same for every recipe: so only the recipes differ."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(DataConfig):
    """Which combinations, and how long."""

    output: Path = setting(Path("sweep"), "Folder of the results, a JSON file per combination.")
    recipes: str = setting("orthohash,csq,ssdh,lin2015-modern", "Recipes, with commas between.")
    backbones: str = setting("resnet9", "Backbones, with commas between.")
    bits: str = setting("12,24,32,48,64,128", "Code lengths, with commas between.")
    protocols: str = setting(
        "lin2015,split", "Protocols, with commas between; unseen-classes trains once more."
    )
    unseen_classes: str = setting(
        "", "Classes that unseen-classes leaves out of training; without: the last third."
    )
    epochs: int = setting(6, "Passes over the training images, for every combination.")
    batch_size: int = setting(256, "Images per step, for every combination but lin2015.")
    side: int = setting(
        0, "Side of the images in pixels, but for lin2015; 0: what suits the backbone."
    )
    augment: Literal["none", "mirror", "light", "standard", "strong"] = setting(
        "standard", "Augmentation preset, but for lin2015."
    )
    amp: Literal["none", "bf16", "fp16"] = setting(
        "none", "Mixed precision, as hashlens train has it."
    )
    queries: int = setting(
        2000, "Queries of lin2015, a sample of the test split; split and unseen-classes ask all."
    )
    keep: bool = setting(False, "Keep the checkpoints beside the results.")
    seed: int = setting(1, "Of the trainings.")
    device: str = setting("auto", "As hashlens train has it.")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    recipe: RecipeName
    backbone: str
    n_bits: int
    protocols: tuple[str, ...]
    """Those that one training serves."""

    def path(self, folder: Path) -> Path:
        """Return where its result lies."""
        kind = "unseen" if self.protocols == ("unseen-classes",) else "seen"
        return folder / f"{self.backbone}-{self.recipe}-{self.n_bits}-{kind}.json"


def cells(config: SweepConfig) -> list[Cell]:
    """Return all combinations, each training once.

    Raises
    ------
    InvalidInputError
        A recipe, backbone, protocol or number is unknown.
    """
    recipes = _listed(config.recipes, "recipes", get_args(RecipeName))
    backbones = _listed(config.backbones, "backbones", BACKBONE_SETTINGS)
    protocols = _listed(config.protocols, "protocols", PROTOCOLS)
    bits = _listed(config.bits, "bits", None)
    if not all(text.isdecimal() and 1 <= int(text) <= MAX_BITS for text in bits):
        raise InvalidInputError(
            f"bits are numbers, each 1 to {MAX_BITS}, not {config.bits!r}.", field="bits"
        )
    seen = tuple(name for name in protocols if name != "unseen-classes")
    trainings = [seen] if seen else []
    if len(seen) < len(protocols):
        trainings.append(("unseen-classes",))
    return [
        Cell(recipe, backbone, int(n_bits), training)  # type: ignore[arg-type]
        for backbone in backbones
        for training in trainings
        for n_bits in bits
        for recipe in recipes
    ]


def train_config(config: SweepConfig, cell: Cell, classes: Sequence[str]) -> TrainConfig:
    """Return how a combination is trained."""
    unseen = ""
    if cell.protocols == ("unseen-classes",):
        unseen = config.unseen_classes or ";".join(classes[-max(2, len(classes) // 3) :]) + ";"
    checkpoint = cell.path(config.output).with_suffix(".safetensors")
    if cell.recipe == "lin2015":
        # As it is, but for the first weights and the time, which a table cannot give each cell.
        own: Mapping[str, Any] = {"init": "scratch", "decay_every_steps": 0}
    else:
        side = {"resize": config.side, "crop": config.side} if config.side else {}
        own = {**BACKBONE_SETTINGS[cell.backbone], "augment": config.augment, **side}
    return make_train_config(
        cell.recipe,
        **{
            **own,
            "backbone": cell.backbone,
            "n_bits": cell.n_bits,
            "epochs": config.epochs,
            "steps": 0,
            "batch_size": 32 if cell.recipe == "lin2015" else config.batch_size,
            "amp": config.amp,
            "seed": config.seed,
            "unseen_classes": unseen,
            "output": checkpoint,
            "log": checkpoint.with_suffix(".csv"),
            "dataset": config.dataset,
            "data": config.data,
            "download": config.download,
            "skip_unreadable": config.skip_unreadable,
            "device": config.device,
            "evaluate": False,
        },
    )


def is_done(config: SweepConfig, cell: Cell, classes: Sequence[str]) -> bool:
    """Tell whether a combination's result is there, by all of its protocols.

    Raises
    ------
    InvalidInputError
        It is there, but of a training with other settings.
    """
    path = cell.path(config.output)
    if not path.exists():
        return False
    result = json.loads(path.read_text("utf-8"))
    _check_same(path, result["training"], train_config(config, cell, classes))
    return set(cell.protocols) <= set(result["protocols"])


def _check_same(path: Path, theirs: Mapping[str, Any], training: TrainConfig) -> None:
    # A setting that came later had its default before.
    theirs = {**{field.name: field.default for field in fields(Recipe)}, **theirs}
    differing = [
        f"{name} was {theirs[name]!r} and is {value!r}"
        for name, value in training.to_json().items()
        if theirs[name] != value
    ]
    if differing:
        raise InvalidInputError(
            f"{path} is of a training with other settings: {'; '.join(differing)}. Use another "
            "--output, or remove it.",
            field="output",
        )


def run_cell(
    config: SweepConfig, cell: Cell, classes: Sequence[str], observer: Observer
) -> dict[str, Any]:
    """Train a combination, evaluate it, write its result."""
    from encoder_service.model.checkpoint import load_checkpoint
    from encoder_service.training.run import train_model

    path = cell.path(config.output)
    training = train_config(config, cell, classes)
    began = time.perf_counter()
    if training.output.exists():
        _check_same(training.output, load_checkpoint(training.output).recipe, training)
    else:
        train_model(training, observer)
    train_s = time.perf_counter() - began
    found = {
        name: evaluation.to_json()
        for name, evaluation in _evaluate(config, cell, training, observer).items()
    }
    if path.exists():  # Of the same training, by other protocols.
        found = {**json.loads(path.read_text("utf-8"))["protocols"], **found}
    result = {
        "cell": {
            "recipe": cell.recipe,
            "backbone": cell.backbone,
            "n_bits": cell.n_bits,
            "epochs": config.epochs,
        },
        "training": training.to_json(),
        "train_s": train_s,
        "protocols": found,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    partial.replace(path)
    if not config.keep:
        training.output.unlink(missing_ok=True)
    return result


def _evaluate(
    config: SweepConfig, cell: Cell, training: TrainConfig, observer: Observer
) -> dict[str, Evaluation]:
    """Evaluate a cell's checkpoint by its protocols; each split is encoded once."""
    from encoder_service.data.images import load_images
    from encoder_service.data.source import open_split
    from encoder_service.data.split import select_classes
    from encoder_service.evaluation.evaluate import evaluate_encodings
    from encoder_service.evaluation.local import encode_images
    from encoder_service.evaluation.run import describe
    from encoder_service.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(training.output)

    def encode(split: Split) -> tuple[Encodings, tuple[str, ...]]:
        source = open_split(config, split, observer.begin(f"look at the {split} split"))
        if training.unseen:
            source = select_classes(source, training.unseen)
        images = load_images(
            source, checkpoint.preprocessing, on_progress=observer.begin(f"read the {split} split")
        )
        progress = observer.begin(f"encode the {split} split")
        encodings = encode_images(checkpoint, images, device=config.device, on_progress=progress)
        return encodings, source.classes

    test, classes = encode("test")
    found = {}
    for protocol in cell.protocols:
        by_train = protocol == "lin2015"
        asked = test if by_train else None
        if by_train and 0 < config.queries < len(test):
            random = np.random.default_rng(config.seed)
            asked = test.take(np.sort(random.choice(len(test), config.queries, replace=False)))
        found[protocol] = evaluate_encodings(
            encode("train")[0] if by_train else test,
            asked,
            protocol=protocol,
            classes=classes,
            checkpoint=describe(checkpoint),
            on_progress=observer.begin(f"rank: {protocol}"),
        )
    return found


_COLUMNS = (
    ("coarse", "map_at_1000"),
    ("coarse", "precision_at_10"),
    ("two_stage", "map_at_1000"),
    ("two_stage", "precision_at_10"),
    ("exhaustive", "precision_at_10"),
    ("itq", "map_full"),
    ("itq", "precision_at_10"),
    ("lsh", "map_full"),
    ("lsh", "precision_at_10"),
)

_SHORT = {
    "map_full": "mAP",
    "map_at_1000": "mAP@1000",
    "precision_at_10": "P@10",
    "two_stage": "two-stage",
    "itq": "ITQ",
    "lsh": "LSH",
}


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return Markdown: a line per combination and protocol.

    Codes are those of the database. The first mAP is over the full list with equal distances in
    all orders, with half of the 95% interval over the queries of the one in the served order.
    """
    names = [f"{_SHORT.get(ranking, ranking)} {_SHORT[metric]}" for ranking, metric in _COLUMNS]
    head = ["backbone", "recipe", "bits", "epochs", "protocol", "accuracy", "codes", "coarse mAP"]
    lines = [
        "| " + " | ".join(head + names) + " |",
        "|---|---|--:|--:|---" + "|--:" * (3 + len(names)) + "|",
    ]
    for result in results:
        cell = result["cell"]
        for protocol, found in result["protocols"].items():
            low, high = found["coarse"]["ci95"]["map_full"]
            cells = [
                *(str(cell[name]) for name in ("backbone", "recipe", "n_bits", "epochs")),
                protocol,
                _number(found["accuracy"]),
                f"{found['distinct_codes']:,}",
                f"{_number(found['coarse']['tie_aware_map_full'])} ± {(high - low) / 2:.4f}",
                *(_number(found.get(ranking, {}).get(metric)) for ranking, metric in _COLUMNS),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read what there is, ordered by backbone, protocol, bits and recipe."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*seen.json"))]
    order = list(get_args(RecipeName))
    return sorted(
        results,
        key=lambda result: (
            result["cell"]["backbone"],
            list(result["protocols"]),
            result["cell"]["n_bits"],
            order.index(result["cell"]["recipe"]),
        ),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _listed(text: str, field: str, known: Iterable[str] | None) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidInputError(f"{field} is empty.", field=field)
    for name in names:
        if known is not None and name not in known:
            raise InvalidInputError(
                f"{name!r} in {field} is none of: {', '.join(known)}.", field=field
            )
    return names
