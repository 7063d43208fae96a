"""The same question asked of the real services: bytes in, hits out, over gRPC."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoder_service.data.types import Source
from encoder_service.evaluation.config import EvaluateConfig
from encoder_service.evaluation.encodings import Encodings
from encoder_service.evaluation.local import OnStep, predict
from encoder_service.evaluation.protocols import Parts
from encoder_service.evaluation.rankings import AP_DEPTH, MIN_POOL, OnProgress
from encoder_service.model.checkpoint import Checkpoint
from hashlens import codes
from hashlens.cli.child import LogSink
from hashlens.cli.connect import connected
from hashlens.cli.extras import require
from hashlens.cli.ingest import CALL_DEADLINE_S, encode_patiently, pipelined
from hashlens.cli.processes import ServicesConfig, running
from hashlens.client import Client
from hashlens.client.wire import spec_for
from hashlens.errors import HashlensError, InvalidInputError, PreconditionError
from hashlens.types import (
    CollectionSpec,
    Embedding,
    FeatureDtype,
    Item,
    Query,
    Rank,
    SearchOptions,
)

SERVED = ("coarse", "coarse_soft", "two_stage")
"""The rankings that the search service gives."""

_BATCH_IMAGES = 64
_BATCH_QUERIES = 16
_WORKERS = 3

ServedRows = dict[str, NDArray[np.int32]]
"""Ranking -> rows of the database, best first, ``[n_queries, n_hits]``."""


def encode_and_search(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    parts: Parts,
    on_progress: OnStep,
    on_line: LogSink = lambda name, line: None,
) -> tuple[Encodings, Encodings | None, ServedRows]:
    """Encode, index and search by the services.

    The images go into a collection of a new name, which is dropped again, also when this fails or
    is interrupted.

    Parameters
    ----------
    config
        Where the services are; both are started, and stopped, where it does not say.
    checkpoint
        The model that the encoder is to serve.
    parts
        Who asks and what is searched.
    on_progress
        Shows progress.
    on_line
        Gets what services that are started here log.

    Returns
    -------
    database, queries, served
        `queries` is None where the database's own images ask.

    Raises
    ------
    PreconditionError
        The encoder serves another model.
    InvalidInputError
        An image cannot be read; the message names it.
    UnavailableError
        A service is away.
    """
    with _client(config, on_line) as client:
        model = client.model()
        if model.model_id != checkpoint.model_id:
            raise PreconditionError(
                f"the encoder serves model {model.model_id}, the checkpoint is "
                f"{checkpoint.model_id}. Give the served model's file with --checkpoint, or start "
                "the encoder with this one."
            )
        name = f"evaluate-{uuid.uuid4().hex[:16]}"
        spec = spec_for(name, model, FeatureDtype.F16, max(1, len(parts.database)))
        stored = _encode(
            client, spec, checkpoint, parts.database, on_progress("Encoding the database")
        )
        asked = None
        if parts.queries is not None:
            asked = _encode(
                client, spec, checkpoint, parts.queries, on_progress("Encoding the queries")
            )
        client.create_collection(name, spec=spec)
        try:
            _store(client, spec, stored, on_progress("Storing"))
            served = {
                ranking: _search(client, spec, ranking, stored, asked, parts, on_progress)
                for ranking in SERVED
            }
        finally:
            # What went wrong before is what is to be told.
            with suppress(HashlensError):
                client.drop_collection(name)
    return stored, asked, served


@contextmanager
def _client(config: EvaluateConfig, on_line: LogSink) -> Iterator[Client]:
    if config.encoder is not None and config.search is not None:
        with connected(config.search, config.encoder) as client:
            yield client
        return
    require("encoder", "search", purpose="hashlens evaluate without --local")
    # Killed in a hurry, the search service leaves a store that takes a moment to end.
    with tempfile.TemporaryDirectory(
        prefix="hashlens-evaluate-", ignore_cleanup_errors=True
    ) as folder:
        services = ServicesConfig(
            data=Path(folder, "data"),
            checkpoint=config.checkpoint,
            device=config.device,
            isolated=True,
        )
        with (
            running(services, on_line=on_line) as started,
            Client(started.search, started.encoder) as client,
        ):
            yield client


def _encode(
    client: Client,
    spec: CollectionSpec,
    checkpoint: Checkpoint,
    source: Source,
    on_progress: OnProgress,
) -> Encodings:
    n = len(source)
    packed = np.empty((n, codes.n_bytes(spec.n_bits)), dtype=np.uint8)
    features = np.empty((n, spec.dim), dtype=np.float16)
    activations = np.empty((n, spec.n_bits), dtype=np.float32)

    def work(rows: range) -> int:
        images = [source.image_bytes(row) for row in rows]
        results = encode_patiently(client, images, spec, with_activations=True)
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, InvalidInputError):
                raise InvalidInputError(f"{source.name(row)}: {result.message}", field="data")
            if isinstance(result, HashlensError):
                raise result
            embedding = result.embedding
            packed[row] = np.frombuffer(embedding.code, dtype=np.uint8)
            features[row], activations[row] = embedding.feature, embedding.activations
        return len(rows)

    _drive(work, n, _BATCH_IMAGES, on_progress)
    single = source.labels.ndim == 1
    return Encodings(
        packed,
        spec.n_bits,
        features,
        source.labels,
        activations,
        predict(checkpoint, activations, source.classes) if single else None,
    )


def _store(
    client: Client, spec: CollectionSpec, stored: Encodings, on_progress: OnProgress
) -> None:
    def work(rows: range) -> int:
        # Numbered so that ids order as rows do: that breaks ties.
        items = [Item(id=f"{row:08d}", embedding=_embedding(spec, stored, row)) for row in rows]
        written = client.upsert(spec.name, items, deadline_s=CALL_DEADLINE_S)
        written.raise_for_failures()
        return written.n_written

    _drive(work, len(stored), _BATCH_IMAGES, on_progress)


def _search(
    client: Client,
    spec: CollectionSpec,
    ranking: str,
    stored: Encodings,
    asked: Encodings | None,
    parts: Parts,
    on_progress: OnStep,
) -> NDArray[np.int32]:
    """Return the first hits of every query."""
    own = asked is None
    queries = stored if asked is None else asked
    rows = np.arange(len(queries)) if parts.query_rows is None else parts.query_rows
    n_hits = min(AP_DEPTH, len(stored) - own)
    options = SearchOptions(
        k=n_hits + own,  # one more, to drop the query itself
        min_pool=MIN_POOL,
        rank=Rank.EUCLIDEAN if ranking == "two_stage" else Rank.HAMMING,
        ignore_margins=ranking == "coarse",
        with_payload=False,
    )
    found = np.empty((len(rows), n_hits), dtype=np.int32)

    def work(batch: range) -> int:
        embeddings = [_embedding(spec, queries, int(rows[i])) for i in batch]
        results = client.search_batch(
            spec.name,
            [Query(embedding=embedding) for embedding in embeddings],
            options=options,
            deadline_s=CALL_DEADLINE_S,
        )
        for i, result in zip(batch, results, strict=True):
            if isinstance(result, HashlensError):
                raise result
            hits = np.array([int(hit.id) for hit in result.hits], dtype=np.int32)
            found[i] = (hits[hits != rows[i]] if own else hits)[:n_hits]
        return len(batch)

    _drive(work, len(rows), _BATCH_QUERIES, on_progress(f"Searching: {ranking}"))
    return found


def _embedding(spec: CollectionSpec, encodings: Encodings, row: int) -> Embedding:
    activations = encodings.activations
    return Embedding(
        code=encodings.codes[row].tobytes(),
        n_bits=spec.n_bits,
        model_id=spec.model_id,
        feature=encodings.features[row],
        activations=None if activations is None else activations[row],
    )


def _drive(work: Callable[[range], int], n: int, size: int, on_progress: OnProgress) -> None:
    """Do `work` for batches of rows, several at a time."""
    done = 0
    batches = [range(lo, min(lo + size, n)) for lo in range(0, n, size)]
    for n_done in pipelined(work, batches, _WORKERS):
        done += n_done
        on_progress(done, n)
