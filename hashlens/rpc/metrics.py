"""Numbers about a server, for Prometheus to come and read.

`Counter`, `Gauge` and `Histogram` are ours because they are on the path of every call: an
observation takes a quarter of what prometheus-client's takes. It writes them out.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

__all__ = [
    "Counter",
    "CounterMetricFamily",
    "Gauge",
    "GaugeMetricFamily",
    "Histogram",
    "Metric",
    "SummaryMetricFamily",
]

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of the buckets of a duration, in seconds."""


class Number:
    """A number that goes up and down. Thread-safe."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0.0

    def add(self, amount: float = 1) -> None:
        """Add to it."""
        with self._lock:
            self.value += amount


class Distribution:
    """How many values fell into each bucket. Thread-safe.

    Parameters
    ----------
    bounds
        Upper bounds of the buckets, ascending, each part of its bucket; above the last is one more.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count a value."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += 1
            self._sum += value

    def read(self) -> tuple[list[int], float]:
        """Return the counts and the sum of the values, at one moment."""
        with self._lock:
            return list(self._counts), self._sum


T = TypeVar("T")


class _Family(Generic[T]):
    """Values of one name, told apart by labels. Who makes them sees to it that they stay few."""

    def __init__(self, name: str, text: str, labels: Sequence[str], make: Callable[[], T]) -> None:
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self._make = make
        self._values: dict[tuple[str, ...], T] = {}
        self._lock = threading.Lock()

    def of(self, *labels: str) -> T:
        """Return the one of these labels; keep it where it is needed often."""
        found = self._values.get(labels)
        if found is None:
            assert len(labels) == len(self._labels)
            with self._lock:
                found = self._values.setdefault(labels, self._make())
        return found

    def _items(self) -> list[tuple[tuple[str, ...], T]]:
        with self._lock:
            return sorted(self._values.items(), key=lambda item: item[0])


class Counter(_Family[Number]):
    """Something that is counted, named without ``_total``."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels, Number)

    def collect(self) -> Metric:
        """Return what there is to say."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, number in self._items():
            family.add_metric(labels, number.value)
        return family


class Gauge(_Family[Number]):
    """Something that goes up and down."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels, Number)

    def collect(self) -> Metric:
        """Return what there is to say."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, number in self._items():
            family.add_metric(labels, number.value)
        return family


class Histogram(_Family[Distribution]):
    """How values are distributed; in seconds unless `bounds` says otherwise."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float] = SECONDS,
    ) -> None:
        super().__init__(name, text, labels, lambda: Distribution(bounds))
        self._upper = [*(str(float(bound)) for bound in bounds), "+Inf"]

    def collect(self) -> Metric:
        """Return what there is to say."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, distribution in self._items():
            counts, total = distribution.read()
            n, buckets = 0, []
            for bound, count in zip(self._upper, counts, strict=True):
                n += count
                buckets.append((bound, n))
            family.add_metric(labels, buckets, total)
        return family


class StageTimes(Histogram):
    """How long each of a few stages takes; observes nanoseconds.

    Parameters
    ----------
    name, text
        Of the metric, whose label is ``stage``.
    stages
        All there are.
    """

    def __init__(self, name: str, text: str, stages: Sequence[str]) -> None:
        super().__init__(name, text, ["stage"])
        self._stages = {stage: self.of(stage) for stage in stages}

    def observe(self, durations: Iterable[tuple[str, int]]) -> None:
        """Count stages, each with its nanoseconds; what took none did not run."""
        for stage, took_ns in durations:
            if took_ns > 0:
                self._stages[stage].observe(took_ns / 1e9)


def gauge(name: str, text: str, value: float) -> Metric:
    """Return one number without labels."""
    return GaugeMetricFamily(name, text, value=value)


def info(name: str, text: str, labels: dict[str, str]) -> Metric:
    """Return labels that say something, with the value 1."""
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
