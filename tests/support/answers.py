"""Many searches from many threads through one executor, and a digest of every answer.

``python -m tests.support.answers 2`` prints it, so that a test can ask for it under another
environment and compare.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from hashlens import codes
from hashlens.types import Rank, SearchOptions
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.executor import Executor
from search_service.kernels import euclidean
from search_service.one_query import embedding_of
from search_service.sketch import Sketch
from search_service.snapshot import Snapshot


def digest(n_threads: int) -> str:
    rng = np.random.default_rng(5)
    # One that all threads scan and two that one thread does.
    tables = ((140_000, np.float32, 1), (20_000, np.float16, 1e-6), (20_000, np.float16, 100))
    snapshots = [
        Snapshot.from_arrays(
            codes.pack(rng.random((n, 100)) < 0.5),
            n_bits=100,
            features=(rng.standard_normal((n, 37)) * scale).astype(dtype),
            rows_per_segment=1024,
        )
        for n, dtype, scale in tables
    ]
    options = SearchOptions(k=50, min_pool=3000)
    soft = replace(options, rank=Rank.HAMMING)
    activations = rng.random(100).astype(np.float32)
    found: dict[int, Any] = {}
    with Executor(n_threads=n_threads) as executor:
        engine = Engine()
        executor.run_blocking(lambda cancel: engine.warm_up())

        def ask(i: int) -> None:
            snapshot = snapshots[i % 3]
            query = replace(embedding_of(snapshot, str(i)), activations=activations)
            found[i] = [
                executor.run_blocking(
                    lambda cancel, asked=asked: engine.search(snapshot, query, asked, cancel)
                ).value.hits
                for asked in (options, soft)
            ]

        callers = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        estimates = [
            executor.run_blocking(lambda cancel, s=s: sketched(s)).value for s in snapshots
        ]
        widened = executor.run_blocking(lambda cancel: every_half()).value
    answers = repr([found[i] for i in range(12)]).encode()
    return hashlib.sha256(answers + b"".join(estimates) + widened.tobytes()).hexdigest()


def sketched(snapshot: Snapshot) -> bytes:
    """What a sketch says of the distances to the first row."""
    sketch = Sketch(snapshot.dim)
    while (larger := sketch.extended(snapshot, max_bytes=1 << 30)) is not sketch:
        sketch = larger
    query = snapshot.feature_of(0).astype(np.float32)
    return sketch.bounds(np.arange(snapshot.rows), query, Cancel())[0].tobytes()


def every_half() -> np.ndarray:
    """The distance of every float16 to zero, in the order of their bits."""
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    out = np.empty(2**16, dtype=np.float32)
    address = np.array([halves.__array_interface__["data"][0]], dtype=np.int64)
    zero = np.zeros(1, dtype=np.float32)
    euclidean.distances(address, 20, True, np.arange(2**16), zero, out)
    return out


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(digest(int(sys.argv[1])))
