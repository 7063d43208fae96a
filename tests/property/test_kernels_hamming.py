from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens import codes
from search_service.kernels import hamming, lists
from search_service.kernels.vectors import GROUP_ROWS
from tests.reference import kernels as slow

NO_FLAGS = np.empty(0, dtype=np.uint8)


@dataclass
class Table:
    packed: np.ndarray
    queries: np.ndarray
    """Packed, too."""
    dead: np.ndarray
    """Empty if no row is dead."""
    n_bits: int

    @property
    def rows(self) -> int:
        return len(self.packed)


@dataclass
class Found:
    states: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    row_bits: np.ndarray

    def listed(self, part: int, query: int) -> list[tuple[int, int]]:
        n = self.states[part, query, hamming.N_STORED]
        rows, bits = self.rows[part, query, :n], self.row_bits[part, query, :n]
        return list(zip(rows.tolist(), bits.tolist(), strict=True))


def random_codes(rng: np.random.Generator, n: int, n_bits: int, crowd: float) -> np.ndarray:
    """Packed codes; the larger `crowd`, the more bits they share."""
    shared = rng.random(n_bits) < 0.5
    flipped = rng.random((n, n_bits)) < (1 - crowd) / 2
    return codes.pack(shared ^ flipped)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    n_bits = draw(st.one_of(st.sampled_from([1, 8, 63, 64, 65, 128, 129]), st.integers(1, 512)))
    n = draw(st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129]), st.integers(0, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    packed = random_codes(rng, n, n_bits, draw(st.sampled_from([0.0, 0.9, 1.0])))
    queries = random_codes(rng, draw(st.integers(1, 3)), n_bits, 0.0)
    if n and draw(st.booleans()):
        queries[0] = packed[n // 2]
    share = draw(st.sampled_from([None, 0.0, 0.4, 1.0]))
    dead = NO_FLAGS if share is None else (rng.random(n) < share).astype(np.uint8)
    return Table(packed, queries, dead, n_bits)


def edges_of(rows: int, n_parts: int) -> list[int]:
    n_groups = rows // GROUP_ROWS
    return [n_groups * i // n_parts * GROUP_ROWS for i in range(n_parts)] + [rows]


def words_of(queries: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes.as_words(queries).T)


def scan(
    table: Table,
    *,
    ceiling: int,
    n_wanted: int = 0,
    room: int | None = None,
    n_parts: int = 1,
    columns: list[np.ndarray] | None = None,
) -> Found:
    """Scan in as many steps as there are groups, so that going on is tested, too."""
    kept = list(codes.as_words(table.packed)) if columns is None else columns
    addresses = np.array([word.__array_interface__["data"][0] for word in kept], dtype=np.int64)
    n_queries, edges = len(table.queries), edges_of(table.rows, n_parts)
    room = table.rows if room is None else room
    shape = (n_parts, n_queries, room)
    found = Found(
        states=np.zeros((n_parts, n_queries, hamming.N_STATE), dtype=np.int64),
        counts=np.zeros((n_parts, n_queries, table.n_bits + 1), dtype=np.int64),
        rows=np.full(shape, -1, dtype=np.int64),
        row_bits=np.full(shape, 4242, dtype=np.uint16),
    )
    found.states[:, :, hamming.CEILING] = ceiling
    found.states[:, :, hamming.NEAREST_MISSED] = hamming.NEVER
    step = 2 * GROUP_ROWS
    for done in range(0, max(edges[-1] - edges[-2], 1), step):
        starts = np.array([min(edges[i] + done, edges[i + 1]) for i in range(n_parts)])
        stops = np.array([min(int(starts[i]) + step, edges[i + 1]) for i in range(n_parts)])
        hamming.scan(
            addresses,
            words_of(table.queries),
            table.dead,
            starts,
            stops,
            np.full(n_queries, n_wanted, dtype=np.int64),
            found.states,
            found.counts,
            found.rows,
            found.row_bits,
            np.empty((n_parts, hamming.BLOCK_GROUPS + 1), dtype=np.int64),
            np.empty((n_parts, hamming.BLOCK_GROUPS + 1), dtype=np.uint64),
        )
    return found


def expected(table: Table, query: int) -> list[tuple[int, int]]:
    """Return (row, distance) of every alive row."""
    return [
        (row, slow.hamming(code.tobytes(), table.queries[query].tobytes()))
        for row, code in enumerate(table.packed)
        if not (table.dead.size and table.dead[row])
    ]


@given(tables(), st.integers(0, 512), st.integers(1, 4))
def test_rows_and_counts_equal_the_twins(table: Table, radius: int, n_parts: int) -> None:
    found = scan(table, ceiling=radius, n_parts=n_parts)
    for query in range(len(table.queries)):
        want = [(row, bits) for row, bits in expected(table, query) if bits <= radius]
        listed = [pair for part in range(n_parts) for pair in found.listed(part, query)]
        assert listed == want
        bits = [distance for _, distance in want]
        counts = found.counts[:, query].sum(axis=0).tolist()
        assert counts == [bits.count(distance) for distance in range(table.n_bits + 1)]
    assert (found.states[:, :, hamming.CEILING] == radius).all()
    assert (found.states[:, :, hamming.NEAREST_MISSED] == hamming.NEVER).all()


@given(tables(), st.integers(1, 100), st.integers(0, 100), st.integers(1, 3))
def test_a_lowered_ceiling_and_a_full_list_lose_nothing_unnoticed(
    table: Table, n_wanted: int, room: int, n_parts: int
) -> None:
    found = scan(table, ceiling=table.n_bits, n_wanted=n_wanted, room=room, n_parts=n_parts)
    edges = edges_of(table.rows, n_parts)
    for query in range(len(table.queries)):
        every = expected(table, query)
        for part in range(n_parts):
            mine = [(r, b) for r, b in every if edges[part] <= r < edges[part + 1]]
            ceiling = int(found.states[part, query, hamming.CEILING])
            missed = int(found.states[part, query, hamming.NEAREST_MISSED])
            # Lowered only where the part alone has enough.
            if ceiling < table.n_bits:
                assert sum(bits <= ceiling for _, bits in mine) >= n_wanted
            for distance in range(ceiling + 1):
                count = sum(bits == distance for _, bits in mine)
                assert found.counts[part, query, distance] == count
            # Complete below what was missed; each entry true; in order.
            listed = found.listed(part, query)
            assert set(listed) <= set(mine)
            assert listed == sorted(listed)
            below = min(ceiling, missed - 1)
            assert {p for p in listed if p[1] <= below} == {p for p in mine if p[1] <= below}
            if missed != hamming.NEVER:
                assert any(bits == missed for _, bits in mine)


@given(tables(), st.integers(0, 512), st.integers(1, 3))
def test_parts_add_up_and_come_together(table: Table, radius: int, n_parts: int) -> None:
    found = scan(table, ceiling=table.n_bits, n_parts=n_parts, room=40)
    n_queries = len(table.queries)
    balls = np.full((n_queries, table.n_bits + 1), -1, dtype=np.int64)
    summary = np.full((n_queries, 2), -1, dtype=np.int64)
    lists.settle(found.states, found.counts, balls, summary)
    for query in range(n_queries):
        bits = [distance for _, distance in expected(table, query)]
        assert balls[query].tolist() == [
            sum(b <= radius_bits for b in bits) for radius_bits in range(table.n_bits + 1)
        ]
        assert summary[query, 0] == table.n_bits
        assert summary[query, 1] == found.states[:, query, hamming.NEAREST_MISSED].min()
        want = [
            pair
            for part in range(n_parts)
            for pair in found.listed(part, query)
            if pair[1] <= radius
        ]
        rows, row_bits = np.empty(len(want), np.int64), np.empty(len(want), np.uint16)
        n = lists.gather(found.states, found.rows, found.row_bits, query, radius, rows, row_bits)
        assert n == len(want)
        assert list(zip(rows.tolist(), row_bits.tolist(), strict=True)) == want


@pytest.mark.parametrize("n_bits", [64, 100, 512])
@pytest.mark.parametrize("rows", [8192, 8193, 2 * 8192 + 70])
def test_rows_beyond_one_block(n_bits: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    packed = random_codes(rng, rows, n_bits, 0.5)
    dead = (rng.random(rows) < 0.1).astype(np.uint8)
    table = Table(packed, packed[[-1, 5]], dead, n_bits)
    addresses = list(codes.as_words(packed))
    found = scan(table, ceiling=n_bits // 4, columns=addresses)
    for query in range(2):
        want = [(row, bits) for row, bits in expected(table, query) if bits <= n_bits // 4]
        assert found.listed(0, query) == want


def test_the_distances_of_one_table_are_found_at_any_block_size() -> None:
    # One call for all rows, which takes the blocks one by one.
    rng = np.random.default_rng(3)
    packed = random_codes(rng, 3 * 8192 + 100, 64, 0.0)
    (words,) = codes.as_words(packed)
    n = len(packed)
    states = np.zeros((1, 1, hamming.N_STATE), dtype=np.int64)
    states[:, :, hamming.CEILING] = 24
    states[:, :, hamming.NEAREST_MISSED] = hamming.NEVER
    counts = np.zeros((1, 1, 65), dtype=np.int64)
    rows, bits = np.empty((1, 1, n), np.int64), np.empty((1, 1, n), np.uint16)
    hamming.scan(
        np.array([words.__array_interface__["data"][0]]),
        words[:1].reshape(1, 1).copy(),
        NO_FLAGS,
        np.array([0]),
        np.array([n]),
        np.array([0]),
        states,
        counts,
        rows,
        bits,
        np.empty((1, hamming.BLOCK_GROUPS + 1), dtype=np.int64),
        np.empty((1, hamming.BLOCK_GROUPS + 1), dtype=np.uint64),
    )
    distances = np.bitwise_count(words ^ words[0])
    want = np.flatnonzero(distances <= 24)
    n_found = int(states[0, 0, hamming.N_STORED])
    assert rows[0, 0, :n_found].tolist() == want.tolist()
    assert bits[0, 0, :n_found].tolist() == distances[want].tolist()


@given(tables(), st.integers(1, 5))
def test_a_sample_counts_what_it_looks_at(table: Table, n_blocks: int) -> None:
    block_rows = table.rows // n_blocks
    kept = list(codes.as_words(table.packed))
    addresses = np.array([word.__array_interface__["data"][0] for word in kept], dtype=np.int64)
    counts = np.zeros((len(table.queries), table.n_bits + 1), dtype=np.int64)
    n_alive = hamming.sample(
        addresses, words_of(table.queries), table.dead, table.rows, n_blocks, block_rows, counts
    )
    starts = [
        (table.rows - block_rows) * i // max(n_blocks - 1, 1) if n_blocks > 1 else 0
        for i in range(n_blocks)
    ]
    for query in range(len(table.queries)):
        by_row = dict(expected(table, query))
        looked_at = [
            by_row[row]
            for start in starts
            for row in range(start, start + block_rows)
            if row in by_row
        ]
        assert n_alive == len(looked_at)
        assert counts[query].tolist() == [
            looked_at.count(distance) for distance in range(table.n_bits + 1)
        ]


def test_padding_bits_are_just_bits() -> None:
    # The kernel knows no padding: who lets set padding bits in would find them in the distance.
    table = Table(np.zeros((2, 8), np.uint8), np.zeros((1, 8), np.uint8), NO_FLAGS, 64)
    words = np.array([0, 1 << 63], dtype=np.uint64)
    assert scan(table, ceiling=64, columns=[words]).listed(0, 0) == [(0, 0), (1, 1)]


@settings(max_examples=10)
@given(tables())
def test_read_only_memory_maps_are_taken(
    tmp_path_factory: pytest.TempPathFactory, table: Table
) -> None:
    if not table.rows:
        return  # nothing to map
    directory = tmp_path_factory.mktemp("words")
    columns = [
        mapped(directory / str(i), column) for i, column in enumerate(codes.as_words(table.packed))
    ]
    if table.dead.size:
        table.dead = mapped(directory / "dead", table.dead)
    assert not columns[0].flags.writeable
    found = scan(table, ceiling=table.n_bits, columns=columns)
    assert found.listed(0, 0) == expected(table, 0)


def mapped(path: Path, array: np.ndarray) -> np.ndarray:
    array.tofile(path)
    return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)


def gathering(rows: np.ndarray, out: np.ndarray) -> None:
    lists.gather(
        np.zeros((1, 1, hamming.N_STATE), dtype=np.int64),
        rows,
        np.zeros((1, 1, 1), dtype=np.uint16),
        0,
        1,
        out,
        np.zeros(1, dtype=np.uint16),
    )


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        gathering(np.zeros((1, 1, 1), dtype=np.float64), np.zeros(1, dtype=np.int64))


def test_read_only_outputs_are_refused() -> None:
    frozen = np.zeros(1, dtype=np.int64)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        gathering(np.zeros((1, 1, 1), dtype=np.int64), frozen)
