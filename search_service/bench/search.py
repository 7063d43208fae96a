"""`hashlens bench search`: both stages in this process, beside the same by other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import click
import numba
import numpy as np
from numpy.typing import NDArray

from hashlens.cli.extras import advice_for
from hashlens.cli.text import console
from hashlens.config import options, setting
from hashlens.errors import PreconditionError
from hashlens.types import Embedding, FeatureDtype, SearchOptions
from search_service.bench import machine, timing
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import make_codes, make_features
from search_service.bench.report import Measured, Report, WrongAnswerError
from search_service.engine import Engine
from search_service.snapshot import Snapshot

_PEERS = ("faiss", "numpy")
_QUERIES = 32
_CHECKED_QUERIES = 3
_TOLERANCE = 1e-4
"""Relative: float32 sums in another order differ by less."""

Answer = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Rows, best first, and their distances."""


@dataclass(frozen=True, kw_only=True)
class SearchBenchConfig(BenchConfig):
    """Options of `hashlens bench search`."""

    rows: int = setting(200_000, "How many rows.")
    bits: int = setting(48, "Code length.")
    dim: int = setting(1024, "Width of the feature.")
    dtype: Literal["f16", "f32"] = setting("f16", "Number format of the feature.")
    k: int = setting(1000, "Answers wanted.")
    min_pool: int = setting(5000, "Rows that the automatic radius must hold.")
    max_pool: int = setting(0, "Most rows that are ranked by feature; 0: no cap.")
    codes: Literal["uniform", "trained"] = setting("trained", "How codes are drawn.")


@click.command()
@options(SearchBenchConfig, "bench")
def search(config: SearchBenchConfig) -> None:
    """Measure whole two-stage searches through the engine, in this process.

    Peers do the same in two steps: all Hamming distances and the rows within the same radius, then
    the distances between features in that pool. faiss: IndexBinaryFlat.range_search and knn.
    """
    check_outputs(config)
    names = config.peers(_PEERS)
    if config.threads:
        numba.set_num_threads(config.threads)
    log = console(stderr=True)
    log.print(f"{config.rows:,} rows of {config.dim} numbers ...")
    dtype = FeatureDtype(config.dtype)
    table = make_codes(config.codes, config.rows, config.bits, n_queries=_QUERIES, seed=config.seed)
    features = make_features(table.classes, config.dim, dtype.numpy, seed=config.seed)
    snapshot = Snapshot.from_arrays(table.packed, n_bits=config.bits, features=features)
    asked = make_features(
        np.arange(_QUERIES, dtype=np.uint8) % 10,
        config.dim,
        np.dtype(np.float32),
        seed=config.seed,
        first_row=config.rows,
    )
    embeddings = [
        Embedding(table.queries[i].tobytes(), config.bits, "", feature=asked[i])
        for i in range(_QUERIES)
    ]
    wanted = SearchOptions(
        k=min(config.k, config.rows),
        min_pool=config.min_pool,
        max_pool=config.max_pool or None,
        with_payload=False,
    )
    engine = Engine()
    receipts = [engine.search(snapshot, one, wanted).receipt for one in embeddings]
    radii = [receipt.threshold_bits for receipt in receipts]
    contenders: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: engine.search(snapshot, embeddings[i % _QUERIES], wanted)
    }
    exact = all(not receipt.pool_truncated for receipt in receipts)
    for name in ("numpy", *(n for n in names if n != "numpy")):
        answer = _peer(name, table.packed, features, table.queries, asked, radii, wanted.k)
        if exact:  # Peers know no order inside the last ring, so a cut pool is not theirs.
            for query in range(_CHECKED_QUERIES):
                _check(engine, snapshot, embeddings[query], wanted, answer(query), name)
            if name in names:
                contenders[name] = lambda i, of=answer: of(i % _QUERIES)  # type: ignore[misc]
    times = timing.interleaved(contenders, repeats=config.repeats)
    ours_ms = times.pop("ours").median_ms
    pool = float(np.median([receipt.pool_size for receipt in receipts]))
    code_bytes = sum(word.nbytes for word in snapshot.words)
    result = Measured(
        case=f"two stages, {config.codes}, dim {config.dim} {config.dtype}",
        rows=config.rows,
        bits=config.bits,
        k=wanted.k,
        ours_ms=ours_ms,
        peer_ms={name: found.median_ms for name, found in times.items()},
        gb_per_s=(code_bytes + pool * config.dim * dtype.n_bytes) / ours_ms / 1e6,
        recall=1.0 if exact else None,
        extra={
            "pool": int(pool),
            "coarse_ms": _stage_ms(engine, snapshot, embeddings, wanted, "coarse_ns"),
            "fine_ms": _stage_ms(engine, snapshot, embeddings, wanted, "fine_ns"),
            "fetch_ms": _stage_ms(engine, snapshot, embeddings, wanted, "fetch_ns"),
        },
    )
    settings = {"codes": config.codes, "min_pool": config.min_pool, "max_pool": config.max_pool}
    publish(Report("search", machine.describe(), [result], settings), config)


