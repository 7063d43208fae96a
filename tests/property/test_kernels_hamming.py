from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens import codes
from search_service.kernels import hamming
from tests.reference import kernels as slow

NO_WORDS = np.empty(0, dtype=np.uint64)
NO_FLAGS = np.empty(0, dtype=np.uint8)


def random_codes(rng: np.random.Generator, n: int, n_bits: int, crowd: float) -> np.ndarray:
    """Packed codes; the larger `crowd`, the more bits they share."""
    shared = rng.random(n_bits) < 0.5
    flipped = rng.random((n, n_bits)) < (1 - crowd) / 2
    return codes.pack(shared ^ flipped)


def scan(
    columns: tuple[np.ndarray, ...], query: np.ndarray, dead: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    # What is there before must not matter.
    distances = np.full(rows, 4242, dtype=np.uint16)
    nearest = np.full(-(-rows // hamming.GROUP_ROWS), 4242, dtype=np.uint16)
    unused = (NO_WORDS,) * (hamming.MAX_WORDS - len(columns))
    hamming.scan(columns + unused, len(columns), query, dead, distances, nearest)
    return distances, nearest


def expected(packed: np.ndarray, query: np.ndarray, dead: np.ndarray) -> list[int]:
    return [
        hamming.DEAD if dead.size and dead[row] else slow.hamming(code.tobytes(), query.tobytes())
        for row, code in enumerate(packed)
    ]


tables = st.tuples(
    st.integers(1, 512),  # bits
    st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129]), st.integers(0, 300)),  # rows
    st.sampled_from([0.0, 0.9, 1.0]),  # crowd
    st.sampled_from(["none", "some", "all"]),  # dead
    st.integers(0, 2**32 - 1),  # seed
)


def make(table: tuple[int, int, float, str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_bits, n, crowd, dead_kind, seed = table
    rng = np.random.default_rng(seed)
    packed = random_codes(rng, n, n_bits, crowd)
    query = random_codes(rng, 1, n_bits, 0.0)[0] if seed % 2 or n == 0 else packed[seed % n]
    share = {"none": 0.0, "some": 0.4, "all": 1.0}[dead_kind]
    dead = NO_FLAGS if dead_kind == "none" else (rng.random(n) < share).astype(np.uint8)
    return packed, query, dead


@given(tables)
def test_distances_equal_the_twins(table: tuple[int, int, float, str, int]) -> None:
    packed, query, dead = make(table)
    distances, nearest = scan(
        tuple(codes.as_words(packed)), codes.as_words(query[None])[:, 0], dead, len(packed)
    )
    want = expected(packed, query, dead)
    assert distances.tolist() == want
    size = hamming.GROUP_ROWS
    assert nearest.tolist() == [min(want[i : i + size]) for i in range(0, len(want), size)]


@given(tables, st.integers(0, 512), st.integers(1, 9))
def test_counts_and_rows_equal_the_twins(
    table: tuple[int, int, float, str, int], radius: int, n_parts: int
) -> None:
    packed, query, dead = make(table)
    distances, nearest = scan(
        tuple(codes.as_words(packed)), codes.as_words(query[None])[:, 0], dead, len(packed)
    )
    want = expected(packed, query, dead)

    counts = np.zeros((n_parts, radius + 1), dtype=np.int64)
    hamming.tally(distances, nearest, radius, counts)
    assert counts.sum(axis=0).tolist() == [want.count(bits) for bits in range(radius + 1)]

    inside = [(row, bits) for row, bits in enumerate(want) if bits <= radius]
    rows = np.full(len(inside), -1, dtype=np.int64)
    row_distances = np.zeros(len(inside), dtype=np.uint16)
    assert hamming.collect(distances, nearest, radius, rows, row_distances) == len(inside)
    assert list(zip(rows.tolist(), row_distances.tolist(), strict=True)) == inside


@pytest.mark.parametrize("n_bits", [64, 100, 512])
@pytest.mark.parametrize("rows", [4096, 4097, 3 * 4096 + 70])
def test_rows_beyond_one_block(n_bits: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    packed = random_codes(rng, rows, n_bits, 0.5)
    dead = (rng.random(rows) < 0.1).astype(np.uint8)
    query = packed[-1]
    distances, nearest = scan(
        tuple(codes.as_words(packed)), codes.as_words(query[None])[:, 0], dead, rows
    )
    want = expected(packed, query, dead)
    assert distances.tolist() == want
    assert nearest[-1] == min(want[rows // 64 * 64 :] or want[-64:])


def test_padding_bits_are_just_bits() -> None:
    # The kernel knows no padding: who lets set padding bits in would find them in the distance.
    words = np.array([0, 1 << 63], dtype=np.uint64)
    distances, _ = scan((words,), np.zeros(1, dtype=np.uint64), NO_FLAGS, 2)
    assert distances.tolist() == [0, 1]


@settings(max_examples=10)
@given(tables)
def test_read_only_memory_maps_are_taken(
    tmp_path_factory: pytest.TempPathFactory, table: tuple[int, int, float, str, int]
) -> None:
    packed, query, dead = make(table)
    if not len(packed):
        return  # nothing to map
    directory = tmp_path_factory.mktemp("words")
    columns = tuple(
        mapped(directory / str(i), column) for i, column in enumerate(codes.as_words(packed))
    )
    flags = mapped(directory / "dead", dead) if dead.size else dead
    assert not columns[0].flags.writeable
    distances, _ = scan(columns, codes.as_words(query[None])[:, 0], flags, len(packed))
    assert distances.tolist() == expected(packed, query, dead)


def mapped(path: Path, array: np.ndarray) -> np.ndarray:
    array.tofile(path)
    return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        hamming.collect(
            np.zeros(1, dtype=np.float64),
            np.zeros(1, dtype=np.uint16),
            1,
            np.zeros(1, dtype=np.int64),
            np.zeros(1, dtype=np.uint16),
        )


def test_read_only_outputs_are_refused() -> None:
    frozen = np.zeros(1, dtype=np.int64)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        hamming.collect(
            np.zeros(1, dtype=np.uint16),
            np.zeros(1, dtype=np.uint16),
            1,
            frozen,
            np.zeros(1, dtype=np.uint16),
        )
