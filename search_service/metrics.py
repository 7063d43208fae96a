"""What Prometheus is told of searches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hashlens.rpc import call
from hashlens.rpc.metrics import Counter, Histogram, Metric, StageTimes, gauge
from hashlens.rpc.status import reason_of
from hashlens.types import Receipt, StageTimings
from hashlens.v1 import search_service_pb2 as spb
from search_service.executor import Executor

_POOL_ROWS = (0.0, *(float(step * 10**power) for power in range(1, 8) for step in (1, 2, 5)))
_BATCH_QUERIES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class SearchMetrics:
    """Counts queries, whether they came by themselves or with others."""

    def __init__(self) -> None:
        self._stages = StageTimes(
            "hashlens_search_stage_seconds",
            "Stages of a query: until its version is there, the call to the encoder, waiting for "
            "the kernels, both passes, reading the hits, building the reply.",
            ("wait_version", "encode_call", "queue", "coarse", "fine", "fetch", "reply"),
        )
        self._queries = Counter(
            "hashlens_search_queries", "Queries answered, by outcome.", ["outcome"]
        )
        self._pools = Histogram(
            "hashlens_search_pool_rows", "Rows of a query's pool.", bounds=_POOL_ROWS
        )
        self._batches = Histogram(
            "hashlens_search_batch_queries",
            "Queries that shared a pass over the codes, as each of them saw it.",
            bounds=_BATCH_QUERIES,
        )
        self._rows = Counter("hashlens_search_rows_scanned", "Codes compared in the coarse stage.")
        self._ok = self._queries.of("ok")
        self._pool = self._pools.of()
        self._batch = self._batches.of()
        self._scanned = self._rows.of()

    @contextmanager
    def query(self) -> Iterator[None]:
        """Count the block as one query, by what becomes of it."""
        try:
            yield
        except Exception as error:
            self._queries.of(reason_of(error)).add()
            raise
        self._ok.add()

    def observe(
        self,
        receipt: Receipt | spb.Receipt,
        timings: StageTimings | spb.StageTimings,
        *,
        wait_version_ns: int = 0,
        reply_ns: int = 0,
        has_spans: bool = False,
    ) -> None:
        """Count what one answer cost, right after its reply was built.

        Parameters
        ----------
        receipt, timings
            Of the answer.
        wait_version_ns, reply_ns
            What `timings` do not have.
        has_spans
            Whether its stages become spans. Those of many queries lie over each other, and would
            be too many.
        """
        stages = (
            ("queue", timings.queue_ns),
            ("coarse", timings.coarse_ns),
            ("fine", timings.fine_ns),
            ("fetch", timings.fetch_ns),
            ("reply", reply_ns),
        )
        self._stages.observe(stages)
        self._stages.observe(
            (("wait_version", wait_version_ns), ("encode_call", timings.encode_call_ns))
        )
        self._scanned.add(receipt.rows_scanned)
        self._pool.observe(receipt.pool_size)
        if timings.batch_queries:
            self._batch.observe(timings.batch_queries)
        if has_spans:
            now = call.current()
            if now is not None:
                now.note_stages(stages)

    def collect(self, executor: Executor, max_queue: int) -> Iterator[Metric]:
        """Return what there is to say at this moment."""
        for family in (self._stages, self._queries, self._pools, self._batches, self._rows):
            yield family.collect()
        yield gauge(
            "hashlens_search_queue_jobs", "Jobs that wait for the kernels.", executor.n_waiting
        )
        yield gauge("hashlens_search_queue_limit", "Most that may wait.", max_queue)
