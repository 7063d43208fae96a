"""`hashlens bench coarse`: Hamming distance, beside its peers and a plain pass over the codes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import click
import numba
import numpy as np
from numpy.typing import NDArray

from hashlens.cli.text import console
from hashlens.config import options, setting
from search_service.bench import machine, peers, timing
from search_service.bench.asker import Asker, check_same, planted, snapshot_of, sorted_distances
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import CodeSet, make_codes
from search_service.bench.report import Measured, Report
from search_service.multi_index import MultiIndex
from search_service.snapshot import Snapshot

_SMALL_RADIUS_BITS = 4
_CHECKED_QUERIES = 5


@dataclass(frozen=True, kw_only=True)
class CoarseConfig(BenchConfig):
    """Options of `hashlens bench coarse`."""

    rows: str = setting("2500000", "How many codes, comma-separated for several tables.")
    bits: str = setting("64", "Code length, comma-separated for several.")
    k: int = setting(1000, "Nearest rows that are asked for.")
    codes: Literal["uniform", "trained", "both"] = setting("uniform", "How codes are drawn.")
    batch: int = setting(64, "Queries of a batch.")
    index: bool = setting(True, "Measure small radii by multi-index hashing, too.")


@click.command()
@options(CoarseConfig, "bench")
def coarse(config: CoarseConfig) -> None:
    """Measure the Hamming stage: nearest rows, balls, batches, small radii.

    \b
    nearest   the k nearest, ordered by (distance, row), from a complete automatic ball
    ball      all rows within the radius that the k nearest need
    batch     the same as nearest for many queries at once, per query
    small     all rows within 4 bits, by scan and by multi-index hashing; a neighbour is planted
    pass      reading all codes and writing all distances, nothing else: what a scan costs at least
    """
    check_outputs(config)
    wanted = config.peers(peers.COARSE)
    if config.threads:
        numba.set_num_threads(config.threads)
    log = console(stderr=True)
    results: list[Measured] = []
    kinds: tuple[Literal["uniform", "trained"], ...] = ("uniform", "trained")
    for kind in kinds if config.codes == "both" else (config.codes,):
        for rows in _numbers(config.rows):
            for bits in _numbers(config.bits):
                log.print(f"{rows:,} {kind} codes of {bits} bits ...")
                table = make_codes(kind, rows, bits, n_queries=config.batch, seed=config.seed)
                results += _measure(config, kind, table, wanted)
    packages = tuple(
        {"faiss": "faiss-cpu"}.get(name, name)
        for name in dict.fromkeys(peer.partition("-")[0] for peer in wanted)
        if name != "numpy"
    )
    publish(
        Report("coarse", machine.describe(packages=packages), results, _settings(config)), config
    )


def _measure(
    config: CoarseConfig, kind: str, table: CodeSet, names: list[str]
) -> Iterator[Measured]:
    snapshot = snapshot_of(table)
    asker = Asker(snapshot, table)
    n_threads = numba.get_num_threads()
    others = [peers.open_peer(name, table.packed, n_threads) for name in names]
    k = min(config.k, snapshot.rows)
    radius = asker.pool(0, n_rows=k).threshold_bits
    bytes_read = 8 * len(snapshot.words) * snapshot.rows
    every = range(config.batch)

    def line(case: str, ours: Callable[[int], Any], **more: Any) -> Measured:
        return _line(
            config, f"{case}, {kind}", snapshot, ours, others, table, bytes_read=bytes_read, **more
        )

    for query in range(min(_CHECKED_QUERIES, config.batch)):
        asker.check(query, k=k, radius_bits=radius)
    asker.check_batch(k)
    yield line("pass", asker.plain_pass, k=0)
    yield line("nearest", lambda i: asker.nearest(i, k), k=k, peer_call=_nearest(table, k, 1))
    yield line(
        f"ball of {radius} bits",
        lambda i: asker.pool(i, radius_bits=radius),
        k=0,
        peer_call=_within(table.queries, radius),
        extra={"found": int(asker.pool(0, radius_bits=radius).rows.shape[0])},
    )
    yield line(
        f"batch of {config.batch}",
        lambda i: asker.nearest_of(every, k),
        k=k,
        peer_call=_nearest(table, k, config.batch),
        share=config.batch,
    )
    if config.index:
        yield from _small_radius(config, line, asker, snapshot, table)


def _small_radius(
    config: CoarseConfig,
    line: Callable[..., Measured],
    asker: Asker,
    snapshot: Snapshot,
    table: CodeSet,
) -> Iterator[Measured]:
    radius = min(_SMALL_RADIUS_BITS, table.n_bits)
    near = planted(table, config.batch, config.seed)
    asker = Asker(snapshot, near)
    index = MultiIndex().extended(snapshot)
    for query in range(config.batch):
        asker.check_index(index, query, radius)
    peer_call = _within(near.queries, radius)
    yield line(
        f"within {radius} bits, scan",
        lambda i: asker.pool(i, radius_bits=radius),
        k=0,
        peer_call=peer_call,
        radius_bits=radius,
    )
    scan_ms = timing.interleaved(
        {
            "scan": lambda i: asker.pool(i, radius_bits=radius),
            "index": lambda i: asker.pool(i, radius_bits=radius, index=index),
        },
        repeats=config.repeats,
    )
    pools = [asker.pool(i, radius_bits=radius, index=index) for i in range(config.batch)]
    yield line(
        f"within {radius} bits, index allowed",
        lambda i: asker.pool(i, radius_bits=radius, index=index),
        k=0,
        peer_call=peer_call,
        radius_bits=radius,
        extra={
            "scan_to_index": scan_ms["scan"].median_ms / scan_ms["index"].median_ms,
            "codes_compared": int(np.median([pool.n_compared for pool in pools])),
            "index_mb": round(index.nbytes / 1e6),
        },
        reads_all=False,
    )


def _line(
    config: CoarseConfig,
    case: str,
    snapshot: Snapshot,
    ours: Callable[[int], Any],
    others: list[peers.Peer],
    table: CodeSet,
    *,
    k: int,
    bytes_read: int,
    peer_call: Callable[[peers.Peer, int], Callable[[int], Any] | None] | None = None,
    share: int = 1,
    radius_bits: int = 0,
    reads_all: bool = True,
    extra: dict[str, Any] | None = None,
) -> Measured:
    contenders = {"ours": ours}
    for peer in others:
        call = None if peer_call is None else peer_call(peer, radius_bits)
        if call is not None:
            contenders[peer.name] = call
    times = timing.interleaved(contenders, repeats=config.repeats)
    mine = times.pop("ours")
    ours_ms = mine.median_ms / share
    first_ms = float(np.median(mine.first_ms)) / share
    return Measured(
        case=case,
        rows=snapshot.rows,
        bits=snapshot.n_bits,
        k=k,
        ours_ms=ours_ms,
        peer_ms={name: found.median_ms / share for name, found in times.items()},
        gb_per_s=bytes_read / share / ours_ms / 1e6 if reads_all else None,
        recall=1.0,
        extra={"first_ms": first_ms, **(extra or {})},
    )


def _nearest(
    table: CodeSet, k: int, n: int
) -> Callable[[peers.Peer, int], Callable[[int], Any] | None]:
    def of(peer: peers.Peer, _: int) -> Callable[[int], Any] | None:
        nearest = peer.nearest
        if nearest is None:
            return None
        check_same(
            f"{peer.name} nearest", nearest(table.queries[:1], k)[0], sorted_distances(table, 0)[:k]
        )
        n_queries = len(table.queries)
        if n > 1:
            return lambda i: nearest(table.queries[:n], k)
        return lambda i: nearest(table.queries[i % n_queries :][:1], k)

    return of


def _within(
    queries: NDArray[np.uint8], radius: int
) -> Callable[[peers.Peer, int], Callable[[int], Any] | None]:
    def of(peer: peers.Peer, _: int) -> Callable[[int], Any] | None:
        within = peer.within
        if within is None or radius > peer.max_radius_bits:
            return None
        return lambda i: within(queries[i % len(queries) :][:1], radius)

    return of


def _numbers(text: str) -> list[int]:
    try:
        return [int(float(part)) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{text!r} is no comma-separated list of numbers") from None


def _settings(config: CoarseConfig) -> dict[str, Any]:
    return {
        "codes": config.codes,
        "repeats": config.repeats,
        "seed": config.seed,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }
