"""What the soak calls flat, and what not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.soak.samples import Sample
from tests.soak.verdict import Call, call_rows, errors, process_rows, slope

HOUR_S = 3600.0


def life(
    growth_mib_per_h: float = 0.0, more_fds: int = 0, more_threads: int = 0, n: int = 400
) -> list[Sample]:
    """An hour of a process that warms up for six minutes, with noise and a few peaks."""
    noise = np.random.default_rng(1).normal(0, 2, n)
    samples = []
    for i in range(n):
        share = i / n
        warm = min(share / 0.1, 1) * 100
        peak = 300 if i % 37 == 0 else 0
        samples.append(
            Sample(
                at_s=1e9 + share * HOUR_S,
                role="search 0",
                pid=7,
                anonymous_mib=200 + warm + noise[i] + peak + growth_mib_per_h * share,
                descriptors=40 + round(more_fds * share),
                threads=12 + round(more_threads * share),
            )
        )
    return samples


def faults(samples: list[Sample]) -> list[str]:
    (row,) = process_rows(samples)
    return row.faults()


def test_a_steady_process_is_flat_in_spite_of_noise_and_peaks() -> None:
    assert faults(life()) == []


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        (life(growth_mib_per_h=60), "memory grew"),
        (life(more_fds=30), "descriptors"),
        (life(more_threads=20), "threads"),
    ],
)
def test_a_leak_is_found(samples: list[Sample], what: str) -> None:
    (fault,) = faults(samples)
    assert what in fault


def test_the_slope_is_that_of_the_line() -> None:
    x = np.linspace(0, 10, 1000)
    y = 3 * x + 1
    y[::50] += 1000
    assert slope(x, y) == pytest.approx(3, abs=0.05)


def test_a_restarted_process_is_judged_by_itself() -> None:
    before = life()
    after = [
        Sample(s.at_s + HOUR_S, s.role, 8, s.anonymous_mib + 500, s.descriptors, s.threads)
        for s in before
    ]
    rows = process_rows(before + after)
    assert [row.pid for row in rows] == [7, 8]
    assert all(row.faults() == [] for row in rows)


def test_one_that_lived_for_a_moment_is_left_out() -> None:
    assert process_rows(life(n=5)) == []


def calls(last_ms: float, error: str = "") -> list[Call]:
    made = [Call(at_s=float(i), call="Search", ms=5 + i % 7, error="") for i in range(600)]
    made += [Call(at_s=600.0 + i, call="Search", ms=last_ms, error="") for i in range(300)]
    return [*made, Call(at_s=900.0, call="Encode", ms=1.0, error=error)]


def test_calls_that_stay_as_fast_are_flat() -> None:
    for row in call_rows(calls(10.0), 0.0, 900.0):
        assert row.faults() == []


def test_calls_that_slow_down_are_found() -> None:
    slow = next(row for row in call_rows(calls(60.0), 0.0, 900.0) if row.call == "Search")
    assert slow.p99_ms == pytest.approx((11, 11, 60))
    (fault,) = slow.faults()
    assert "p99 went from 11 to 60 ms" in fault


def test_a_failed_call_is_a_fault_and_is_told() -> None:
    made = calls(10.0, error="UnavailableError: away")
    row = next(row for row in call_rows(made, 0.0, 900.0) if row.call == "Encode")
    assert row.faults() == ["Encode: 1 of 1 calls failed"]
    assert errors(made) == {"Encode: UnavailableError: away": 1}
