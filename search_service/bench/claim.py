"""`hashlens bench claim`: the paper's claim, end to end, on both services as processes."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from hashlens.cli.processes import interruptible
from hashlens.cli.text import console
from hashlens.client import Client
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from hashlens.types import CollectionSpec, FeatureDtype, Rank, SearchOptions, SearchResult
from search_service.bench import claim_ask, claim_build, load
from search_service.bench.claim_ask import Question
from search_service.bench.claim_report import ClaimReport, targets
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import make_codes
from search_service.bench.machine import describe
from search_service.bench.report import Measured
from search_service.bench.service import Served, memory_of, read_mb, redis_pid, served

_CALLERS = 4
_COLD_BALLS = 2


@dataclass(frozen=True, kw_only=True)
class ClaimConfig(BenchConfig):
    """Options of ``hashlens bench claim``."""

    rows: int = setting(2_500_000, "Rows of the collection.")
    bits: int = setting(64, "Code length, in bits.")
    dim: int = setting(4096, "Width of the feature, float16.")
    k: int = setting(1000, "Hits of each answer.")
    min_pool: int = setting(5000, "Rows that an automatic pool has at least.")
    repeats: int = setting(200, "Questions of each case, warm; of the large ball a twentieth.")
    queries: int = setting(32, "Different queries of each case; warm, all were asked before.")
    restarts: int = setting(
        5, "Restarts of each cold case, of the large ball two; each asks one question."
    )
    images: bool = setting(True, "Ask by image, too, with the encoder inside.")
    checkpoint: Path | None = setting(None, "The encoder's model; without, the bundled one.")
    data: Path | None = setting(
        None, "Folder that keeps the data, so that it is built once; without, a temporary one."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "dim", "k", "min_pool", "queries", "restarts"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)


@click.command()
@options(ClaimConfig, "bench")
def claim(config: ClaimConfig) -> None:
    """Build 2.5 million rows and answer top-1000 queries, by embedding and by image.

    Codes are as a trained network makes them, features 4096 float16 numbers: about 20 GB. The
    questions by image are asked of a collection of the encoder's own model and width, whose rows
    are made likewise; with a checkpoint of the same bits and width it is the same collection.
    Answers are compared with brute force over what was made, not over the store.
    """
    check_outputs(config)
    log = console(stderr=True)
    with interruptible(), ExitStack() as stack:
        data_dir = stack.enter_context(_folder(config))
        encoder = ""
        if config.images:
            model_file = () if config.checkpoint is None else ("--checkpoint", config.checkpoint)
            arguments = [str(part) for part in model_file]
            encoder = stack.enter_context(served("encoder_service", arguments)).address
        run = _Run(config, data_dir, encoder, log)
        results, settings = run.all()
    publish(ClaimReport("claim", describe(), results, settings), config)


class _Run:
    """One run: what it was told, and where its processes are."""

    def __init__(self, config: ClaimConfig, data_dir: Path, encoder: str, log: Console) -> None:
        self._config = config
        self._data_dir = data_dir
        self._encoder = encoder
        self._log = log

    def all(self) -> tuple[list[Measured], dict[str, Any]]:
        """Build, ask cold, ask warm; return the lines and what belongs to all of them."""
        config = self._config
        collections = self._collections()
        claim_build.check_room(self._data_dir.parent, *(rows.spec for rows in collections))
        built = {rows.spec.name: self._build(rows) for rows in collections}
        with self._search() as service, self._client(service) as client:
            questions = self._questions(client, collections)
        cold, starts = self._cold(questions)
        with self._search() as service, self._client(service) as client:
            warm = []
            for question in questions:
                asks = max(config.repeats // 20, 1) if question.is_large else config.repeats
                self._log.print(f"warm: {question.case}, {asks} times")
                checks = 1 if question.is_large else 3
                warm.append(claim_ask.warm(client, question, asks=asks, checks=checks))
            ours, server = memory_of(service.pid), memory_of(redis_pid(self._data_dir))
        settings: dict[str, Any] = {
            "min_pool": config.min_pool,
            "build": built,
            "restart": starts,
            "memory_mb": {
                "search_anonymous": ours.anonymous,
                "search_files": ours.files,
                "server": server.anonymous,
            },
        }
        settings["targets"] = targets(config.rows, config.dim, warm, starts["ready_s"])
        return [*cold, *warm], settings

    def _collections(self) -> list[load.Rows]:
        """Say what to build: the claim's rows, and rows of the encoder's width if that differs."""
        config = self._config
        shape = (config.bits, config.dim)
        specs = [("claim", "synthetic", *shape)]
        if self._encoder:
            with Client(self._encoder, self._encoder) as client:
                model = client.model()
            if (model.n_bits, model.dim) == shape:
                specs = [("claim", model.model_id, *shape)]
            else:
                specs.append(("claim-images", model.model_id, model.n_bits, model.dim))
        return [
            load.Rows(
                make_codes(
                    "trained", config.rows, n_bits, n_queries=config.queries, seed=config.seed
                ),
                CollectionSpec(name, model_id, n_bits, dim, FeatureDtype.F16, config.rows),
                config.seed,
            )
            for name, model_id, n_bits, dim in specs
        ]

    def _build(self, rows: load.Rows) -> dict[str, Any] | None:
        spec = rows.spec
        self._log.print(f"building {spec.name}: {spec.expected_rows:,} rows of {spec.dim} numbers")
        with self._search() as service, self._client(service) as client:
            written = claim_build.build(client, rows, _CALLERS)
            ours, server = memory_of(service.pid), memory_of(redis_pid(self._data_dir))
        if written is None:
            self._log.print("it was there")
            return None
        rate = written.items / written.searchable_s
        self._log.print(f"{written.searchable_s:,.0f} s, {rate:,.0f} items/s")
        return {
            "items": written.items,
            "seconds": written.searchable_s,
            "items_per_s": rate,
            "search_anonymous_mb": ours.anonymous,
            "server_mb": server.anonymous,
        }

    def _questions(self, client: Client, collections: Sequence[load.Rows]) -> list[Question]:
        config = self._config
        rows, by_image = collections[0], collections[-1]
        queries = claim_ask.make_queries(rows)
        automatic = claim_ask.search_options(config.k, min_pool=config.min_pool)
        capped = claim_ask.search_options(
            config.k, min_pool=config.min_pool, max_pool=max(config.min_pool, config.k)
        )
        radius_bits = claim_ask.radius_for(client, rows, queries[0], config.rows // 10)
        ball = claim_ask.search_options(config.k, max_hamming_bits=radius_bits)
        found = [
            Question("embedding, automatic ball", rows, automatic, queries),
            Question("embedding, pool capped", rows, capped, queries),
        ]
        if self._encoder:
            images = claim_build.pictures(config.queries)
            found += [
                Question("image, automatic ball", by_image, automatic, images),
                Question("image, pool capped", by_image, capped, images),
            ]
        # Last, because it reads a tenth of everything; two queries, to stay in memory.
        return [*found, Question("embedding, a tenth of the rows", rows, ball, queries[:2])]

    def _cold(self, questions: Sequence[Question]) -> tuple[list[Measured], dict[str, Any]]:
        """Restart with no feature in memory, and ask, again and again."""
        config = self._config
        # One question after each restart: what is read ahead for it would warm the next.
        turns = [
            question
            for question in questions
            if question.options.max_pool is None
            for _ in range(
                min(config.restarts, _COLD_BALLS) if question.is_large else config.restarts
            )
        ]
        starts: list[Served] = []
        writable_s: list[float] = []
        asked: dict[str, list[tuple[SearchResult, float, float]]] = {}
        for number, question in enumerate(turns):
            dropped = claim_build.drop_pages(self._data_dir)
            self._log.print(
                f"cold: {question.case}, restart {number + 1} of {len(turns)}, "
                f"{dropped / 1e9:.1f} GB of features put aside"
            )
            with self._search() as service, self._client(service) as client:
                began_s = time.monotonic()
                starts.append(service)
                load.wait_writable(client, question.rows.spec.name)
                writable_s.append(service.ready_s + time.monotonic() - began_s)
                self._touch_codes(client, question)
                before_mb = read_mb(service.pid)
                result, wall_ms = question.ask(client, number)
                found = (result, wall_ms, read_mb(service.pid) - before_mb)
                asked.setdefault(question.case, []).append(found)
        lines = [
            claim_ask.measured(
                f"{question.case}, cold",
                question,
                [result for result, _, _ in asked[question.case]],
                [wall_ms for _, wall_ms, _ in asked[question.case]],
                {"read_mb": float(np.median([mb for _, _, mb in asked[question.case]]))},
            )
            for question in dict.fromkeys(turns)
        ]
        stages = sorted({name for start in starts for name in start.stages_s})
        return lines, {
            "ready_s": float(np.median([start.ready_s for start in starts])),
            "slowest_s": max(start.ready_s for start in starts),
            "writable_s": float(np.median(writable_s)),
            "stages_s": {
                name: float(np.median([start.stages_s.get(name, 0.0) for start in starts]))
                for name in stages
            },
        }

    def _touch_codes(self, client: Client, question: Question) -> None:
        """Have the codes read, which are always in memory, and no feature."""
        stored = question.rows.id_of(0)
        ranked = SearchOptions(k=1, rank=Rank.HAMMING)
        client.search(question.rows.spec.name, id=stored, options=ranked)

    def _search(self) -> contextlib.AbstractContextManager[Served]:
        arguments = ["--data-dir", str(self._data_dir)]
        if self._encoder:
            arguments += ["--encoder", self._encoder]
        return served("search_service", arguments)

    def _client(self, service: Served) -> Client:
        return Client(service.address, self._encoder or service.address)


@contextlib.contextmanager
def _folder(config: ClaimConfig) -> Iterator[Path]:
    """Return where the data go: kept if the folder is named, else removed afterwards."""
    if config.data is not None:
        config.data.mkdir(parents=True, exist_ok=True)
        yield config.data / f"{config.rows}-{config.bits}-{config.dim}-{config.seed}"
        return
    parent = Path("build") / "claim"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder) / "data"
