"""The claim's questions: what is asked, how long it takes, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashlens.client import Client
from hashlens.types import Embedding, Rank, SearchOptions, SearchResult
from search_service.bench import claim_check
from search_service.bench.data import make_features
from search_service.bench.load import CALL_DEADLINE_S, Rows
from search_service.bench.report import Measured

STAGES = ("wait", "encode", "queue", "coarse", "fine", "fetch", "total")
"""As the receipt has them; total is the search service's own time for the call."""

IN_FLIGHT = 8


def search_options(
    k: int,
    *,
    min_pool: int = 0,
    max_pool: int | None = None,
    max_hamming_bits: int | None = None,
) -> SearchOptions:
    """Return the options of every question; what all of them ask alike is said here alone."""
    return SearchOptions(
        k=k,
        min_pool=min_pool,
        max_pool=max_pool,
        max_hamming_bits=max_hamming_bits,
        with_payload=False,
        packed=True,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One case: several queries, asked with the same options."""

    case: str
    rows: Rows
    options: SearchOptions
    queries: Sequence[Embedding | bytes]
    """Embeddings, or pictures that the service has encoded."""

    @property
    def is_large(self) -> bool:
        """Whether its ball is a tenth of the rows."""
        return self.options.max_hamming_bits is not None

    def ask(self, client: Client, number: int) -> tuple[SearchResult, float]:
        """Return the answer to one query and its milliseconds, as the caller sees them."""
        query = self.queries[number % len(self.queries)]
        began_s = time.perf_counter()
        if isinstance(query, bytes):
            result = self._search(client, image=query)
        else:
            result = self._search(client, embedding=query)
        return result, (time.perf_counter() - began_s) * 1e3

    def _search(self, client: Client, **query: Any) -> SearchResult:
        name = self.rows.spec.name
        return client.search(name, **query, options=self.options, deadline_s=CALL_DEADLINE_S)

    def check(self, client: Client, number: int) -> None:
        """Compare one answer with brute force; WrongAnswerError if they differ."""
        query = self.queries[number % len(self.queries)]
        result, _ = self.ask(client, number)
        if isinstance(query, bytes):
            spec = self.rows.spec
            query = client.encode(query, feature_dtype=spec.feature_dtype).embedding
        claim_check.check(self.rows, query, self.options, result)


def make_queries(rows: Rows) -> list[Embedding]:
    """Return an embedding for each query of the codes, of the class of the nearest row."""
    queries = []
    spec, codes = rows.spec, rows.codes
    for number, packed in enumerate(codes.queries):
        code = packed.tobytes()
        nearest = int(claim_check.hamming_to(rows, code).argmin())
        feature = make_features(
            codes.classes[nearest : nearest + 1],
            spec.dim,
            spec.feature_dtype.numpy,
            seed=rows.seed,
            first_row=len(codes.packed) + number,
        )
        queries.append(
            Embedding(code=code, n_bits=spec.n_bits, model_id=spec.model_id, feature=feature[0])
        )
    return queries


def radius_for(client: Client, rows: Rows, query: Embedding, n_rows: int) -> int:
    """Return the radius whose ball holds nearest to `n_rows`, by the histogram of a receipt."""
    options = SearchOptions(k=1, max_hamming_bits=rows.spec.n_bits, rank=Rank.HAMMING)
    receipt = client.search(rows.spec.name, embedding=query, options=options).receipt
    held = np.cumsum(receipt.pool_histogram)
    return int(np.abs(held - n_rows).argmin())


def warm(client: Client, question: Question, *, asks: int, checks: int) -> Measured:
    """Ask everything once, check some, then measure: one at a time, and several in flight."""
    n = min(len(question.queries), asks)
    for number in range(n):
        question.ask(client, number)
    for number in range(min(checks, n)):
        question.check(client, number * n // min(checks, n))
    answers, walls_ms, took_s = [], [], 0.0
    for number in range(asks):
        result, wall_ms = question.ask(client, number)
        answers.append(result)
        walls_ms.append(wall_ms)
        took_s += wall_ms / 1e3
    extra = {"queries_per_s": asks / took_s, **_at_once(client, question, asks)}
    return measured(f"{question.case}, warm", question, answers, walls_ms, extra)


def measured(
    case: str,
    question: Question,
    answers: Sequence[SearchResult],
    walls_ms: Sequence[float],
    extra: dict[str, Any],
) -> Measured:
    """Return the line of one case."""
    receipts = [answer.receipt for answer in answers]
    pools = [receipt.pool_size for receipt in receipts]
    stages_ms: dict[str, list[float]] = {
        "wait": [r.timings.wait_version_ns / 1e6 for r in receipts],
        "encode": [r.timings.encode_call_ns / 1e6 for r in receipts],
        "queue": [r.timings.queue_ns / 1e6 for r in receipts],
        "coarse": [r.timings.coarse_ns / 1e6 for r in receipts],
        "fine": [r.timings.fine_ns / 1e6 for r in receipts],
        "fetch": [r.timings.fetch_ns / 1e6 for r in receipts],
        "total": [r.timings.total_ns / 1e6 for r in receipts],
    }
    wall = _percentiles(walls_ms)
    return Measured(
        case=case,
        rows=len(question.rows.codes.packed),
        bits=question.rows.spec.n_bits,
        k=question.options.k,
        ours_ms=wall["p50"],
        extra={
            "dim": question.rows.spec.dim,
            "asks": len(walls_ms),
            "p95_ms": wall["p95"],
            "p99_ms": wall["p99"],
            "pool_rows": {"least": min(pools), "median": int(np.median(pools)), "most": max(pools)},
            "threshold_bits": [
                min(r.threshold_bits for r in receipts),
                max(r.threshold_bits for r in receipts),
            ],
            "truncated": sum(receipt.pool_truncated for receipt in receipts),
            "exact": sum(receipt.exact for receipt in receipts),
            "stages_ms": {name: _percentiles(values) for name, values in stages_ms.items()},
            **extra,
        },
    )


def _at_once(client: Client, question: Question, asks: int) -> dict[str, float]:
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="ask") as pool:
        began_s = time.perf_counter()
        walls_ms = list(pool.map(lambda number: question.ask(client, number)[1], range(asks)))
        took_s = time.perf_counter() - began_s
    found = _percentiles(walls_ms)
    return {
        "queries_per_s_8_in_flight": asks / took_s,
        "p50_ms_8_in_flight": found["p50"],
        "p99_ms_8_in_flight": found["p99"],
    }


def _percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values_ms, [50, 95, 99]).tolist()
    return {"p50": p50, "p95": p95, "p99": p99}
