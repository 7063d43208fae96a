from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hashlens.types import FeatureDtype
from search_service.snapshot import Snapshot

PACKED = np.array([[1, 2], [3, 0], [255, 15]], dtype=np.uint8)


def make(**fields: Any) -> Snapshot:
    defaults: dict[str, Any] = {
        "n_bits": 12,
        "features": np.arange(6, dtype=np.float16).reshape(3, 2),
        "ids": ["x", "y", "x"],
        "dead": [True, False, False],
        "has_feature": [True, True, False],
        "rows_per_segment": 2,
    }
    return Snapshot.from_arrays(PACKED, **{**defaults, **fields})


def test_what_goes_in_comes_out() -> None:
    snapshot = make()
    assert (snapshot.rows, snapshot.n_alive, snapshot.dim) == (3, 2, 2)
    assert snapshot.feature_dtype is FeatureDtype.F16
    assert snapshot.codes_of(np.array([2, 0])).tolist() == [[255, 15], [1, 2]]
    assert snapshot.ids_of(np.array([1, 2])) == ["y", "x"]
    assert snapshot.row_of("x") == 2
    assert snapshot.row_of("z") is None
    assert snapshot.feature_of(1).tolist() == [2, 3]
    assert snapshot.feature_of(2) is None
    assert [len(segment) for segment in snapshot.features] == [2, 1]


def test_nothing_can_be_written_through_it() -> None:
    snapshot = make()
    arrays = [*snapshot.words, *snapshot.features, snapshot.dead, snapshot.has_feature]
    assert not any(array.flags.writeable for array in arrays)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_bits": 17},
        {"n_bits": 11},  # 255, 15 has bit 11 set
        {"n_bits": 513},
        {"ids": ["x", "y"]},
        {"ids": ["y", "x", "x"], "dead": None},
        {"dead": [True]},
        {"has_feature": [True]},
        {"features": np.zeros((2, 2), dtype=np.float16)},
        {"features": np.zeros((3, 2), dtype=np.float64)},
        {"rows_per_segment": 3},
    ],
)
def test_arrays_that_do_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make(**fields)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 4},
        {"n_alive": 4},
        {"words": ()},
        {"words": (np.zeros(3, dtype=np.int64),)},
        {"words": (np.zeros(6, dtype=np.uint64)[::2],)},
        {"features": ()},
        {"features": (np.zeros((1, 2), dtype=np.float16),) * 2},
        {"features": (np.zeros((2, 4), dtype=np.float16)[:, ::2],) * 2},
        {"feature_dtype": FeatureDtype.F32},
        {"dead": None},
    ],
)
def test_fields_that_would_let_a_kernel_read_elsewhere(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a snapshot"):
        replace(make(), **change)
