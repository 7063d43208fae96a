"""`hashlens bench pool`: what a pool policy costs, and what it finds of exhaustive F7."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hashlens.cli.progress import step
from hashlens.cli.text import console
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from hashlens.types import Embedding, Receipt
from search_service.bench import embeddings as real
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.embeddings import Embeddings
from search_service.bench.machine import describe
from search_service.bench.policies import PRECISION_K, Coarse, K, Policy, Tally, policies
from search_service.bench.report import Measured, Report, WrongAnswerError
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.executor import Executor
from search_service.exhaustive import ExhaustiveScan
from search_service.fine import distances_to
from search_service.kernels import select
from search_service.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class PoolConfig(BenchConfig):
    """Options of ``hashlens bench pool``."""

    embeddings: Path | None = setting(
        None, "An .npz of codes and features: read if it is there, else written for the next run."
    )
    pictures: Path | None = setting(
        None,
        "Folder of Fashion-MNIST's four .gz files; without, the 5,000 test pictures that come with "
        "Hashlens.",
    )
    queries: int = setting(300, "Test pictures that are held out and asked by.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < self.repeats:
            raise InvalidInputError("queries is at least repeats", field="queries")


@dataclass(frozen=True, slots=True, eq=False)
class _Database:
    name: str
    rows: NDArray[np.int64]
    """Of the embeddings."""


@click.command()
@options(PoolConfig, "bench")
def pool(config: PoolConfig) -> None:
    """Measure pool policies on real codes: recall against exhaustive F7, rows ranked, time.

    Pictures go through a real encoder service with the bundled checkpoint. Test pictures ask; they
    are in no database. The recall of every query is counted over all rows; the engine is timed on
    some of the queries, and must give what was counted.
    """
    check_outputs(config)
    found = _embeddings(config)
    asked, databases = _split(found, config)
    results: list[Measured] = []
    with Executor(n_threads=config.threads) as executor:
        machine = executor.run_blocking(lambda cancel: describe()).value
        for database in databases:
            snapshot = Snapshot.from_arrays(
                found.packed[database.rows],
                n_bits=found.n_bits,
                features=found.features[database.rows],
                # Of one width, so that ids are ordered as rows.
                ids=[f"{row:06}" for row in range(len(database.rows))],
                model_id=found.model_id,
            )
            labels = found.labels[database.rows]
            work = partial(_measure, database.name, snapshot, found, asked, labels, config)
            results += executor.run_blocking(work).value
    settings = {"queries": len(asked), "model_id": found.model_id, **_crispness(found, databases)}
    publish(Report("pool", machine, results, settings), config, drawn)


def _embeddings(config: PoolConfig) -> Embeddings:
    path = config.embeddings
    if path is not None and path.exists():
        return Embeddings.load(path)
    if path is not None and not path.parent.is_dir():
        raise click.UsageError(f"there is no folder {path.parent} to write {path.name} into")
    found = real.encode(real.read_pictures(config.pictures))
    if path is not None:
        found.save(path)
    return found


def _split(found: Embeddings, config: PoolConfig) -> tuple[NDArray[np.int64], list[_Database]]:
    """Return the rows that ask, and what is searched."""
    test = np.flatnonzero(found.is_test)
    shuffled = np.random.default_rng(config.seed).permutation(test)
    asked, stored = shuffled[: config.queries], np.sort(shuffled[config.queries :])
    if len(stored) < K[-1]:
        raise InvalidInputError(
            f"{len(test):,} test pictures are too few for {config.queries:,} queries: ask fewer",
            field="queries",
        )
    databases = [_Database("test", stored)]
    train = np.flatnonzero(~found.is_test)
    if len(train):
        databases.append(_Database("all", np.concatenate([train, stored])))
    return asked, databases


def _crispness(found: Embeddings, databases: list[_Database]) -> dict[str, Any]:
    """Say how sure the model is of what it was trained on, and of what not."""
    margins = np.abs(found.activations - 0.5).mean(axis=1)
    known = {"test": margins[found.is_test], "train": margins[~found.is_test]}
    return {
        **{f"mean_margin_{name}": float(m.mean()) for name, m in known.items() if len(m)},
        "distinct_codes": {d.name: len(np.unique(found.packed[d.rows], axis=0)) for d in databases},
    }


def _measure(
    name: str,
    snapshot: Snapshot,
    found: Embeddings,
    asked: NDArray[np.int64],
    labels: NDArray[np.uint8],
    config: PoolConfig,
    cancel: Cancel,
) -> list[Measured]:
    chosen = policies(snapshot.rows)
    tallies = {policy: Tally() for policy in chosen}
    exhaustive_ms: list[float] = []
    exhaustive_precision: list[float] = []
    engine = Engine()
    engine.warm_up()
    with step(console(stderr=True), f"Asking {name}", len(asked), "queries") as advance:
        for number, row in enumerate(asked.tolist()):
            cancel.check()
            query = found.query(row)
            coarse = Coarse.of(snapshot, query)
            nearest = _nearest(snapshot, coarse, query)
            is_right = labels[nearest] == found.labels[row]
            exhaustive_precision.append(float(is_right[:PRECISION_K].mean()))
            for policy in chosen:
                tallies[policy].count(policy, coarse, nearest, is_right)
            if number < config.repeats:
                exhaustive_ms.append(_check_exhaustive(snapshot, query, nearest))
                # In turn, so that the machine's moods meet all policies alike.
                for policy in chosen:
                    receipt = _searched(engine, snapshot, query, policy, coarse, nearest)
                    tallies[policy].receipts.append(receipt)
            advance(1)
    results = [tallies[policy].measured(name, policy, snapshot) for policy in chosen]
    scan_ms = float(np.median(exhaustive_ms))
    read_bytes = snapshot.rows * snapshot.dim * snapshot.feature_dtype.n_bytes
    results.append(
        Measured(
            case=f"{name}: exhaustive, as an audit's",
            rows=snapshot.rows,
            bits=snapshot.n_bits,
            k=K[-1],
            ours_ms=scan_ms,
            gb_per_s=read_bytes / scan_ms / 1e6,
            extra={
                "fine_ms": scan_ms,
                "pool": snapshot.rows,
                "pool_p95": snapshot.rows,
                f"class@{PRECISION_K}": float(np.mean(exhaustive_precision)),
            },
        )
    )
    return results


def _nearest(snapshot: Snapshot, coarse: Coarse, query: Embedding) -> NDArray[np.int64]:
    """Return all rows by (Euclidean distance, Hamming distance, id)."""
    vector = np.ascontiguousarray(query.feature, dtype=np.float32)
    rows = np.arange(snapshot.rows, dtype=np.int64)
    distances = distances_to(snapshot, rows, vector, Cancel())
    keys = select.euclidean_keys(distances, coarse.hamming_bits)
    return np.argsort(keys, kind="stable")


def _searched(
    engine: Engine,
    snapshot: Snapshot,
    query: Embedding,
    policy: Policy,
    coarse: Coarse,
    nearest: NDArray[np.int64],
) -> Receipt:
    """Search, and check that the engine says and finds what was counted."""
    pool = policy.pool(coarse)
    receipt = engine.search(snapshot, query, policy.options).receipt
    said = (receipt.threshold_bits, receipt.pool_size, receipt.pool_truncated, receipt.exact)
    is_cut = policy.is_cut(coarse)
    pool_size = int(np.count_nonzero(pool))
    if said != (policy.threshold_bits(coarse), pool_size, is_cut, not is_cut):
        raise WrongAnswerError(f"{policy.name}: the receipt says {said}, which is not so")
    deepest = replace(policy.options, k=policy.depths[-1])
    hits = engine.search(snapshot, query, deepest).hits
    if [int(hit.id) for hit in hits] != nearest[pool[nearest]][: deepest.k].tolist():
        raise WrongAnswerError(f"{policy.name}: the answer is not the nearest of its pool")
    return receipt


def _check_exhaustive(snapshot: Snapshot, query: Embedding, nearest: NDArray[np.int64]) -> float:
    """Check the ceiling, by an audit's scan and by NumPy; return what the scan took, in ms."""
    began_ns = time.perf_counter_ns()
    scan = ExhaustiveScan(snapshot, query, K[-1])
    for first_row in scan.blocks:
        scan.scan(first_row, Cancel())
    found = scan.nearest()
    took_ms = (time.perf_counter_ns() - began_ns) / 1e6
    if found.rows.tolist() != nearest[: K[-1]].tolist():
        raise WrongAnswerError("an audit's exhaustive scan finds other rows")
    assert query.feature is not None
    asked = query.feature.astype(np.float64)
    # NumPy adds in another order: the same distances, up to rounding.
    distances = np.concatenate(
        [
            np.linalg.norm(segment.astype(np.float64) - asked, axis=1)
            for segment in snapshot.features
        ]
    )
    if not np.allclose(np.sort(distances)[: K[-1]], distances[nearest[: K[-1]]], rtol=1e-5):
        raise WrongAnswerError("NumPy finds nearer rows")
    return took_ms


