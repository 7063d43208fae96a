"""`hashlens evaluate`, without the command line: options in, numbers and pictures out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from encoder_service.data.images import load_images
from encoder_service.data.types import Source
from encoder_service.evaluation.config import EvaluateConfig
from encoder_service.evaluation.encodings import Encodings
from encoder_service.evaluation.evaluate import evaluate_encodings
from encoder_service.evaluation.local import OnStep, encode_images, nothing
from encoder_service.evaluation.protocols import choose_parts
from encoder_service.evaluation.results import Evaluation
from encoder_service.evaluation.served import encode_and_search
from encoder_service.model.checkpoint import (
    Checkpoint,
    default_checkpoint_path,
    load_checkpoint,
)
from hashlens.cli.child import LogSink
from hashlens.codehealth import health_of


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """An evaluation, and the images it was made with."""

    evaluation: Evaluation
    database: Source
    queries: Source
    """`Evaluation.query_rows` are rows of this."""


def evaluate_model(
    config: EvaluateConfig,
    on_progress: OnStep = nothing,
    on_line: LogSink = lambda name, line: None,
) -> Evaluated:
    """Measure a model by a protocol.

    Parameters
    ----------
    config
        Everything one can choose; its outputs are not written here.
    on_progress
        Given the name of a step, returns what is told how far it is.
    on_line
        Gets what services that are started for this log.

    Returns
    -------
    Evaluated

    Raises
    ------
    InvalidInputError, PreconditionError
        Model, data and protocol do not fit, or an image cannot be read.
    UnavailableError
        A service is away.
    """
    checkpoint = load_checkpoint(config.checkpoint or default_checkpoint_path())
    parts = choose_parts(config, checkpoint, on_progress("Looking at the images"))
    served = None
    asked: Encodings | None = None
    if config.local:
        stored = _encode(checkpoint, parts.database, config.device, "database", on_progress)
        if parts.queries is not None:
            asked = _encode(checkpoint, parts.queries, config.device, "queries", on_progress)
    else:
        stored, asked, served = encode_and_search(config, checkpoint, parts, on_progress, on_line)
    evaluation = evaluate_encodings(
        stored,
        asked,
        protocol=config.protocol,
        classes=parts.asking.classes,
        checkpoint=describe(checkpoint),
        query_rows=parts.query_rows,
        served=served,
        seed=config.seed,
        on_progress=on_progress("Ranking"),
    )
    health = health_of(
        stored.codes, stored.n_bits, stored.activations, random=np.random.default_rng(config.seed)
    )
    skipped = dict.fromkeys((*parts.database.skipped, *parts.asking.skipped))
    notes = evaluation.notes
    if skipped:
        notes += (f"Images left out because they cannot be read: {len(skipped):,}.",)
    evaluation = replace(evaluation, health=health, notes=notes)
    return Evaluated(evaluation, parts.database, parts.asking)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what an evaluation says about its model."""
    return {
        "model_id": checkpoint.model_id,
        "backbone": checkpoint.backbone,
        "n_bits": checkpoint.n_bits,
        "dim": checkpoint.dim,
        "recipe": checkpoint.recipe.get("recipe", ""),
        "classes": list(checkpoint.classes),
        "data_licence": checkpoint.data_licence,
    }


def _encode(
    checkpoint: Checkpoint, source: Source, device: str, what: str, on_progress: OnStep
) -> Encodings:
    images = load_images(
        source, checkpoint.preprocessing, on_progress=on_progress(f"Reading the {what}")
    )
    return encode_images(
        checkpoint, images, device=device, on_progress=on_progress(f"Encoding the {what}")
    )
