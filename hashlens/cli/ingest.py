"""Images into a collection, with reading, encoding and writing overlapped and memory bounded."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from hashlens.client import Client
from hashlens.errors import HashlensError, OverloadedError, UnavailableError
from hashlens.types import CollectionSpec, Encoded

T = TypeVar("T")
R = TypeVar("R")

CALL_DEADLINE_S = 120.0
"""Time for one batch: a large model on few cores takes a while."""

MAX_ATTEMPTS = 12
"""How often a batch, or what is left of it, is sent to an encoder that is overloaded."""

MAX_PAUSE_S = 10.0
"""Longest pause between two attempts, in seconds."""


def pipelined(work: Callable[[T], R], batches: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``work(batch)`` for each batch, in order, with `workers` of them at work at once.

    At most twice as many batches are begun or waiting to be taken. When the caller stops early,
    or a batch raises, no further ones are begun.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ingest")
    window: deque[Future[R]] = deque()
    try:
        for batch in batches:
            if len(window) >= 2 * workers:
                yield window.popleft().result()
            window.append(pool.submit(work, batch))
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_patiently(
    client: Client,
    images: Sequence[bytes],
    spec: CollectionSpec,
    *,
    with_activations: bool = False,
) -> list[Encoded | HashlensError]:
    """Encode for a collection, coming back for images that an overloaded encoder refused.

    Returns
    -------
    list
        For each image its embedding or why it has none, never an `OverloadedError`.

    Raises
    ------
    HashlensError
        Nothing more can be encoded: the encoder is away, say.
    """
    results: dict[int, Encoded | HashlensError] = {}
    pending = list(range(len(images)))
    for attempt in range(MAX_ATTEMPTS):
        try:
            answers = client.encode_batch(
                [images[i] for i in pending],
                feature_dtype=spec.feature_dtype,
                with_activations=with_activations,
                deadline_s=CALL_DEADLINE_S,
            )
        except OverloadedError as error:
            answers = [error] * len(pending)
        results.update(zip(pending, answers, strict=True))
        refused = [r for r in answers if isinstance(r, OverloadedError)]
        if not refused:
            return [results[i] for i in range(len(images))]
        pending = [i for i in pending if isinstance(results[i], OverloadedError)]
        pause(attempt, max(error.retry_after_s for error in refused))
    raise UnavailableError(
        f"the encoder was overloaded {MAX_ATTEMPTS} times in a row: try again later, or with "
        "fewer --workers"
    )


def pause(attempt: int, retry_after_s: float) -> None:
    """Sleep for as long as the server asked, doubled with each attempt, with jitter."""
    pause_s = min(MAX_PAUSE_S, retry_after_s * 2**attempt)
    threading.Event().wait(pause_s * random.uniform(0.5, 1.0))
