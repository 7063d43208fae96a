from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hashlens import codes
from hashlens.codehealth import CodeHealth, health_of, summary, verdict
from hashlens.codehealth import measure as measure_module
from hashlens.errors import InvalidInputError


def healthy_of(bits: np.ndarray, **options: Any) -> CodeHealth:
    return health_of(codes.pack(bits), bits.shape[1], random=np.random.default_rng(0), **options)


def random_bits(n: int, n_bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, n_bits)) < 0.5


def clustered_bits(n: int, n_bits: int, n_classes: int, noise: float) -> np.ndarray:
    """Each row is its class's code with some bits flipped."""
    rng = np.random.default_rng(1)
    centres = rng.random((n_classes, n_bits)) < 0.5
    return centres[np.arange(n) % n_classes] ^ (rng.random((n, n_bits)) < noise)


def test_codes_worked_out_by_hand() -> None:
    # Bit 0 in half of the rows, bit 1 its copy, bit 2 its opposite, bit 3 never.
    bits = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]], dtype=bool)
    health = healthy_of(bits, wanted_rows=3)
    assert health.fire_rates.tolist() == [0.5, 0.5, 0.5, 0.0]
    assert health.entropies.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert health.correlations.tolist() == [
        [1, 1, -1, 0],
        [1, 1, -1, 0],
        [-1, -1, 1, 0],
        [0, 0, 0, 1],
    ]
    assert health.copied_bits == ((0, 1), (0, 2), (1, 2))
    assert health.dead_bits == (3,)
    assert health.wasted_bits == 3
    assert health.max_correlation == 1
    assert health.mean_correlation == 0.5
    assert health.bucket_sizes.tolist() == [2, 2]
    assert health.effective_codes == pytest.approx(2)
    assert health.collision_share == pytest.approx(1 / 3)
    assert health.pool_median.tolist() == [2, 2, 2, 4, 4]
    assert health.threshold_bits == 3
    assert health.automatic_pools.tolist() == [4, 4, 4, 4]
    assert health.margins is None


def test_blocks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = clustered_bits(500, 20, 5, 0.1)
    activations = np.random.default_rng(2).random(bits.shape).astype(np.float32)
    whole = healthy_of(bits, activations=activations).to_json()
    monkeypatch.setattr(measure_module, "_BLOCK_ROWS", 37)
    in_blocks = healthy_of(bits, activations=activations).to_json()
    assert in_blocks.pop("margin_mean_by_bit") == pytest.approx(whole.pop("margin_mean_by_bit"))
    assert in_blocks.pop("margin_mean") == pytest.approx(whole.pop("margin_mean"))
    assert in_blocks == whole


def test_margins_worked_out_by_hand() -> None:
    activations = np.array([[0.5, 1.0], [0.25, 0.55]], dtype=np.float32)
    health = healthy_of(activations > 0.5, activations=activations)
    assert health.margins is not None
    assert health.margins.mean == pytest.approx(0.2)
    assert health.margins.unsure_share == 0.5
    assert health.margins.mean_by_bit == pytest.approx([0.125, 0.275])
    assert health.margins.histogram.sum() == 4
    assert health.margins.histogram[[0, -1]].tolist() == [1, 1]


def test_one_row_is_fine() -> None:
    health = healthy_of(np.array([[True]]))
    assert (health.distinct_codes, health.collision_share, health.threshold_bits) == (1, 0, 0)
    assert verdict(health).level != "collapsed"


def test_json_holds_all_that_the_summary_holds() -> None:
    bits = random_bits(50, 12)
    health = healthy_of(bits, activations=bits.astype(np.float32))
    plain = json.loads(json.dumps(health.to_json(), allow_nan=False))
    assert {name: plain[name] for name in summary(health)} == summary(health)
    assert plain["margin_unsure_share"] == 0
    assert len(plain["pool_median"]) == 13
    assert "margin_mean" not in summary(healthy_of(bits))


# -- verdicts --------------------------------------------------------------------------------------


