"""What a checkpoint says about itself, and what its codes turn out to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from encoder_service.data.images import load_images
from encoder_service.data.types import OnProgress, Source, nobody
from encoder_service.evaluation.local import encode_images
from encoder_service.model.checkpoint import Checkpoint
from hashlens.bits import BitMeaning, bit_meanings
from hashlens.codehealth import CodeHealth, health_of


def facts_of(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Return everything but the weights."""
    return {
        **checkpoint.describe(),
        "dim": checkpoint.dim,
        "parameters": sum(tensor.numel() for tensor in checkpoint.network.parameters()),
        "file_bytes": path.stat().st_size,
    }


def meanings_of(checkpoint: Checkpoint) -> tuple[BitMeaning, ...]:
    """Return what each bit means, by the classifier's weights."""
    classifier = checkpoint.network.classifier
    return bit_meanings(
        classifier.weight.detach().cpu().numpy(), classifier.bias.detach().cpu().numpy()
    )


def health_of_checkpoint(
    checkpoint: Checkpoint,
    source: Source,
    *,
    device: str,
    random: np.random.Generator,
    on_progress: OnProgress = nobody,
) -> CodeHealth:
    """Encode images and look at their codes.

    Parameters
    ----------
    checkpoint
        The model.
    source
        The images; their labels are not looked at.
    device
        Where the model runs.
    random
        Draws the rows that serve as queries.
    on_progress
        Told how far the encoding is.

    Returns
    -------
    CodeHealth
        With margins.

    Raises
    ------
    InvalidInputError
        An image cannot be decoded.
    """
    # Each is looked at once: nothing is kept.
    images = load_images(source, checkpoint.preprocessing, max_cache_bytes=0)
    encodings = encode_images(checkpoint, images, device=device, on_progress=on_progress)
    return health_of(encodings.codes, checkpoint.n_bits, encodings.activations, random=random)
