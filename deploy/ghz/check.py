"""Compare a report of ghz with thresholds.json; ghz itself exits 0 whatever came back.

Exit status: 0 all kept, 1 at least one missed, 2 there is nothing to compare. Python's own library
only.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PERCENTILES = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}
KEYS = {*PERCENTILES, "max_error_share", "max_status_share", "min_ok_per_s"}
ALWAYS = ("max_error_share", "max_status_share")


class ThresholdsError(ValueError):
    """The thresholds, or the report, cannot be used."""


@dataclass(frozen=True)
class Verdict:
    """One threshold, and what was measured."""

    what: str
    measured: float
    limit: float
    unit: str
    is_minimum: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether the measured value is on the right side; the limit itself is."""
        return self.measured >= self.limit if self.is_minimum else self.measured <= self.limit

    def __str__(self) -> str:
        """Say it in a line."""
        word = "at least" if self.is_minimum else "at most"
        state = "kept  " if self.is_kept else "MISSED"
        unit = f" {self.unit}" if self.unit else ""
        return f"{state} {self.what}: {self.measured:.4g}{unit}, {word} {self.limit:g}{unit}"


def read(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ThresholdsError(f"{path}: {error}") from error


def thresholds_of(path: Path, scenario: str, shape: str) -> dict[str, Any]:
    """Read the thresholds of one scenario in one shape."""
    try:
        found: dict[str, Any] = read(path)[scenario][shape]
    except KeyError as error:
        raise ThresholdsError(f"{path} has nothing for {scenario} {shape}") from error
    unknown, absent = sorted(found.keys() - KEYS), [key for key in ALWAYS if key not in found]
    if unknown or absent:
        raise ThresholdsError(
            f"{path}, {scenario} {shape}: unknown keys {unknown}, missing keys {absent}"
        )
    return found


def verdicts(report: dict[str, Any], thresholds: dict[str, Any]) -> list[Verdict]:
    """Compare them; a report without calls is an error of its own."""
    n_calls = report.get("count", 0)
    if not n_calls:
        raise ThresholdsError("the report has no calls")
    statuses: dict[str, int] = report["statusCodeDistribution"]
    n_ok = statuses.get("OK", 0)
    found = [
        Verdict("error share", (n_calls - n_ok) / n_calls, thresholds["max_error_share"], ""),
        *_status_verdicts(statuses, n_calls, thresholds["max_status_share"]),
    ]
    if "min_ok_per_s" in thresholds:
        per_s = n_ok / (report["total"] / 1e9)
        found.append(Verdict("OK calls a second", per_s, thresholds["min_ok_per_s"], "", True))
    latencies = {
        entry["percentage"]: entry["latency"] / 1e6 for entry in report["latencyDistribution"] or []
    }
    for key, percentile in PERCENTILES.items():
        if key in thresholds:
            # Of calls that succeeded; where none did, no latency is good enough.
            measured = latencies.get(percentile, float("inf"))
            found.append(Verdict(key.removesuffix("_ms"), measured, thresholds[key], "ms"))
    return found


def _status_verdicts(
    statuses: dict[str, int], n_calls: int, allowed: dict[str, float]
) -> list[Verdict]:
    """Each status beside OK that came may have its share of the calls; one not named has none."""
    return [
        Verdict(f"share of {status or 'no status'}", n / n_calls, allowed.get(status, 0.0), "")
        for status, n in sorted(statuses.items())
        if status != "OK"
    ]


def main() -> int:
    """Print all verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="ghz's report, JSON")
    parser.add_argument("scenario")
    parser.add_argument("shape")
    parser.add_argument("--thresholds", type=Path, default=HERE / "thresholds.json")
    asked = parser.parse_args()
    try:
        report = read(asked.report)
        found = verdicts(report, thresholds_of(asked.thresholds, asked.scenario, asked.shape))
        errors: dict[str, int] = report.get("errorDistribution") or {}
        most = sorted(errors.items(), key=lambda error: -error[1])[:5]
    except ThresholdsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        sys.stderr.write(
            f"{asked.report} is no report of ghz, or only a part of one, or {asked.thresholds} has "
            f"other things than thresholds: {error!r}\n"
        )
        return 2
    for verdict in found:
        sys.stdout.write(f"{verdict}\n")
    if all(verdict.is_kept for verdict in found):
        return 0
    for message, n in most:
        sys.stdout.write(f"  {n} x {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