def test_codes_without_structure_are_healthy() -> None:
    found = verdict(healthy_of(random_bits(20_000, 48)))
    assert (found.level, found.advice) == ("healthy", ())


def test_codes_that_say_the_class_and_little_else_are_collapsed() -> None:
    health = healthy_of(clustered_bits(20_000, 48, 10, 0.001))
    assert health.collision_share == pytest.approx(0.09, abs=0.01)
    found = verdict(health)
    assert found.level == "collapsed"
    assert "recipe" in found.advice[0]
    assert "max_pool" in found.advice[-1]


def test_one_heap_is_seen_though_most_rows_are_apart() -> None:
    bits = random_bits(20_000, 48)
    bits[:5_000] = bits[0]
    assert verdict(healthy_of(bits)).level == "collapsed"
    bits[1_500:5_000] = random_bits(3_500, 48, seed=3)
    assert verdict(healthy_of(bits)).level == "crowded"


def test_codes_that_will_crowd_a_large_table_are_crowded() -> None:
    health = healthy_of(clustered_bits(20_000, 48, 10, 0.02), wanted_rows=1000)
    assert 0.005 < health.collision_share < 0.02
    found = verdict(health)
    assert found.level == "crowded"
    assert f"{1e6 * health.collision_share:,.0f} others" in found.sentences[1]


def test_pools_much_larger_than_wanted_are_crowded() -> None:
    few_bits = healthy_of(random_bits(20_000, 8), wanted_rows=20)
    many_bits = healthy_of(random_bits(20_000, 64), wanted_rows=20)
    assert few_bits.collision_share < 0.005
    assert few_bits.automatic_pools.mean() > 60
    assert verdict(few_bits).level == "crowded"
    assert 20 <= many_bits.automatic_pools.mean() < 60
    assert verdict(many_bits).level == "healthy"


def test_wasted_bits_are_named() -> None:
    bits = random_bits(20_000, 24)
    doubled = np.concatenate([bits, ~bits], axis=1)
    found = verdict(healthy_of(doubled))
    assert found.level == "crowded"
    assert any("24 of 48 bits add nothing" in sentence for sentence in found.sentences)
    assert any("fewer bits" in advice for advice in found.advice)


def test_a_sample_is_judged_as_its_table() -> None:
    bits = clustered_bits(40_000, 48, 10, 0.005)
    table, sample = healthy_of(bits), healthy_of(bits[:4_000], wanted_rows=100)
    assert verdict(table).level == verdict(sample).level == "collapsed"
    assert sample.collision_share == pytest.approx(table.collision_share, rel=0.1)
    assert sample.automatic_pools.mean() == pytest.approx(
        table.automatic_pools.mean() / 10, rel=0.1
    )


def test_small_tables_are_said_to_be_small() -> None:
    assert "little about a larger table" in verdict(healthy_of(random_bits(50, 32))).sentences[-1]
    assert "its size says little" in verdict(healthy_of(random_bits(2000, 32))).sentences[-1]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packed", "n_bits", "activations", "field"),
    [
        (np.zeros((3, 2), np.uint8), 0, None, "n_bits"),
        (np.zeros((3, 65), np.uint8), 513, None, "n_bits"),
        (np.zeros((3, 2), np.uint8), 17, None, "packed"),
        (np.zeros((3, 2), np.int8), 16, None, "packed"),
        (np.zeros(3, np.uint8), 8, None, "packed"),
        (np.zeros((0, 2), np.uint8), 16, None, "packed"),
        (np.full((3, 1), 8, np.uint8), 3, None, "packed"),
        (np.zeros((3, 1), np.uint8), 8, np.zeros((3, 7), np.float32), "activations"),
        (np.zeros((3, 1), np.uint8), 8, np.full((3, 8), np.nan, np.float32), "activations"),
        (np.zeros((3, 1), np.uint8), 8, np.full((3, 8), 1.01, np.float32), "activations"),
    ],
)
def test_what_does_not_fit_is_refused(
    packed: Any, n_bits: int, activations: Any, field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        health_of(packed, n_bits, activations, random=np.random.default_rng(0))
    assert caught.value.field == field
