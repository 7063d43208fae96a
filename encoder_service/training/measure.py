"""What a trained model is worth, by protocols that are named with every number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoder_service.data.augment import centre_crop
from encoder_service.data.images import ImageSet
from encoder_service.data.types import OnProgress, nobody
from encoder_service.encoder import Encoder
from encoder_service.model.checkpoint import Checkpoint
from hashlens import codes

MIN_POOL = 1000
"""Rows the automatic threshold gathers, as the search service does by default."""

FINE_QUERIES = 1000
"""The first so many test images are the queries of the two-stage numbers."""


@dataclass(frozen=True, slots=True)
class Encodings:
    """What the encoder makes of a data set."""

    words: NDArray[np.uint64]
    """Codes, shape ``[n_words, n]``."""
    features: NDArray[np.float32]
    """F7, shape ``[n, dim]``."""
    labels: NDArray[np.int64]
    """Shape ``[n]``."""


def measure(
    checkpoint: Checkpoint,
    database: ImageSet,
    queries: ImageSet,
    *,
    device: str = "auto",
    on_progress: Callable[[str], OnProgress] = lambda what: lambda done, total: None,
) -> dict[str, float]:
    """Measure classification and retrieval.

    The paper's split: every test image is a query, the training images are the database, an answer
    is right if it has the query's label.

    Parameters
    ----------
    checkpoint
        The model.
    database, queries
        Train split; test split.
    device
        Where to run the model.
    on_progress
        Given the name of a step, returns what is told how far it is.

    Returns
    -------
    dict
        ``test_accuracy``: share of the queries that the classifier gets right.
        ``test_distinct_codes``: how many different codes the queries have.
        ``coarse_map_at_1000``: mean average precision over the 1000 nearest by Hamming distance,
        ties in database order, each query's sum divided by the right answers among them (the
        author's protocol). ``coarse_map_full``: the same over the whole list.
        ``two_stage_precision_at_10``, ``..._at_100``: nearest by F7 within the smallest complete
        Hamming ball of at least `MIN_POOL` rows, for the first `FINE_QUERIES` queries.
    """
    encoder = Encoder(checkpoint, device)
    stored = encode_all(encoder, database, on_progress("encode the train split"))
    asked = encode_all(encoder, queries, on_progress("encode the test split"))
    return {
        "test_accuracy": _accuracy(checkpoint, asked),
        "test_distinct_codes": float(np.unique(asked.words, axis=1).shape[1]),
        **_coarse(stored, asked, on_progress("rank by code")),
        **_two_stage(stored, asked, on_progress("rank by code, then feature")),
    }


def encode_all(
    encoder: Encoder,
    data: ImageSet,
    on_progress: OnProgress = nobody,
) -> Encodings:
    """Run a whole data set through the encoder, as serving does."""
    packed, features = [], []
    for start in range(0, len(data), 256):
        rows = np.arange(start, min(start + 256, len(data)))
        # Images that training cuts its own crops of are larger than what serving sees.
        pixels = centre_crop(data.batch(rows), encoder.preprocessing.crop)
        images = encoder.preprocessing.normalise(pixels).transpose(0, 3, 1, 2)
        encoded = encoder.encode(images)
        packed.append(encoded.codes)
        features.append(encoded.features)
        on_progress(start + len(pixels), len(data))
    return Encodings(codes.as_words(np.concatenate(packed)), np.concatenate(features), data.labels)


def _hamming_bits(stored: Encodings, asked: Encodings, query: int) -> NDArray[np.int64]:
    differing = np.bitwise_count(stored.words ^ asked.words[:, query, np.newaxis])
    total: NDArray[np.int64] = differing.sum(axis=0, dtype=np.int64)
    return total


def _accuracy(checkpoint: Checkpoint, asked: Encodings) -> float:
    """Classify from F7, which saves another pass over the images."""
    network = checkpoint.network
    with torch.inference_mode():
        features = torch.from_numpy(asked.features).to(network.classifier.weight.device)
        activations = torch.sigmoid(network.hash_norm(network.hash_layer(features)))
        guesses = network.classifier(activations).argmax(1).cpu().numpy()
    return float((guesses == asked.labels).mean())


def _coarse(stored: Encodings, asked: Encodings, on_progress: OnProgress) -> dict[str, float]:
    ranks = np.arange(1, len(stored.labels) + 1)
    sums = np.zeros(2)
    n = len(asked.labels)
    for query in range(n):
        order = np.argsort(_hamming_bits(stored, asked, query).astype(np.uint16), kind="stable")
        right = stored.labels[order] == asked.labels[query]
        precision = np.cumsum(right) / ranks
        for column, depth in enumerate((1000, len(ranks))):
            n_right = int(right[:depth].sum())
            if n_right:
                sums[column] += float(precision[:depth] @ right[:depth]) / n_right
        if query % 50 == 49 or query + 1 == n:
            on_progress(query + 1, n)
    return {"coarse_map_at_1000": float(sums[0] / n), "coarse_map_full": float(sums[1] / n)}


def _two_stage(stored: Encodings, asked: Encodings, on_progress: OnProgress) -> dict[str, float]:
    depths = (10, 100)
    sums = np.zeros(len(depths))
    n = min(FINE_QUERIES, len(asked.labels))
    for query in range(n):
        nearest = two_stage_order(stored, asked, query)
        right = stored.labels[nearest] == asked.labels[query]
        sums += [right[:depth].mean() for depth in depths]
        if query % 50 == 49 or query + 1 == n:
            on_progress(query + 1, n)
    return {
        f"two_stage_precision_at_{depth}": float(total / n)
        for depth, total in zip(depths, sums, strict=True)
    }


def two_stage_order(stored: Encodings, asked: Encodings, query: int) -> NDArray[Any]:
    """Rank the smallest complete ball of at least `MIN_POOL` rows by Euclidean distance of F7.

    Plain and slow: the search service is what does this fast.

    Returns
    -------
    ndarray
        Rows of `stored`, nearest first.
    """
    distances = _hamming_bits(stored, asked, query)
    wanted = min(MIN_POOL, len(distances))
    pool = np.flatnonzero(distances <= np.partition(distances, wanted - 1)[wanted - 1])
    gaps = stored.features[pool] - asked.features[query]
    return pool[np.argsort(np.einsum("ij,ij->i", gaps, gaps), kind="stable")]
