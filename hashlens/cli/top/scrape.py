"""What a service says of itself on ``/metrics``, and what changed between two looks."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from hashlens.errors import UnavailableError

_MAX_BYTES = 16 * 2**20
_CHUNK_BYTES = 1 << 16

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples at one moment."""

    at_s: float
    """On the clock of `time.monotonic`."""
    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    """By name and labels."""

    def value(self, name: str, **labels: str) -> float | None:
        """Return one sample; None if there is none such."""
        return self.samples.get(name, {}).get(frozenset(labels.items()))

    def by(self, name: str, label: str, **others: str) -> dict[str, float]:
        """Return samples by the value of a label, those that differ elsewhere added up."""
        sums: dict[str, float] = {}
        for labels, value in self.samples.get(name, {}).items():
            if not others.items() <= labels:
                continue
            found = dict(labels).get(label)
            if found is not None:
                sums[found] = sums.get(found, 0.0) + value
        return sums

    def info(self, name: str) -> dict[str, str]:
        """Return the labels of a sample that is there for them."""
        return dict(next(iter(self.samples.get(name, {})), ()))


def look(address: str, deadline_s: float) -> Scrape:
    """Read a service's numbers.

    Parameters
    ----------
    address
        ``host:port`` of its metrics.
    deadline_s
        Longest to wait, in seconds.

    Raises
    ------
    UnavailableError
        They are not there, or are none.
    """
    ends_s = time.monotonic() + deadline_s
    # A proxy that is good for the world does not lead to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=deadline_s) as reply:
            data = bytearray()
            while chunk := reply.read1(_CHUNK_BYTES):
                data += chunk
                if time.monotonic() > ends_s or len(data) > _MAX_BYTES:
                    raise UnavailableError(f"{address} sends too slowly or too much.")
        samples: dict[str, dict[Labels, float]] = defaultdict(dict)
        for family in text_string_to_metric_families(data.decode()):
            for sample in family.samples:
                samples[sample.name][frozenset(sample.labels.items())] = sample.value
    except urllib.error.HTTPError as error:
        error.close()
        raise UnavailableError(f"{address}: {error.reason}") from None
    except urllib.error.URLError as error:
        raise UnavailableError(f"{address}: {error.reason}") from None
    except OSError as error:
        raise UnavailableError(f"{address}: {error}") from None
    except ValueError as error:
        raise UnavailableError(f"{address} has no metrics: {error}") from None
    if "hashlens_build_info" not in samples:
        raise UnavailableError(f"{address} has no metrics of Hashlens.")
    return Scrape(time.monotonic(), dict(samples))


@dataclass(frozen=True, slots=True)
class Change:
    """What happened between two looks at one process."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """How long that was."""
        return self.after.at_s - self.before.at_s

    def grown(self, name: str, **labels: str) -> float:
        """Return by how much a counter has grown."""
        return (self.after.value(name, **labels) or 0) - (self.before.value(name, **labels) or 0)

    def grown_by(self, name: str, label: str, **others: str) -> dict[str, float]:
        """Return by how much counters have grown, by the value of a label."""
        before = self.before.by(name, label, **others)
        after = self.after.by(name, label, **others)
        return {key: value - before.get(key, 0) for key, value in after.items()}

    def per_s(self, name: str, **labels: str) -> float:
        """Return how fast a counter grows."""
        return self.grown(name, **labels) / self.seconds if self.seconds else 0.0

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Return a quantile of a histogram's new values, linear within a bucket; None: no values.

        What lies above the last bound counts as that.
        """
        buckets = sorted(
            (float(bound), count)
            for bound, count in self.grown_by(f"{name}_bucket", "le", **labels).items()
        )
        if not buckets or buckets[-1][1] <= 0:
            return None
        wanted = share * buckets[-1][1]
        lower, n_before = 0.0, 0.0
        for bound, n in buckets:
            if n >= wanted and n > n_before:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * (wanted - n_before) / (n - n_before)
            lower, n_before = bound, n
        return lower

    def mean(self, name: str, **labels: str) -> float | None:
        """Return the mean of a histogram's new values; None if there are none."""
        n = self.grown(f"{name}_count", **labels)
        return self.grown(f"{name}_sum", **labels) / n if n > 0 else None
