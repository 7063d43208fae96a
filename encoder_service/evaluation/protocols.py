"""Which images ask and which are searched; and whether the question makes sense for a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoder_service.data.config import split_names
from encoder_service.data.source import open_split
from encoder_service.data.split import select_classes, take
from encoder_service.data.types import OnProgress, Source, nobody
from encoder_service.evaluation.config import EvaluateConfig
from encoder_service.model.checkpoint import Checkpoint
from hashlens.errors import InvalidInputError, PreconditionError


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The images of an evaluation; nothing is decoded yet."""

    database: Source
    queries: Source | None
    """None: images of the database, each left out of its own ranking."""
    query_rows: NDArray[np.int64] | None
    """Which of the database's images ask; None where `queries` is given, or for all."""

    @property
    def asking(self) -> Source:
        """Where the pictures of the queries are, at `query_rows` if that is given."""
        return self.database if self.queries is None else self.queries


def choose_parts(
    config: EvaluateConfig, checkpoint: Checkpoint, on_progress: OnProgress = nobody
) -> Parts:
    """Open the images that a protocol takes.

    Parameters
    ----------
    config
        Data and protocol.
    checkpoint
        The model that is asked about.
    on_progress
        Told how far the search for unreadable images is, where one was asked for.

    Raises
    ------
    InvalidInputError
        The data are not there, or fewer than 2 images are left.
    PreconditionError
        The model does not fit the data or the protocol.
    """
    test = open_split(config, "test", on_progress)
    if config.protocol == "unseen-classes":
        test = select_classes(test, _unseen(config, checkpoint, test.classes))
    elif not config.force:
        _check_classes(checkpoint, test.classes)
    rows = None
    if 0 < config.queries < len(test):
        drawn = np.random.default_rng(config.seed).choice(len(test), config.queries, replace=False)
        rows = np.sort(drawn)
    if config.protocol != "lin2015":
        return Parts(test, None, rows)
    database = open_split(config, "train", on_progress)
    assert database.classes == test.classes, "both splits have the classes of training"
    return Parts(database, test if rows is None else take(test, rows), None)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the classes that the recipe kept out of training."""
    names = checkpoint.recipe.get("unseen_classes", ())
    return split_names(names) if isinstance(names, str) else tuple(map(str, names))


def _unseen(
    config: EvaluateConfig, checkpoint: Checkpoint, classes: tuple[str, ...]
) -> tuple[str, ...]:
    names = config.unseen or left_out(checkpoint)
    if not names:
        raise PreconditionError(
            "this checkpoint's training left no class out. Train one with --unseen-classes, or "
            "name classes it has not seen with --unseen-classes here.",
            field="unseen_classes",
        )
    if unknown := [name for name in names if name not in classes]:
        raise InvalidInputError(
            f"the data have no class {_listed(unknown)}. Their classes are {_listed(classes)}.",
            field="unseen_classes",
        )
    seen = set(checkpoint.classes) - set(left_out(checkpoint))
    if (known := [name for name in names if name in seen]) and not config.force:
        raise PreconditionError(
            f"this checkpoint was trained on {_listed(known)}: such classes are not unseen. Name "
            "others, train a checkpoint without them, or ask all the same with --force.",
            field="unseen_classes",
        )
    return names


def _check_classes(checkpoint: Checkpoint, classes: tuple[str, ...]) -> None:
    unknown = [name for name in classes if name not in checkpoint.classes]
    if not unknown:
        return
    advice = "Use the data it was trained for"
    if set(unknown) <= set(left_out(checkpoint)):
        advice += ", or --protocol unseen-classes, as its training left these out"
    raise PreconditionError(
        f"the model does not know the data's {_listed(unknown)}: it was trained on "
        f"{_listed(checkpoint.classes)}. {advice}. With --force, retrieval is measured all the "
        "same, without the accuracy.",
        field="data",
    )


def _listed(names: Iterable[str]) -> str:
    """Name up to 10."""
    known = list(names)
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return ", ".join(map(repr, known[:10])) + more
