from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import codes
from search_service import margins
from search_service.cancel import Cancel
from search_service.kernels import asymmetric, hamming
from search_service.snapshot import Snapshot
from tests.reference import kernels as slow
from tests.reference import search as slow_search

NO_WORDS = np.empty(0, dtype=np.uint64)


def distances(
    columns: tuple[np.ndarray, ...], query: np.ndarray, weights: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    out = np.full(len(rows), 4242, dtype=np.uint32)  # what is there before must not matter
    unused = (NO_WORDS,) * (hamming.MAX_WORDS - len(columns))
    by_word = np.zeros(64 * len(columns), dtype=np.uint8)
    by_word[: len(weights)] = weights
    asymmetric.distances(columns + unused, len(columns), query, by_word, rows, out)
    return out


@given(
    n_bits=st.one_of(st.sampled_from([1, 8, 48, 64, 65, 512]), st.integers(1, 512)),
    n=st.integers(1, 60),
    weigh=st.sampled_from(["all", "none", "random"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_distances_equal_the_twins(n_bits: int, n: int, weigh: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = codes.pack(rng.random((n, n_bits)) < 0.5)
    query = codes.pack(rng.random((1, n_bits)) < 0.5)
    weights = {
        "all": np.full(n_bits, 255, dtype=np.uint8),
        "none": np.zeros(n_bits, dtype=np.uint8),
        "random": rng.integers(0, 256, n_bits).astype(np.uint8),
    }[weigh]
    rows = rng.integers(0, n, rng.integers(0, 2 * n))  # in any order, with repetitions
    got = distances(
        tuple(codes.as_words(packed)), codes.as_words(query)[:, 0], weights, rows
    ).tolist()
    pairs = [(packed[row].tobytes(), query.tobytes()) for row in rows]
    assert got == [slow.asymmetric(row, asked, weights.tolist()) for row, asked in pairs]
    if weigh == "all":
        assert got == [255 * slow.hamming(row, asked) for row, asked in pairs]


def test_read_only_memory_maps_are_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    packed = codes.pack(rng.random((40, 100)) < 0.5)
    weights = rng.integers(0, 256, 100).astype(np.uint8)

    def mapped(name: str, array: np.ndarray) -> np.ndarray:
        array.tofile(tmp_path / name)
        return np.memmap(tmp_path / name, dtype=array.dtype, mode="r", shape=array.shape)

    columns = codes.as_words(packed)
    rows = np.arange(40)
    in_memory = distances(tuple(columns), columns[:, 0].copy(), weights, rows)
    on_disk = tuple(mapped(str(i), column) for i, column in enumerate(columns))
    assert not on_disk[0].flags.writeable
    got = distances(on_disk, mapped("query", columns[:, 0].copy()), weights, mapped("rows", rows))
    assert got.tolist() == in_memory.tolist()
    assert got[0] == 0


@given(
    st.lists(
        st.floats(0, 1, width=32)
        # Halfway between two weights, and next to it.
        | st.integers(0, 254).map(lambda n: float(np.float32(0.5 + (n + 0.5) / 510)))
        | st.sampled_from([0.25, 0.375, 0.75, 0.9375]),
        min_size=1,
        max_size=20,
    )
)
def test_weights_are_rounded_as_exact_arithmetic_does(activations: list[float]) -> None:
    h = np.array(activations, dtype=np.float32)
    assert margins.bit_weights(h).tolist() == slow_search.bit_weights(h)


def test_weights_at_the_ends() -> None:
    h = np.array([0, 0.5, 1, 0.25, 0.75], dtype=np.float32)
    # 510 * 0.25 is 127.5: to even.
    assert margins.bit_weights(h).tolist() == [255, 0, 255, 128, 128]


@pytest.mark.parametrize("n_bits", [63, 64, 65])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, n_bits: int) -> None:
    rng = np.random.default_rng(n_bits)
    packed = codes.pack(rng.random((100, n_bits)) < 0.5)
    snapshot = Snapshot.from_arrays(packed, n_bits=n_bits)
    weights = rng.integers(0, 256, n_bits).astype(np.uint8)
    query = codes.as_words(packed[:1])[:, 0]
    rows = rng.permutation(100)
    whole = margins.distances_to(snapshot, rows, query, weights, Cancel())
    monkeypatch.setattr(margins, "_BLOCK_ROWS", 7)
    parts = margins.distances_to(snapshot, rows, query, weights, Cancel())
    assert parts.tolist() == whole.tolist()
