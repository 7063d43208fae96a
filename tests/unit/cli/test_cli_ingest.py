from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hashlens.cli.index import BATCH_BYTES, cut
from hashlens.cli.ingest import pipelined
from hashlens.cli.scan import ImageFile


def test_results_come_in_order_and_few_batches_are_begun_ahead() -> None:
    begun: list[int] = []

    def batches() -> Iterator[int]:
        for n in range(50):
            begun.append(n)
            yield n

    taken = 0
    for taken, result in enumerate(pipelined(lambda n: n * n, batches(), 3)):
        assert result == taken * taken
        assert len(begun) <= taken + 1 + 2 * 3
    assert taken == 49


def test_workers_are_at_work_at_once() -> None:
    # Each waits for the other: one after the other would break the barrier.
    barrier = threading.Barrier(2, timeout=30)
    assert len(list(pipelined(lambda _: barrier.wait(), range(4), 2))) == 4


def test_a_batch_that_raises_ends_it() -> None:
    done: list[int] = []

    def work(n: int) -> int:
        if n == 2:
            raise ValueError("no good")
        done.append(n)
        return n

    results = pipelined(work, range(1000), 1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no good"):
        next(results)
    assert len(done) < 10


def test_cut() -> None:
    files = [
        ImageFile(str(n), str(n), size, 0) for n, size in enumerate([1] * 5 + [BATCH_BYTES, 1, 2])
    ]
    assert [[f.path for f in batch] for batch in cut(files, 3)] == [
        ["0", "1", "2"], ["3", "4"], ["5"], ["6", "7"],
    ]  # fmt: skip
    assert list(cut([], 3)) == []
