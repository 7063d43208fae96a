"""`hashlens bench ingest`: items a second through the client, the store and the log."""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from hashlens.cli.processes import interruptible
from hashlens.client import Client
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.bench import load
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import make_codes
from search_service.bench.machine import describe
from search_service.bench.report import Measured, Report, WrongAnswerError
from search_service.bench.service import memory_of, redis_pid, served


@dataclass(frozen=True, kw_only=True)
class IngestConfig(BenchConfig):
    """Options of ``hashlens bench ingest``."""

    rows: int = setting(50_000, "Items with features to write in each case.")
    code_rows: int = setting(200_000, "Items without features to write.")
    bits: int = setting(64, "Code length, in bits.")
    dims: str = setting("0,512,4096", "Widths of the feature, comma-separated; 0: codes only.")
    callers: str = setting("1,4", "Upserts in flight, comma-separated.")
    data: Path | None = setting(None, "Folder to write below; without, a temporary one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dims", "callers"):
            if not all(part.isdecimal() for part in getattr(self, name).split(",")):
                raise InvalidInputError(f"{name} are numbers, comma-separated", field=name)
        if min(self.rows, self.code_rows, *self.numbers("callers")) < 1:
            raise InvalidInputError("rows and callers are at least 1")

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of a list."""
        return [int(part) for part in getattr(self, name).split(",")]


@click.command()
@options(IngestConfig, "bench")
def ingest(config: IngestConfig) -> None:
    """Write items through the client into a search service of its own.

    Acknowledged means that the store has it on disk; searchable, that this replica's arrays have
    it, too. Features are made before, and kept in memory. Items come back as they were written, or
    the run fails.
    """
    check_outputs(config)
    with interruptible(), tempfile.TemporaryDirectory(dir=config.data) as folder:
        data_dir = Path(folder) / "data"
        with served("search_service", ["--data-dir", str(data_dir)]) as service:
            results = [
                _case(config, service.address, data_dir, dim, callers)
                for dim in config.numbers("dims")
                for callers in config.numbers("callers")
            ]
    settings = {"rows": config.rows, "code_rows": config.code_rows, "seed": config.seed}
    publish(Report("ingest", describe(), results, settings), config)


def _case(config: IngestConfig, address: str, data_dir: Path, dim: int, callers: int) -> Measured:
    n = config.rows if dim else config.code_rows
    name = f"ingest-{uuid.uuid4().hex[:8]}"
    spec = CollectionSpec(name, "bench", config.bits, dim, FeatureDtype.F16, n)
    codes = make_codes("trained", n, config.bits, n_queries=1, seed=config.seed)
    rows = load.Rows(codes, spec, config.seed).keeping(n)
    with Client(address, address) as client:
        client.create_collection(name, spec=spec)
        written = load.write(client, rows, 0, n, callers=callers)
        info = client.collection(name)
        _check(client, rows, n, info.n_items)
        server = memory_of(redis_pid(data_dir))
        client.drop_collection(name, deadline_s=load.CALL_DEADLINE_S)
    item_bytes = len(codes.packed[0]) + dim * spec.feature_dtype.n_bytes
    return Measured(
        case=f"{f'{dim} x f16' if dim else 'codes only'}, {callers} in flight",
        rows=n,
        bits=config.bits,
        k=0,
        ours_ms=written.searchable_s / n * 1e6,
        extra={
            "items_per_s": round(n / written.searchable_s),
            "acknowledged_per_s": round(n / written.acknowledged_s),
            "mb_per_s": n * item_bytes / written.searchable_s / 1e6,
            "catch_up_ms": (written.searchable_s - written.acknowledged_s) * 1e3,
            "server_mb": server.anonymous,
            "appendfsync": info.durability,
            "ms_are_per": "1000 items",
        },
    )


def _check(client: Client, rows: load.Rows, n: int, n_items: int) -> None:
    """Read some rows back and compare them with what was made."""
    sample = np.unique(np.linspace(0, n - 1, 20).astype(np.int64))
    found = client.get_items(rows.spec.name, [rows.id_of(row) for row in sample], with_feature=True)
    whole = n_items == n and len(found) == len(sample)
    for item, row in zip(found, sample.tolist(), strict=False):
        (expected,) = rows.embeddings(row, row + 1)
        assert item.embedding is not None
        feature = item.embedding.feature
        whole = whole and item.embedding.code == expected.code
        if feature is None or expected.feature is None:
            whole = whole and feature is expected.feature
        else:
            whole = whole and np.array_equal(feature, expected.feature)
    if not whole:
        raise WrongAnswerError(f"what was written does not come back: {n_items} of {n} items")
