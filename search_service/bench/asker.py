"""Our coarse stage as benchmarks ask it, and brute force to hold it against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import FeatureDtype, TagFilter
from search_service import coarse
from search_service.bench.data import CodeSet
from search_service.bench.report import WrongAnswerError
from search_service.cancel import Cancel
from search_service.kernels.compile import INT64, U64_IN, VOID, kernel
from search_service.kernels.vectors import popcount
from search_service.multi_index import MultiIndex, Near
from search_service.scan import Scratch
from search_service.snapshot import Snapshot, Texts

_PLANTED_FLIPS = 3
_NO_IDS = "these rows have codes and nothing else"


class _NoIds:
    """The coarse stage asks for none."""

    def id_texts(self) -> Texts:
        raise AssertionError(_NO_IDS)

    def payload_texts(self) -> Texts | None:
        raise AssertionError(_NO_IDS)

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        raise AssertionError(_NO_IDS)

    def row_of(self, item_id: str) -> int | None:
        raise AssertionError(_NO_IDS)

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        raise AssertionError(_NO_IDS)

    def tags_of(self, rows: NDArray[np.int64]) -> list[tuple[str, ...]]:
        raise AssertionError(_NO_IDS)

    def expiries_of(self, rows: NDArray[np.int64]) -> list[int]:
        raise AssertionError(_NO_IDS)

    def index_tags(self) -> bool:
        raise AssertionError(_NO_IDS)

    def passing(self, wanted: TagFilter) -> NDArray[np.int64]:
        raise AssertionError(_NO_IDS)


def snapshot_of(table: CodeSet) -> Snapshot:
    """Return codes as a snapshot to search, without features and ids."""
    rows = len(table.packed)
    return Snapshot(
        n_bits=table.n_bits,
        dim=0,
        feature_dtype=FeatureDtype.F32,
        version=0,
        rows=rows,
        n_alive=rows,
        words=tuple(codes.as_words(table.packed)),
        ids=_NoIds(),
    )


class Asker:
    """Asks our coarse stage, and checks what it says.

    Parameters
    ----------
    snapshot
        What to search.
    table
        The same codes, and the queries.
    """

    def __init__(self, snapshot: Snapshot, table: CodeSet) -> None:
        self._snapshot = snapshot
        self._table = table
        self._queries = np.ascontiguousarray(codes.as_words(table.queries).T)
        self._scratch = Scratch()
        self._out = np.empty(snapshot.rows, dtype=np.uint8)

    def pool(
        self,
        query: int,
        *,
        radius_bits: int | None = None,
        n_rows: int = 0,
        index: MultiIndex | None = None,
    ) -> coarse.Pool:
        """Return one query's pool."""
        return self.pools([query], radius_bits=radius_bits, n_rows=n_rows, index=index)[0]

    def pools(
        self,
        queries: Sequence[int],
        *,
        radius_bits: int | None = None,
        n_rows: int = 0,
        index: MultiIndex | None = None,
    ) -> list[coarse.Pool]:
        """Return the pools of several queries, by their numbers."""
        n = len(self._queries)
        wanted = [
            coarse.Wanted(query=self._queries[i % n], radius_bits=radius_bits, n_rows=n_rows)
            for i in queries
        ]
        return coarse.find_pools(
            self._snapshot, wanted, scratch=self._scratch, cancel=Cancel(), index=index
        )

    def by_index(self, index: MultiIndex, query: int, radius_bits: int) -> Near:
        """Return the rows within a radius by the index, whether it would be chosen or not."""
        words = self._queries[query % len(self._queries)]
        if not np.isfinite(index.cost_ns(words, radius_bits)):
            raise WrongAnswerError(f"an index does not answer a radius of {radius_bits} bits here")
        return index.find(self._snapshot, words, radius_bits)

    def nearest(self, query: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """Return one query's k nearest by (distance, row)."""
        return self.nearest_of([query], k)[0]

    def nearest_of(
        self, queries: Sequence[int], k: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.uint16]]]:
        """Return the k nearest of each query by (distance, row)."""
        found = []
        for pool in self.pools(queries, n_rows=k):
            order = np.argsort(pool.hamming_bits, kind="stable")[:k]
            found.append((pool.rows[order], pool.hamming_bits[order]))
        return found

    def plain_pass(self, query: int) -> None:
        """Read all codes and write all distances of each word, and nothing else."""
        words = self._snapshot.words
        query_words = self._queries[query % len(self._queries)]
        for column, word in zip(words, query_words, strict=True):
            _plain_pass(column, word, self._out, numba.get_num_threads())

    def check(self, query: int, *, k: int, radius_bits: int) -> None:
        """Compare with brute force."""
        distances = distances_of(self._table, query)
        order = np.lexsort((np.arange(len(distances)), distances))[:k]
        rows, row_bits = self.nearest(query, k)
        check_same("nearest", rows, order)
        check_same("distances of the nearest", row_bits, distances[order])
        inside = np.flatnonzero(distances <= radius_bits)
        pool = self.pool(query, radius_bits=radius_bits)
        check_same("ball", pool.rows, inside)
        check_same("distances of the ball", pool.hamming_bits, distances[inside])

    def check_batch(self, k: int) -> None:
        """Compare a batch with its queries one by one."""
        every = range(len(self._queries))
        for query, (rows, row_bits) in zip(every, self.nearest_of(every, k), strict=True):
            alone = self.nearest(query, k)
            check_same("batch", rows, alone[0])
            check_same("distances of the batch", row_bits, alone[1])

    def check_index(self, index: MultiIndex, query: int, radius_bits: int) -> None:
        """Compare the index, whether it would be chosen or not, with the scan."""
        pool = self.pool(query, radius_bits=radius_bits)
        if not np.isfinite(index.cost_ns(self._queries[query], radius_bits)):
            return
        near = self.by_index(index, query, radius_bits)
        check_same("index", near.rows, pool.rows)
        check_same("distances by index", near.hamming_bits, pool.hamming_bits)


