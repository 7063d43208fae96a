"""`hashlens bench size`: what a row takes on disks and in memory, beside what the formulas say."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from hashlens.cli.ingest import pipelined
from hashlens.cli.processes import interruptible
from hashlens.cli.text import console
from hashlens.client import Client
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, Item
from search_service.bench import catalog
from search_service.bench.service import memory_of, redis_pid, served
from search_service.storage.keys import Keys

_NAME = "size"
_ID_BYTES = 12
_CHUNK_ITEMS = 2048
_RECORD_BYTES = 48
_CALLERS = 2
_DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Options of ``hashlens bench size``."""

    json: Path | None = setting(None, "Write the numbers there.")
    rows: int = setting(200_000, "Rows.")
    bits: int = setting(64, "Code length, in bits.")
    dim: int = setting(512, "Width of the feature, float16; 0: codes only.")
    payload_bytes: int = setting(100, "Length of each payload.")
    checkpoint_interval_s: float = setting(30.0, "Longest between checkpoints, in seconds.")
    seed: int = setting(1, "Of the data.")
    data: Path | None = setting(None, "Folder to write below; without, a temporary one.")

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 0 or not 0 <= self.payload_bytes <= 65_536:
            raise InvalidInputError("rows, dim and payload_bytes are sizes")

    @property
    def code_bytes(self) -> int:
        """Bytes of a code, as it travels."""
        return -(-self.bits // 8)

    @property
    def extras_bytes(self) -> int:
        """Bytes of an item beside its embedding, in Redis."""
        return 10 + self.payload_bytes if self.payload_bytes else 0


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that rows take."""

    what: str
    formula: float | None
    """Bytes a row, as docs/operations.md reckons; None: measured only."""
    measured: float
    unit: str = "bytes a row"


def formulas(config: SizeConfig) -> dict[str, float]:
    """Return what docs/operations.md says of a row: bytes by what they are for."""
    extras = config.extras_bytes
    feature = 2 * config.dim
    return {
        "files": 8 * -(-config.bits // 64)
        + _RECORD_BYTES
        + _ID_BYTES
        + config.payload_bytes
        + feature,
        "redis": _ID_BYTES + config.code_bytes + 13 + (_ID_BYTES + extras + 5 if extras else 0),
        "log": 11 + _ID_BYTES + config.code_bytes + extras + feature + 16,
    }


@click.command()
@options(SizeConfig, "bench")
def size(config: SizeConfig) -> None:
    """Fill a collection and look what it takes: files, Redis, log, memory, writes to disk.

    Features and payloads are noise: nothing here can be compressed.
    """
    with interruptible(), tempfile.TemporaryDirectory(dir=config.data) as folder:
        lines = measure(config, Path(folder) / "data")
    if config.json is not None:
        found = [{"what": n.what, "formula": n.formula, "measured": n.measured} for n in lines]
        config.json.write_text(json.dumps({"rows": config.rows, "lines": found}, indent=1) + "\n")
    table = Table(box=None, pad_edge=False)
    for heading in ("what", "formula", "measured", ""):
        table.add_column(heading, justify="left" if heading in ("what", "") else "right")
    for line in lines:
        formula = "" if line.formula is None else f"{line.formula:,.0f}"
        table.add_row(line.what, formula, f"{line.measured:,.1f}", line.unit)
    console().print(table)


def measure(config: SizeConfig, data_dir: Path) -> list[Line]:
    """Run a search service on new data, fill it, and look."""
    expected = formulas(config)
    n = config.rows
    spec = CollectionSpec(_NAME, "bench", config.bits, config.dim, FeatureDtype.F16, n)
    arguments = ["--data-dir", str(data_dir)]
    arguments += ["--checkpoint-interval-s", str(config.checkpoint_interval_s)]
    with served("search_service", arguments) as service:
        server = redis_pid(data_dir)
        with Client(service.address, service.address) as client:
            client.create_collection(_NAME, spec=spec)
            empty_bytes = catalog.used_bytes(data_dir)
            idle_mb = memory_of(service.pid).anonymous
            written = {pid: _written_bytes(pid) for pid in (service.pid, server)}
            for _ in pipelined(
                lambda chunk: client.upsert(_NAME, chunk, deadline_s=_DEADLINE_S).n_written,
                _chunks(config),
                _CALLERS,
            ):
                pass
            with catalog.server_of(data_dir) as redis:
                n_log = int(redis.xlen(Keys(_NAME).log))
                full_bytes = catalog.used_bytes(data_dir)
                calls = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
            catalog.wait_trimmed(data_dir, _NAME)
            trimmed_bytes = catalog.used_bytes(data_dir)
        written = {pid: _written_bytes(pid) - before for pid, before in written.items()}
        collection = data_dir / "collections" / _NAME
        lines = [
            Line("files of a replica", expected["files"], _disk_bytes(collection) / n),
            Line("Redis, items", expected["redis"], (trimmed_bytes - empty_bytes) / n),
        ]
        if n_log > 1000:
            log = (full_bytes - trimmed_bytes) / n_log
            lines.append(Line("Redis, an entry of the log", expected["log"], log))
        lines += [
            Line("Redis, its file", None, _disk_bytes(data_dir / "redis") / n),
            Line("written to disk by the replica", None, written[service.pid] / n),
            Line("written to disk by Redis", None, written[server] / n),
            Line("write calls of Redis, each a sync", None, calls, "in all"),
            Line("manifest", None, (collection / "MANIFEST.json").stat().st_size, "bytes"),
            Line("memory of the replica, idle", None, idle_mb, "MB"),
            Line("memory of the replica, full", None, memory_of(service.pid).anonymous, "MB"),
        ]
    return lines


def _chunks(config: SizeConfig) -> Iterator[list[Item]]:
    random = np.random.default_rng(config.seed)
    for begin in range(0, config.rows, _CHUNK_ITEMS):
        n = min(_CHUNK_ITEMS, config.rows - begin)
        bits = random.integers(0, 2, (n, config.bits), dtype=np.uint8)
        codes = np.packbits(bits, axis=1, bitorder="little")
        features = random.random((n, config.dim), dtype=np.float32).astype(np.float16)
        payloads = random.bytes(n * config.payload_bytes)
        yield [
            Item(
                id=f"{begin + i:0{_ID_BYTES}d}",
                embedding=Embedding(
                    codes[i].tobytes(), config.bits, "bench", features[i] if config.dim else None
                ),
                payload=payloads[i * config.payload_bytes : (i + 1) * config.payload_bytes],
            )
            for i in range(n)
        ]


def _disk_bytes(folder: Path) -> int:
    """Return the room that the files below a folder take, room allocated ahead included."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _written_bytes(pid: int) -> int:
    """Return what a process has handed to disks so far; 0 where nobody says."""
    try:
        text = Path(f"/proc/{pid}/io").read_text("utf-8")
    except OSError:
        return 0
    return int(re.findall(r"^write_bytes: (\d+)$", text, re.MULTILINE)[0])
