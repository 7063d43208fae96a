"""The encoder in this process: images -> encodings -> numbers. Usable in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoder_service.data.images import ImageSet
from encoder_service.encoder import Encoder
from encoder_service.evaluation.encodings import Encodings, n_distinct
from encoder_service.evaluation.evaluate import evaluate_encodings
from encoder_service.evaluation.rankings import OnProgress
from encoder_service.evaluation.results import Evaluation
from encoder_service.model.checkpoint import Checkpoint
from hashlens import codes, evaluation
from hashlens.cpus import usable_cpus
from hashlens.errors import InvalidInputError
from hashlens.ties import TieGroups

MEASURED = ("coarse", "two_stage", "exhaustive")
"""Rankings whose numbers go into a checkpoint."""

OnStep = Callable[[str], OnProgress]
"""Given the name of a step, returns what is told how far it is."""

_BATCH = 256
_QUICK_QUERIES = 256


def nothing(what: str) -> OnProgress:
    """Show no progress."""
    return lambda done, total: None


def measure(
    checkpoint: Checkpoint,
    database: ImageSet,
    queries: ImageSet,
    *,
    device: str = "auto",
    on_progress: OnStep = nothing,
) -> dict[str, float]:
    """Measure what is kept with a checkpoint: classification, `lin2015` and `split`.

    Parameters
    ----------
    checkpoint
        The model.
    database
        The images it was trained on.
    queries
        Images it was not trained on, with the same classes.
    device
        Where to run the model.
    on_progress
        Shows progress.

    Returns
    -------
    dict
        ``test_accuracy`` (of images with one label each), ``test_distinct_codes``,
        ``database_distinct_codes``, and ``PROTOCOL_RANKING_METRIC`` for both protocols (see
        `results.PROTOCOLS`), each of `MEASURED`, and ``map_full``, ``map_at_1000``,
        ``precision_at_10`` and ``tie_aware_map_full``. What the database is too small for is
        missing.
    """
    stored = encode_images(checkpoint, database, device=device, on_progress=on_progress("database"))
    asked = encode_images(checkpoint, queries, device=device, on_progress=on_progress("queries"))
    found = {
        "test_distinct_codes": float(n_distinct(asked.codes)),
        "database_distinct_codes": float(n_distinct(stored.codes)),
    }
    for protocol in ("lin2015", "split"):
        result = evaluate_encodings(
            stored if protocol == "lin2015" else asked,
            asked if protocol == "lin2015" else None,
            protocol=protocol,
            classes=queries.classes,
            rankings=MEASURED,
            on_progress=on_progress(f"rank: {protocol}"),
        )
        if result.accuracy is not None:
            found["test_accuracy"] = result.accuracy
        found |= flat(result)
    return found


def flat(result: Evaluation) -> dict[str, float]:
    """Return an evaluation's main numbers by names that say protocol, ranking and metric."""
    metrics = ("map_full", "map_at_1000", "precision_at_10", "tie_aware_map_full")
    return {
        f"{result.protocol}_{ranking}_{metric}": float(value)
        for ranking, summary in result.rankings.items()
        for metric in metrics
        if (value := getattr(summary, metric)) is not None
    }


