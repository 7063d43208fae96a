"""Cold rows, from real files that were put out of the page cache."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import CancelledError, DeadlineError, PreconditionError
from search_service import fine, readahead
from search_service.bench import pagecache
from search_service.cancel import Cancel
from search_service.readahead import Place
from search_service.snapshot import Snapshot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its page cache")

ROWS, DIM = 4096, 1024


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("cold") / "features"
    numbers = np.random.default_rng(2).random((ROWS, DIM)).astype(np.float16)
    with path.open("wb") as file:
        file.write(numbers.tobytes())
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return path, np.frombuffer(mapping, dtype=np.float16).reshape(ROWS, DIM)


@pytest.fixture
def cold(features: tuple[Path, np.ndarray]) -> Snapshot:
    path, numbers = features
    try:
        pagecache.put_out({path: numbers})
    except PreconditionError as error:
        pytest.skip(str(error))
    packed = np.zeros((ROWS, 1), dtype=np.uint8)
    return Snapshot.from_arrays(packed, n_bits=8, features=numbers, rows_per_segment=1024)


def resident_pages(numbers: np.ndarray) -> int:
    return round(pagecache.resident_share(numbers) * (numbers.nbytes // mmap.PAGESIZE))


def test_what_is_cold_is_told_from_what_is_warm(cold: Snapshot) -> None:
    place, rows = Place.of(cold), np.arange(0, ROWS, 7)
    assert readahead.is_cold(place, rows)
    for segment in cold.features:
        segment.sum(dtype=np.float64)
    assert not readahead.is_cold(place, rows)
    assert not readahead.is_cold(place, rows[:0])


def test_memory_of_our_own_is_warm() -> None:
    snapshot = Snapshot.from_arrays(
        np.zeros((9, 1), dtype=np.uint8), n_bits=8, features=np.ones((9, 5), dtype=np.float32)
    )
    assert not readahead.is_cold(Place.of(snapshot), np.arange(9))


def test_cold_rows_give_the_distances_of_warm_ones_and_little_else_is_read(
    cold: Snapshot, features: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_STEP_BYTES", 10 * 2 * DIM)
    monkeypatch.setattr(readahead, "IN_FLIGHT_BYTES", 30 * 2 * DIM)
    rows = np.arange(3, ROWS, 61)
    query = np.ones(DIM, dtype=np.float32)
    # The system may keep a few pages that it is asked to put out.
    n_before = resident_pages(features[1])
    got = fine.distances_to(cold, rows, query, Cancel())
    # A row of 2 KiB lies in one page.
    assert len(rows) <= resident_pages(features[1]) <= len(rows) + n_before
    assert not readahead.is_cold(Place.of(cold), rows)
    assert fine.distances_to(cold, rows, query, Cancel()).tobytes() == got.tobytes()
    assert not [thread for thread in threading.enumerate() if thread.name == "readahead"]


def test_no_more_is_in_flight_than_allowed(cold: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_STEP_BYTES", 10 * 2 * DIM)
    monkeypatch.setattr(readahead, "IN_FLIGHT_BYTES", 30 * 2 * DIM)
    asked = []
    monkeypatch.setattr(readahead, "want", lambda starts, ends: asked.append(len(starts)))
    rows = np.arange(0, ROWS, 61)
    taken, most = [], 0
    with closing(readahead.blocks(Place.of(cold), rows, 1000, Cancel())) as parts:
        for part in parts:
            threading.Event().wait(0.01)  # the thread asks for all that it may
            taken.append(rows[part])
            most = max(most, len(asked) - len(taken))
    assert np.concatenate(taken).tolist() == rows.tolist()
    assert max(map(len, taken)) == 10
    assert 0 < most <= 3


@pytest.mark.parametrize("error", [CancelledError, DeadlineError])
def test_it_stops_between_blocks(
    cold: Snapshot, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(readahead, "_STEP_BYTES", 2 * DIM)
    monkeypatch.setattr(readahead, "want", lambda starts, ends: None)
    cancel = Cancel(60)
    rows = np.arange(0, ROWS, 9)
    with closing(readahead.blocks(Place.of(cold), rows, 1000, cancel)) as parts:
        assert next(parts) == slice(0, 1)
        if error is CancelledError:
            cancel.set()
        else:
            cancel._ends_s = 0.0  # Its time is over now.
        with pytest.raises(error):
            next(parts)
    assert not [thread for thread in threading.enumerate() if thread.name == "readahead"]


def test_a_disk_that_does_not_answer_is_left_at_the_deadline(
    cold: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(readahead, "want", lambda starts, ends: never.wait(0.5))
    rows = np.arange(0, ROWS, 9)
    parts = readahead.blocks(Place.of(cold), rows, 1000, Cancel(0.1))
    with pytest.raises(DeadlineError), closing(parts):
        next(parts)