def _stage_ms(
    engine: Engine,
    snapshot: Snapshot,
    embeddings: list[Embedding],
    wanted: SearchOptions,
    stage: str,
) -> float:
    timings = [engine.search(snapshot, one, wanted).receipt.timings for one in embeddings]
    return float(np.median([getattr(timing, stage) for timing in timings])) / 1e6


def _peer(
    name: str,
    packed: NDArray[np.uint8],
    features: NDArray[Any],
    queries: NDArray[np.uint8],
    asked: NDArray[np.float32],
    radii: list[int],
    k: int,
) -> Callable[[int], Answer]:
    if name == "numpy":

        def by_numpy(i: int) -> Answer:
            differing = np.bitwise_count(packed ^ queries[i]).sum(axis=1, dtype=np.uint16)
            rows = np.flatnonzero(differing <= radii[i])
            gaps = features[rows].astype(np.float32) - asked[i]
            distances = np.sqrt(np.einsum("ij,ij->i", gaps, gaps))
            order = np.argsort(distances, kind="stable")[:k]
            return rows[order], distances[order]

        return by_numpy
    try:
        import faiss
    except ImportError as error:
        raise PreconditionError(f"the peer {name} {advice_for(error)}") from None
    faiss.omp_set_num_threads(numba.get_num_threads())
    index = faiss.IndexBinaryFlat(8 * packed.shape[1])
    index.add(packed)

    def by_faiss(i: int) -> Answer:
        _, _, rows = index.range_search(queries[i : i + 1], radii[i] + 1)
        rows = np.sort(rows)
        gathered = features[rows].astype(np.float32)
        squared, places = faiss.knn(asked[i : i + 1], gathered, min(k, len(rows)))
        return rows[places[0]], np.sqrt(squared[0])

    return by_faiss


def _check(
    engine: Engine,
    snapshot: Snapshot,
    query: Embedding,
    wanted: SearchOptions,
    answer: Answer,
    name: str,
) -> None:
    """Compare with a peer, whose sums may differ in the last digits."""
    hits = engine.search(snapshot, query, wanted).hits
    ours = np.array([hit.distance for hit in hits], dtype=np.float32)
    rows, distances = answer
    if len(ours) != len(rows) or not np.allclose(ours, distances, rtol=_TOLERANCE, atol=0.05):
        raise WrongAnswerError(f"the k distances differ from those of {name}")
    mine = {int(hit.id) for hit in hits}
    edge = float(ours[-1]) * (1 - _TOLERANCE) - 0.05
    surely = {int(row) for row, far in zip(rows, distances, strict=True) if far < edge}
    if not surely <= mine:
        raise WrongAnswerError(f"the answer lacks rows that {name} has")
