from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search_service.kernels import select
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