def drawn(report: Report) -> bytes:
    """Draw recall against the rows that the fine stage ranked, and return a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    databases = list(dict.fromkeys(result.case.partition(":")[0] for result in report.results))
    figure = Figure(figsize=(5.0 * len(databases), 4.2), layout="constrained")
    panels = figure.subplots(1, len(databases), squeeze=False, sharey=True)[0]
    for axes, database in zip(panels, databases, strict=True):
        of_database = [r for r in report.results if r.case.startswith(f"{database}:")]
        for depth, colour in zip(K, ("#0072B2", "#E69F00", "#009E73"), strict=True):
            for kind, marker in (("radius", "s"), ("max_pool", "x"), ("min_pool", "o")):
                points = [
                    (result.extra["pool"], result.extra[f"recall@{depth}"])
                    for result in of_database
                    if f"recall@{depth}" in result.extra and _kind(result) == kind
                ]
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    marker,
                    color=colour,
                    linestyle="-" if kind == "min_pool" else "none",
                    label=f"recall@{depth}, {_KINDS[kind]}",
                )
        axes.set(
            xscale="log",
            xlabel="rows that the fine stage ranks, mean",
            title=f"{database}, {of_database[0].rows:,} rows",
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True, which="both", axis="x", alpha=0.2)
        axes.grid(visible=True, axis="y", alpha=0.3)
    panels[0].set(ylabel="share of exhaustive search's answer", ylim=(0, 1.02))
    panels[-1].legend(fontsize="x-small")
    figure.suptitle(f"bench pool, {report.machine.date}", fontsize="x-small")
    out = BytesIO()
    figure.savefig(
        out, format="png", dpi=120, metadata={"Software": f"matplotlib {mpl.__version__}"}
    )
    return out.getvalue()


_KINDS = {"min_pool": "automatic ball", "max_pool": "cut by max_pool", "radius": "fixed radius"}


def _kind(result: Measured) -> str:
    return next((kind for kind in ("radius", "max_pool", "min_pool") if kind in result.case), "")
