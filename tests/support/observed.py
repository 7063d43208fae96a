"""Both services, with metrics, logs and spans to look at."""

from __future__ import annotations

import json
import re
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from tests.support.collector import Collector
from tests.support.services import ServiceProcess

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class ObservedProcess(ServiceProcess):
    """A service that is watched in every way."""

    def __init__(self, module: str, folder: Path, *arguments: str) -> None:
        self.log = folder / f"{module}.log"
        super().__init__(
            module,
            *("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--access-log"),
            *arguments,
            log=self.log,
        )

    @property
    def metrics(self) -> str:
        """Where they are: host:port."""
        (*_, address) = re.findall(r"metrics on http://([0-9.]+:\d+)/", self.log.read_text())
        return address

    def scrape(self) -> Samples:
        """Return all samples by name and labels."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def lines(self) -> list[dict[str, Any]]:
        """Return the log's whole lines, but for what the libraries' own tear-down writes."""
        whole, _, _ = self.log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


class Observed:
    """An encoder and a search service beside a collector."""

    def __init__(self, folder: Path, collector: Collector) -> None:
        self.collector = collector
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        otlp = ("--otlp-endpoint", self.collector.endpoint, "--trace-sample-ratio", "0")
        start = self._stack.enter_context
        try:
            self.encoder = start(ObservedProcess("encoder_service", self._folder, *otlp))
            data = ("--data-dir", str(self._folder / "data"), "--encoder", self.encoder.target)
            self.search = start(ObservedProcess("search_service", self._folder, *data, *otlp))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return one sample, 0 if there is none yet."""
    return samples.get((name, frozenset(labels.items())), 0.0)
