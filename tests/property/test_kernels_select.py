from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_service.kernels import select, texts
from search_service.snapshot import Texts
from tests.reference import kernels as slow

# Few keys make many ties. Surrogates are no UTF-8.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
tables = st.lists(st.tuples(st.integers(0, 4), names), max_size=60, unique_by=lambda pair: pair[1])


@given(tables, st.integers(1, 70))
def test_chosen_equal_the_twins(table: list[tuple[int, str]], k: int) -> None:
    keys = [key for key, _ in table]
    ids = [name for _, name in table]
    positions, chosen_ids = select.k_smallest(
        np.array(keys, dtype=np.uint64), k, lambda at: [ids[i] for i in at]
    )
    assert positions.tolist() == slow.k_smallest(keys, ids, k)
    assert chosen_ids == [ids[i] for i in positions]


@given(st.lists(st.tuples(st.floats(0, width=32), st.integers(0, 512)), min_size=2))
def test_packed_keys_keep_the_order(pairs: list[tuple[float, int]]) -> None:
    keys = select.euclidean_keys(
        np.array([distance for distance, _ in pairs], dtype=np.float32),
        np.array([bits for _, bits in pairs], dtype=np.uint16),
    )
    by_key = sorted(range(len(pairs)), key=lambda i: int(keys[i]))
    assert [pairs[i] for i in by_key] == sorted(pairs)
    assert len(set(keys.tolist())) == len(set(pairs))


def test_ids_are_asked_for_only_where_they_matter() -> None:
    asked: list[int] = []

    def ids_of(positions: np.ndarray) -> list[str]:
        asked.extend(positions.tolist())
        return [str(position) for position in positions]

    keys = np.array([5, 1, 9, 5, 2, 9, 9], dtype=np.uint64)
    positions, ids = select.k_smallest(keys, 3, ids_of)
    assert positions.tolist() == [1, 4, 0]
    assert ids == ["1", "4", "0"]
    assert sorted(asked) == [0, 1, 3, 4]  # the answer, and the tie at its edge


# Bytes that make long common beginnings, ends inside of a round of seven, and zeros.
parts = st.sampled_from([b"a", b"\0", b"zz", b"1234567", b"\xff\xff"])
byte_ids = st.lists(parts, max_size=6).map(b"".join)
byte_tables = st.lists(
    st.tuples(st.integers(0, 2), byte_ids), min_size=1, max_size=80, unique_by=lambda pair: pair[1]
)


@given(byte_tables, st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_the_kernel_chooses_and_orders_as_a_sort_does(
    table: list[tuple[int, bytes]], k: int, seed: int
) -> None:
    keys = [key for key, _ in table]
    ids = [item_id for _, item_id in table]
    # The keys need not be those of the first rows, nor of rows in order.
    rows = np.random.default_rng(seed).permutation(2 * len(ids))[: len(ids)]
    stored = [b"never read"] * (2 * len(ids))
    for row, item_id in zip(rows.tolist(), ids, strict=True):
        stored[row] = item_id
    column = Texts.of(stored)
    chosen = np.empty(min(k, len(ids)), dtype=np.int64)
    select.nearest(np.array(keys, dtype=np.uint64), rows, column.data, column.ends, chosen)
    want = sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]))[:k]
    assert chosen.tolist() == want


@pytest.mark.parametrize("k", [1, 10, 4999, 5000])
@pytest.mark.parametrize("n_keys", [1, 3, 10**6])
def test_the_kernel_on_many_that_are_tied(n_keys: int, k: int) -> None:
    rng = np.random.default_rng(n_keys)
    ids = [f"a/long/common/beginning/{i:07}".encode() for i in rng.permutation(5000)]
    keys = rng.integers(0, n_keys, len(ids)).astype(np.uint64)
    column = Texts.of(ids)
    chosen = np.empty(k, dtype=np.int64)
    select.nearest(keys, np.arange(len(ids)), column.data, column.ends, chosen)
    want = sorted(range(len(ids)), key=lambda i: (int(keys[i]), ids[i]))[:k]
    assert chosen.tolist() == want


def test_the_kernel_ends_where_ids_are_the_same() -> None:
    # Dead rows keep theirs, so a table may have them; who is chosen does not matter.
    column = Texts.of([b"the same, long"] * 100)
    chosen = np.empty(50, dtype=np.int64)
    select.nearest(np.zeros(100, dtype=np.uint64), np.arange(100), column.data, column.ends, chosen)
    assert len(set(chosen.tolist())) == 50


@given(st.lists(st.binary(max_size=5), min_size=1), st.data())
def test_strings_of_rows_are_taken(strings: list[bytes], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(strings) - 1)))
    column = Texts.of(strings)
    rows = np.array(chosen, dtype=np.int64)
    ends = np.empty(len(chosen), dtype=np.uint32)
    taken = np.empty(texts.measure(column.ends, rows, ends), dtype=np.uint8)
    texts.take(column.data, column.ends, rows, taken)
    want = [strings[row] for row in chosen]
    assert taken.tobytes() == b"".join(want)
    assert ends.tolist() == np.cumsum([len(string) for string in want], dtype=int).tolist()
