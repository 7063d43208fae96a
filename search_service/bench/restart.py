"""`hashlens bench restart`: from start to ready, by rows, and what it is spent on."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from hashlens.cli.processes import interruptible
from hashlens.client import Client
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from hashlens.types import CollectionSpec, FeatureDtype, Rank, SearchOptions
from search_service.bench import catalog, load
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import make_codes
from search_service.bench.machine import describe
from search_service.bench.report import Measured, Report, WrongAnswerError
from search_service.bench.service import Served, memory_of, redis_pid, served

_NAME = "restart"
_ID_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class RestartConfig(BenchConfig):
    """Options of ``hashlens bench restart``."""

    rows: str = setting("10000,100000,1000000,2500000", "Rows, ascending, comma-separated.")
    repeats: int = setting(5, "Restarts of which medians are taken.")
    bits: int = setting(64, "Code length, in bits.")
    dim: int = setting(0, "Width of the feature; 0: codes only.")
    rebuild: bool = setting(False, "Also make the files anew from Redis alone; codes only.")
    expected_rows: int = setting(
        0, "What the collection is made for; 0: the most rows. Fewer show one that has outgrown it."
    )
    data: Path | None = setting(None, "Folder to write below; without, a temporary one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(part.isdecimal() and int(part) for part in self.rows.split(",")):
            raise InvalidInputError("rows are numbers, comma-separated", field="rows")
        if self.rebuild and self.dim:
            raise InvalidInputError("Redis keeps no features to rebuild", field="rebuild")

    @property
    def steps(self) -> list[int]:
        """Rows to stop at, ascending."""
        return sorted({int(part) for part in self.rows.split(",")})


@click.command()
@options(RestartConfig, "bench")
def restart(config: RestartConfig) -> None:
    """Stop and start a search service over a growing collection.

    Ready is when health says SERVING. Each time a stored item has to find itself, or the run fails.
    With --rebuild, files are also made anew from Redis while nothing else runs, and have to hold
    the same as those of the service; what Redis takes for an id of twelve bytes is read after its
    log is trimmed.
    """
    check_outputs(config)
    steps = config.steps
    expected = config.expected_rows or steps[-1]
    spec = CollectionSpec(_NAME, "bench", config.bits, config.dim, FeatureDtype.F16, expected)
    codes = make_codes("trained", steps[-1], config.bits, n_queries=1, seed=config.seed)
    rows = load.Rows(codes, spec, config.seed, id_digits=_ID_DIGITS)
    results = []
    with interruptible(), tempfile.TemporaryDirectory(dir=config.data) as folder:
        data_dir = Path(folder) / "data"
        for first, stop in zip([0, *steps[:-1]], steps, strict=True):
            arguments = ["--data-dir", str(data_dir), "--checkpoint-interval-s", "2"]
            with served("search_service", arguments) as service:
                with Client(service.address, service.address) as client:
                    if first:
                        load.wait_writable(client, _NAME)
                    else:
                        empty_bytes = catalog.used_bytes(data_dir)
                    client.create_collection(_NAME, spec=spec)
                    load.write(client, rows, first, stop, callers=4)
                if config.rebuild:
                    catalog.wait_trimmed(data_dir, _NAME)
                    id_bytes = (catalog.used_bytes(data_dir) - empty_bytes) / stop
                before_mb = memory_of(service.pid).anonymous
            results.append(_case(config, data_dir, rows, stop, before_mb))
            if config.rebuild:
                results.append(catalog.rebuilt(data_dir, _NAME, config, stop, id_bytes))
    publish(Report("restart", describe(), results, {"dim": config.dim}), config)


def _case(
    config: RestartConfig, data_dir: Path, rows: load.Rows, n: int, before_mb: float
) -> Measured:
    starts: list[Served] = []
    writable_s: list[float] = []
    for _ in range(config.repeats):
        with served("search_service", ["--data-dir", str(data_dir)]) as service:
            began_s = time.monotonic()
            starts.append(service)
            _check(service.address, rows, n)
            with Client(service.address, service.address) as client:
                load.wait_writable(client, _NAME)
            writable_s.append(service.ready_s + time.monotonic() - began_s)
            ours, server = memory_of(service.pid), memory_of(redis_pid(data_dir))

    def stage_ms(name: str) -> float:
        return float(np.median([start.stages_s.get(name, 0.0) for start in starts])) * 1e3

    ready_ms = float(np.median([start.ready_s for start in starts])) * 1e3
    stages_ms = {name: stage_ms(name) for name in ("executor", "store", "server", "kernels")}
    within = stages_ms["executor"] + stages_ms["store"] + stages_ms["kernels"]
    return Measured(
        case="start to ready",
        rows=n,
        bits=config.bits,
        k=0,
        ours_ms=ready_ms,
        extra={
            "imports_ms": ready_ms - within,
            "executor_ms": stages_ms["executor"],
            "server_ms": stages_ms["server"],
            "files_ms": stages_ms["store"] - stages_ms["server"],
            "kernels_ms": stages_ms["kernels"],
            "writable_ms": float(np.median(writable_s)) * 1e3,
            "anonymous_mb": ours.anonymous,
            "files_mb": ours.files,
            "anonymous_before_mb": before_mb,
            "server_mb": server.anonymous,
        },
    )


def _check(address: str, rows: load.Rows, n: int) -> None:
    """Let a stored item search for itself."""
    row = n - 1
    options = SearchOptions(k=1, max_hamming_bits=0, rank=Rank.HAMMING, with_code=True)
    with Client(address, address) as client:
        result = client.search(_NAME, id=rows.id_of(row), options=options)
    same = (rows.codes.packed[:n] == rows.codes.packed[row]).all(axis=1)
    ball, code = result.receipt.pool_histogram[0], result.hits[0].code
    if ball != int(same.sum()) or code != rows.codes.packed[row].tobytes():
        raise WrongAnswerError(f"after a restart with {n} rows, {rows.id_of(row)} is not found")