def encode_images(
    checkpoint: Checkpoint,
    images: ImageSet,
    *,
    device: str = "auto",
    on_progress: OnProgress = lambda done, total: None,
) -> Encodings:
    """Run images through the encoder, as serving does.

    Parameters
    ----------
    checkpoint
        The model.
    images
        Of the size the checkpoint's preprocessing gives.
    device
        Where to run the model.
    on_progress
        Told how far it is.

    Returns
    -------
    Encodings
        With activations; with predictions where the model knows all of the images' classes and an
        image has one.
    """
    # As many encoders as CPUs share the weights: what comes before the model takes time as well.
    encoders: SimpleQueue[Encoder] = SimpleQueue()
    encoder = Encoder(checkpoint, device, n_threads=1)
    encoders.put(encoder)
    n_workers = 1
    if encoder.device.type == "cpu":
        n_workers = usable_cpus()
        for _ in range(n_workers - 1):
            encoders.put(Encoder(checkpoint, device, n_threads=1))
    n = len(images)
    packed = np.empty((n, codes.n_bytes(encoder.n_bits)), dtype=np.uint8)
    features = np.empty((n, encoder.dim), dtype=np.float16)
    activations = np.empty((n, encoder.n_bits), dtype=np.float32)

    def work(start: int) -> int:
        rows = np.arange(start, min(start + _BATCH, n))
        pixels = encoder.preprocessing.normalise(images.batch(rows)).transpose(0, 3, 1, 2)
        own = encoders.get()
        try:
            encoded = own.encode(pixels)
        finally:
            encoders.put(own)
        packed[rows], activations[rows] = encoded.codes, encoded.activations
        with np.errstate(over="ignore"):  # Encodings refuses what is infinite
            features[rows] = encoded.features
        return len(rows)

    done = 0
    with ThreadPoolExecutor(n_workers, thread_name_prefix="encode") as pool:
        for n_done in pool.map(work, range(0, n, _BATCH)):
            done += n_done
            on_progress(done, n)
    return Encodings(
        packed,
        encoder.n_bits,
        features,
        images.labels,
        activations,
        predict(checkpoint, activations, images.classes) if images.labels.ndim == 1 else None,
    )


def predict(
    checkpoint: Checkpoint, activations: NDArray[np.float32], classes: tuple[str, ...]
) -> NDArray[np.int64] | None:
    """Return the classifier's choices as positions in `classes`; None if it does not know them.

    Parameters
    ----------
    checkpoint
        The model: its classifier sees H only.
    activations
        H, float32 ``[n, n_bits]``.
    classes
        Names in the order of the data.
    """
    if not set(classes) <= set(checkpoint.classes):
        return None
    classifier = checkpoint.network.classifier
    with torch.inference_mode():
        given = torch.from_numpy(activations).to(classifier.weight.device)
        chosen = classifier(given).argmax(1).cpu().numpy()
    position = {name: i for i, name in enumerate(classes)}
    ours = np.array([position.get(name, -1) for name in checkpoint.classes], dtype=np.int64)
    return np.asarray(ours[chosen])


def quick_map(packed: NDArray[np.uint8], labels: NDArray[Any], n_bits: int) -> float:
    """Compute the tie-aware mAP of codes among themselves: fast enough for every epoch.

    Every image is a query for all the others, over the full list. 5,000 images take about half a
    second on one core.

    Parameters
    ----------
    packed
        Codes, uint8 ``[n, ceil(n_bits / 8)]``, n at least 2.
    labels
        int64 ``[n]``, or bool ``[n, n_classes]``: relevant is what shares a label.
    n_bits
        Code length, in bits.

    Raises
    ------
    InvalidInputError
        There are fewer than 2 images, or codes and labels do not belong together.
    """
    n = len(packed)
    if n < 2 or len(labels) != n:
        raise InvalidInputError(
            f"{n} codes and {len(labels)} labels: retrieval takes 2 images or more, each labelled.",
            field="labels",
        )
    words = codes.as_words(packed)
    total = 0.0
    for lo in range(0, n, _QUICK_QUERIES):
        queries = np.arange(lo, min(lo + _QUICK_QUERIES, n))
        hamming = np.zeros((len(queries), n), dtype=np.int64)
        for stored in words:
            hamming += np.bitwise_count(stored ^ stored[queries, np.newaxis])
        relevant = evaluation.shares_label(labels[queries], labels)
        # A bin for each query, distance, and relevance.
        hamming += np.arange(len(queries))[:, np.newaxis] * (n_bits + 1)
        hamming *= 2
        hamming += relevant
        shape = (len(queries), n_bits + 1, 2)
        counts = np.bincount(hamming.ravel(), minlength=int(np.prod(shape))).reshape(shape)
        # A query is its own nearest neighbour, and relevant to itself if it has a label.
        own = relevant[np.arange(len(queries)), queries].astype(np.int64)
        counts[np.arange(len(queries)), 0, own] -= 1
        groups = TieGroups.of_histograms(counts.sum(axis=2), counts[:, :, 1])
        total += float(groups.average_precision().sum())
    return total / n
