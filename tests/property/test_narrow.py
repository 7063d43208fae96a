"""The best of many keys, block by block, beside sorting them all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens.errors import CancelledError
from search_service import narrow
from search_service.cancel import Cancel
from search_service.snapshot import Texts

KEYS = st.lists(st.integers(0, 6), max_size=80)


@given(keys=KEYS, k=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_nearest_are_those_of_a_sort(keys: list[int], k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [str(number).encode() for number in rng.permutation(len(keys) + 5)]
    rows = np.sort(rng.permutation(len(ids))[: len(keys)]).astype(np.int64)
    want = sorted(range(len(keys)), key=lambda i: (keys[i], ids[rows[i]]))[:k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "_CHOSEN_ROWS", 3)
        got = narrow.nearest(np.array(keys, dtype=np.uint64), rows, Texts.of(ids), k, Cancel())
    assert got.tolist() == want


@given(bits=KEYS, radius_bits=st.integers(0, 6))
def test_what_is_within_a_radius(bits: list[int], radius_bits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "BLOCK_ROWS", 7)
        got = narrow.within(np.array(bits, dtype=np.uint16), radius_bits, Cancel())
    assert got.tolist() == [i for i, distance in enumerate(bits) if distance <= radius_bits]


def test_who_has_left_is_not_worked_for() -> None:
    cancel = Cancel()
    cancel.set()
    n = 4 * narrow.BLOCK_ROWS
    with pytest.raises(CancelledError):
        narrow.within(np.zeros(n, dtype=np.uint16), 1, cancel)
    rows = np.arange(n, dtype=np.int64)
    with pytest.raises(CancelledError):
        narrow.nearest(np.zeros(n, np.uint64), rows, Texts.of([b"a"] * n), 1, cancel)
