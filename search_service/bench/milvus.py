"""Milvus Lite as a peer of `hashlens bench serve`: BIN_FLAT over its own gRPC server."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import time
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from hashlens.traffic import Loaded
from search_service.bench.data import CodeSet
from search_service.bench.report import WrongAnswerError

# milvus-lite 2.5 asks it for its own version, and setuptools does not bring it any more.
_RESOURCES: Any = types.ModuleType("pkg_resources")
_RESOURCES.DistributionNotFound = importlib.metadata.PackageNotFoundError
_RESOURCES.get_distribution = importlib.metadata.distribution
sys.modules.setdefault("pkg_resources", _RESOURCES)

import milvus_lite  # noqa: E402, F401 - found to be missing here, not in the middle of the run
from pymilvus import DataType, MilvusClient  # noqa: E402

_NAME = "bench"
_BATCH_ROWS = 10_000
_WARMUP_CALLS = 4
_N_CHECKED = 8


class MilvusLite:
    """A table of codes in Milvus Lite; rows are their own keys.

    Parameters
    ----------
    path
        Its file, which is made.
    data
        What it holds. The code length is a multiple of 8.
    """

    def __init__(self, path: Path, data: CodeSet) -> None:
        self._client = MilvusClient(str(path))
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("code", DataType.BINARY_VECTOR, dim=data.n_bits)
        index = self._client.prepare_index_params()
        index.add_index("code", index_type="BIN_FLAT", metric_type="HAMMING")
        self._client.create_collection(_NAME, schema=schema, index_params=index)
        for lo in range(0, len(data.packed), _BATCH_ROWS):
            block = data.packed[lo : lo + _BATCH_ROWS]
            self._client.insert(
                _NAME, [{"id": lo + i, "code": code.tobytes()} for i, code in enumerate(block)]
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def check(self, data: CodeSet, k: int = 100) -> None:
        """Raise WrongAnswerError unless its distances are those of brute force."""
        for query in data.queries[:_N_CHECKED]:
            distances = np.bitwise_count(data.packed ^ query).sum(axis=1, dtype=np.int64)
            found = self._search(query.tobytes(), k)
            said = sorted(int(hit["distance"]) for hit in found)
            if said != np.sort(distances)[:k].tolist():
                raise WrongAnswerError("milvus-lite does not find the nearest")

    def load(self, queries: Sequence[bytes], *, k: int, in_flight: int, seconds: float) -> Loaded:
        """Apply a closed loop of threads, through its own client."""
        for query in queries[:_WARMUP_CALLS]:
            self._search(query, k)
        began_s = time.perf_counter()
        ends_s = began_s + seconds

        def caller(number: int) -> list[float]:
            latencies_ms = []
            for place in itertools.count(number, in_flight):
                sent_s = time.perf_counter()
                if sent_s >= ends_s:
                    break
                self._search(queries[place % len(queries)], k)
                latencies_ms.append((time.perf_counter() - sent_s) * 1e3)
            return latencies_ms

        with ThreadPoolExecutor(in_flight) as threads:
            latencies_ms = list(itertools.chain(*threads.map(caller, range(in_flight))))
        spent_s = time.perf_counter() - began_s
        n = len(latencies_ms)
        return Loaded(n / spent_s, tuple(latencies_ms), n_failed=0, n_sent=n)

    def _search(self, query: bytes, k: int) -> Sequence[Any]:
        parameters = {"metric_type": "HAMMING"}
        found: Sequence[Any] = self._client.search(
            _NAME, [query], anns_field="code", limit=k, search_params=parameters
        )[0]
        return found