@kernel(VOID(U64_IN, types.uint64, types.Array(types.uint8, 1, "C"), INT64), parallel=True)
def _plain_pass(column, word, out, n_parts):  # type: ignore[no-untyped-def]
    n = column.shape[0]
    for part in numba.prange(n_parts):
        codes_of_part = column[n * part // n_parts : n * (part + 1) // n_parts]
        out_of_part = out[n * part // n_parts : n * (part + 1) // n_parts]
        for i in range(codes_of_part.shape[0]):
            out_of_part[i] = popcount(codes_of_part[i] ^ word)


def planted(table: CodeSet, n: int, seed: int) -> CodeSet:
    """Return queries that each have a neighbour: a row with a few bits flipped."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(table.packed), n)
    bits = codes.unpack(table.packed[rows], table.n_bits)
    for row in bits:
        row[rng.choice(table.n_bits, min(_PLANTED_FLIPS, table.n_bits), replace=False)] ^= True
    return CodeSet(table.packed, codes.pack(bits), table.classes, table.n_bits)


def distances_of(table: CodeSet, query: int) -> NDArray[np.uint16]:
    """Return all distances, by NumPy, block by block: the table may be large."""
    found = np.empty(len(table.packed), dtype=np.uint16)
    for lo in range(0, len(found), 1 << 22):
        block = table.packed[lo : lo + (1 << 22)]
        found[lo : lo + len(block)] = np.bitwise_count(block ^ table.queries[query]).sum(
            axis=1, dtype=np.uint16
        )
    return found


def sorted_distances(table: CodeSet, query: int) -> NDArray[np.uint16]:
    """Return all distances, ascending."""
    return np.sort(distances_of(table, query))


def check_same(what: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Raise WrongAnswerError unless two arrays are the same."""
    if found.shape != expected.shape or not np.array_equal(found, expected):
        raise WrongAnswerError(f"{what}: not what brute force says; no time is worth printing")
