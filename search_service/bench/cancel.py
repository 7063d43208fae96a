"""`hashlens bench cancel`: how long work goes on after its caller has left."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hashlens import convert
from hashlens.config import options, setting
from hashlens.errors import CancelledError, DeadlineError, InvalidInputError
from hashlens.types import Embedding, FeatureDtype, Rank, SearchOptions
from search_service import ball, fine
from search_service.bench import machine, pagecache
from search_service.bench.asker import snapshot_of
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import CodeSet, make_codes
from search_service.bench.report import Measured, Report
from search_service.bench.table import Shape, Table, made
from search_service.cancel import Cancel, in_thread
from search_service.coarse import INDEX_SHARE
from search_service.engine import Engine
from search_service.executor import Executor
from search_service.exhaustive import ExhaustiveScan
from search_service.filtered import restricted
from search_service.items_rpc import items_to_proto
from search_service.multi_index import MultiIndex, scan_cost_ns
from search_service.one_query import Ask
from search_service.snapshot import Snapshot, Texts

ALLOWED_MS = 20.0
"""What the design allows."""

_K = 1000
_MOST_S = 10.0
_BATCH = 64
_ID_DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class CancelConfig(BenchConfig):
    """Options of ``hashlens bench cancel``."""

    rows: int = setting(20_000_000, "Codes of the table that is scanned.")
    bits: int = setting(64, "Code length.")
    pool: int = setting(50_000, "Rows of the pool that is ranked, each with a feature.")
    dim: int = setting(4096, "Width of the features, float16.")
    hits: int = setting(100_000, "Hits of the reply that is packed.")
    dir: Path | None = setting(
        None, "Where the features are written meanwhile; default: the temporary folder."
    )
    repeats: int = setting(15, "Times that each work is stopped, at places spread over it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < self.hits or min(self.pool, self.dim, self.hits, self.bits) < 1:
            raise InvalidInputError(
                "pool, dim, bits and hits are at least 1, rows no less than hits"
            )


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    rows: int
    work: Callable[[Cancel], Any]
    before: Callable[[], None] = lambda: None
    """What makes the next round as cold as the last."""


class _Numbers:
    """Ids that are row numbers, without an object for each."""

    def __init__(self, rows: int) -> None:
        numbers = np.arange(rows, dtype=np.int64)
        data = np.empty((rows, _ID_DIGITS), dtype=np.uint8)
        for place in range(_ID_DIGITS):
            data[:, _ID_DIGITS - 1 - place] = 48 + numbers // 10**place % 10
        ends = (np.arange(1, rows + 1) * _ID_DIGITS).astype(np.uint64)
        self._texts = Texts(data.reshape(-1), ends)

    def id_texts(self) -> Texts:
        return self._texts

    def payload_texts(self) -> Texts | None:
        return None

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        return [f"{row:0{_ID_DIGITS}d}" for row in rows.tolist()]

    def row_of(self, item_id: str) -> int | None:
        return int(item_id)

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        return [b""] * len(rows)

    def tags_of(self, rows: NDArray[np.int64]) -> list[tuple[str, ...]]:
        return [()] * len(rows)

    def expiries_of(self, rows: NDArray[np.int64]) -> list[int]:
        return [0] * len(rows)

    def index_tags(self) -> bool:
        return True

    def passing(self, wanted: object) -> NDArray[np.int64]:
        raise AssertionError("nothing is filtered by tags here")


@click.command()
@options(CancelConfig, "bench")
def cancel(config: CancelConfig) -> None:
    """Measure how long work goes on after its caller has left.

    Each work is begun through the executor, or the thread that a server would use for it, and its
    task is cancelled somewhere between its beginning and its end, as gRPC does when a caller
    leaves. ``ours ms`` is the median, ``worst_ms`` the longest until the thread was idle again, and
    ``worst_cpu_ms`` the most that the thread worked meanwhile: where others want the processors,
    the rest is waiting for them. ``within`` compares that with the 20 ms that are allowed;
    ``whole_ms`` is what the work takes if nobody stops it.
    """
    check_outputs(config)
    with ExitStack() as stack:
        shape = Shape(config.pool, config.dim, config.pool, config.seed)
        table = stack.enter_context(made(shape, FeatureDtype.F16, config.dir))
        codes = make_codes("trained", config.rows, config.bits, n_queries=256, seed=config.seed)
        snapshot = replace(snapshot_of(codes), ids=_Numbers(config.rows))
        executor = stack.enter_context(Executor(n_threads=config.threads))
        engine = Engine()
        executor.run_blocking(lambda _: engine.warm_up())
        results = [
            *(
                asyncio.run(_measured(config, case, executor.run))
                for case in _kernels(config, snapshot, codes, table, engine)
            ),
            *(
                asyncio.run(_measured(config, case, in_thread))
                for case in _replies(config, snapshot, codes, engine)
            ),
        ]
    settings = {key: value for key, value in asdict(config).items() if key not in ("json", "plot")}
    settings |= {"dir": str(config.dir or "temporary"), "allowed_ms": ALLOWED_MS}
    publish(Report("cancel", machine.describe(), results, settings), config)


def _kernels(
    config: CancelConfig, snapshot: Snapshot, codes: CodeSet, table: Table, engine: Engine
) -> Iterator[_Case]:
    queries = [
        Embedding(code=code.tobytes(), n_bits=config.bits, model_id="") for code in codes.queries
    ]
    rng = np.random.default_rng(config.seed)
    sure = rng.random(config.bits, dtype=np.float32)

    def search(*asked: Embedding, **chosen: Any) -> Callable[[Cancel], None]:
        wanted = SearchOptions(k=_K, min_pool=0, packed=True, **chosen)

        def work(cancel: Cancel) -> None:
            asks = [Ask(query=query, options=wanted, cancel=cancel) for query in asked]
            engine.search_batch(snapshot, asks, lambda _, answer: None)

        return work

    n, everything = config.rows, config.bits
    yield _Case("search, automatic radius", n, search(queries[0]))
    yield _Case(f"search, {_BATCH} together", n, search(*queries[:_BATCH]))
    yield _Case("search, ball of a tenth of all", n, search(queries[0], max_hamming_bits=12))
    yield _Case("search, ball of all", n, search(queries[0], max_hamming_bits=everything))
    soft = replace(queries[0], activations=sure)
    yield _Case(
        "soft codes, ball of all",
        n,
        search(soft, max_hamming_bits=everything, rank=Rank.HAMMING),
    )
    yield _Case(
        "soft codes, max_pool of a ball of all",
        n,
        search(soft, max_hamming_bits=everything, max_pool=n // 2),
    )
    yield _Case(
        "batch of 64, balls of a tenth of all", n, search(*queries[:_BATCH], max_hamming_bits=12)
    )
    scanner = ball.BallScanner()
    yield _Case(
        "ball, one block",
        ball.BLOCK_ROWS,
        lambda cancel: scanner.scan(snapshot, queries[0].code, everything, 0, cancel),
    )
    few = np.arange(0, n, 20, dtype=np.int64)
    sparse = restricted(snapshot, few, few_share=16)

    def filtered(cancel: Cancel) -> None:
        wanted = SearchOptions(k=_K, min_pool=0, packed=True)
        engine.search_batch(sparse, [Ask(query=queries[0], options=wanted, cancel=cancel)], _drop)

    yield _Case("search, through a filter", n, filtered)
    index = MultiIndex().extended(snapshot)
    words = np.ascontiguousarray(codes.queries[0].view(np.uint64))
    allowed_ns = INDEX_SHARE * scan_cost_ns(n, len(snapshot.words))
    radius = max((r for r in range(config.bits) if index.cost_ns(words, r) < allowed_ns), default=0)
    yield _Case(f"index, {radius} bits", n, lambda _: index.find(snapshot, words, radius))
    query = table.queries[0]

    def rank(cancel: Cancel, *, with_sketch: bool = False) -> None:
        fine.rank(
            table.snapshot,
            query.rows,
            query.bits,
            query.feature,
            10,
            cancel,
            table.sketch if with_sketch else None,
        )

    def put_out() -> None:
        pagecache.put_out(table.files)

    yield _Case("fine, cold pool", config.pool, rank, put_out)
    yield _Case("fine, warm pool", config.pool, rank)
    yield _Case("fine, sketch", config.pool, lambda cancel: rank(cancel, with_sketch=True))
    yield _Case(
        "fine, sketch, cold", config.pool, lambda cancel: rank(cancel, with_sketch=True), put_out
    )
    wide = Embedding(code=bytes(8), n_bits=64, model_id="", feature=query.feature)

    def audit(cancel: Cancel) -> None:
        scan = ExhaustiveScan(table.snapshot, wide, _K)
        for first_row in scan.blocks:
            scan.scan(first_row, cancel)

    yield _Case("audit, cold", config.pool, audit, put_out)


def _drop(_: int, __: Any) -> None:
    return


def _replies(
    config: CancelConfig, snapshot: Snapshot, codes: CodeSet, engine: Engine
) -> Iterator[_Case]:
    query = Embedding(code=codes.queries[0].tobytes(), n_bits=config.bits, model_id="")
    for packed in (True, False):
        wanted = SearchOptions(k=config.hits, min_pool=0, packed=True)
        result = engine.search(snapshot, query, wanted)

        def reply(cancel: Cancel, packed: bool = packed, result: Any = result) -> None:
            convert.result_to_proto(result, config.bits, packed=packed, check=cancel.check)

        name = "packed" if packed else "plain"
        yield _Case(f"reply of {config.hits:,} hits, {name}", config.hits, reply)
    ids = [f"{row:0{_ID_DIGITS}d}" for row in range(config.hits)]
    yield _Case(
        f"GetItems of {config.hits:,}",
        config.hits,
        lambda cancel: items_to_proto(
            snapshot, ids, with_feature=False, with_payload=False, cancel=cancel
        ),
    )


async def _measured(
    config: CancelConfig,
    case: _Case,
    run: Callable[[Callable[[Cancel], Any]], Awaitable[Any]],
) -> Measured:
    """Time the whole work, then stop it again and again."""
    begun, ended = threading.Event(), threading.Event()
    ended_s = ended_cpu_s = 0.0
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def timed(cancel: Cancel) -> Any:
        nonlocal ended_s, ended_cpu_s, clock
        clock = time.pthread_getcpuclockid(threading.get_ident())
        begun.set()
        try:
            return case.work(cancel)
        except CancelledError:
            return None
        finally:
            ended_s, ended_cpu_s = time.perf_counter(), time.thread_time()
            ended.set()

    whole_s = []
    for _ in range(2):
        case.before()
        began_s = time.perf_counter()
        await run(timed)
        whole_s.append(ended_s - began_s)
    lasting_s = min(whole_s)
    stopped_ms, cpu_ms, n_stopped = [], [], 0
    for number in range(config.repeats):
        case.before()
        begun.clear()
        ended.clear()
        task = asyncio.ensure_future(run(timed))
        await asyncio.sleep(0)  # Now it is somebody else's thread's.
        if not begun.wait(_MOST_S):
            raise DeadlineError(f"{case.name} has not begun within {_MOST_S:g} s")
        await asyncio.sleep(lasting_s * (number + 0.5) / config.repeats)
        left_s, left_cpu_s = time.perf_counter(), time.clock_gettime(clock)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if not ended.wait(_MOST_S):
            raise DeadlineError(f"{case.name} has not ended within {_MOST_S:g} s")
        n_stopped += ended_s > left_s
        stopped_ms.append(max(ended_s - left_s, 0.0) * 1e3)
        cpu_ms.append(max(ended_cpu_s - left_cpu_s, 0.0) * 1e3)
    worst_ms = max(stopped_ms)
    return Measured(
        case=case.name,
        rows=case.rows,
        bits=config.bits,
        k=0,
        ours_ms=statistics.median(stopped_ms),
        extra={
            "worst_ms": worst_ms,
            "worst_cpu_ms": max(cpu_ms),
            "whole_ms": lasting_s * 1e3,
            "stopped": n_stopped,
            "within": bool(max(cpu_ms) <= ALLOWED_MS),
        },
    )
