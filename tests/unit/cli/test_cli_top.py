"""What `hashlens top` reads off two looks, and how it shows it."""

from __future__ import annotations

import io
import random
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import Metric
from rich.console import Console

from hashlens.cli.top.scrape import Change, Scrape, look
from hashlens.cli.top.view import view
from hashlens.cli.top.watch import Watch
from hashlens.cli.up import _metrics_beside
from hashlens.errors import UnavailableError
from hashlens.rpc.metrics import (
    Counter,
    GaugeMetricFamily,
    Histogram,
    gauge,
    info,
)
from hashlens.rpc.metrics_http import exposed


class Fake:
    """A service's numbers, served for real."""

    def __init__(self) -> None:
        self.started = 1.0
        self.calls = Counter("hashlens_rpc_calls", "Text.", ["method", "code"])
        self.seconds = Histogram("hashlens_rpc_seconds", "Text.", ["method"])
        self.more: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        return [
            info("hashlens_build_info", "Text.", {"version": "1"}),
            gauge("process_start_time_seconds", "Text.", self.started),
            self.calls.collect(),
            self.seconds.collect(),
            *self.more,
        ]


def test_rates_and_quantiles_are_those_of_the_window() -> None:
    fake = Fake()
    fake.calls.of("S/Old", "OK").add(100)
    for _ in range(1000):
        fake.seconds.of("S/M").observe(20.0)  # Before the first look: not in the window.
    with exposed("127.0.0.1:0", fake.collect) as address:
        watch = Watch("encoder", address, 60)
        watch.look(5)
        assert watch.describe()["methods"]["S/Old"]["p50_ms"] is None
        fake.calls.of("S/M", "OK").add(90)
        fake.calls.of("S/M", "INTERNAL").add(10)
        rng = random.Random(5)
        values = sorted(rng.uniform(0, 0.1) for _ in range(4000))
        for value in values:
            fake.seconds.of("S/M").observe(value)
        time.sleep(0.1)  # The window is told in whole milliseconds.
        watch.look(5)
    found = watch.describe()
    row = found["methods"]["S/M"]
    assert row["calls"] == 100
    assert row["calls_per_s"] * found["window_s"] == pytest.approx(100, rel=0.05)
    assert row["errors_per_s"] / row["calls_per_s"] == pytest.approx(0.1)
    # Uniform within each bucket, as the interpolation assumes.
    assert row["p50_ms"] == pytest.approx(values[2000] * 1e3, rel=0.05)
    assert row["p99_ms"] == pytest.approx(values[3960] * 1e3, rel=0.05)
    assert found["methods"]["S/Old"]["calls_per_s"] == 0


def test_quantiles_at_the_edges() -> None:
    histogram = Histogram("h", "Text.", bounds=(1.0, 2.0))

    def now(at_s: float) -> Scrape:
        samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for sample in histogram.collect().samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return Scrape(at_s, samples)

    empty = now(0)
    assert Change(empty, empty).quantile(0.5, "h") is None
    assert Change(empty, empty).mean("h") is None
    assert Change(empty, empty).per_s("h_count") == 0
    histogram.of().observe(1.5)
    one = Change(empty, now(1))
    assert one.quantile(0.5, "h") == 1.5
    assert one.quantile(1.0, "h") == 2.0
    assert one.mean("h") == 1.5
    histogram.of().observe(99.0)
    assert Change(empty, now(2)).quantile(0.99, "h") == 2.0  # Above the last bound: at least that.


def test_another_process_begins_anew() -> None:
    fake = Fake()
    fake.calls.of("S/M", "OK").add(1000)
    with exposed("127.0.0.1:0", fake.collect) as address:
        watch = Watch("encoder", address, 60)
        watch.look(5)
        fake.started = 2.0
        fake.calls.of("S/M", "OK").add(-990)
        watch.look(5)
        assert watch.describe()["methods"]["S/M"]["calls_per_s"] == 0
        fake.calls.of("S/M", "OK").add(5)
        watch.look(5)
        assert watch.describe()["methods"]["S/M"]["calls_per_s"] > 0


def test_a_service_that_leaves_is_away_and_back_again() -> None:
    fake = Fake()
    with exposed("127.0.0.1:0", fake.collect) as address:
        watch = Watch("search", address, 60)
        watch.look(5)
        assert watch.describe()["up"]
    watch.look(5)
    found = watch.describe()
    assert not found["up"]
    assert "refused" in found["detail"]
    with exposed(address, fake.collect):
        watch.look(5)
        assert watch.describe()["up"]


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 200),
        (b"<html>", 200),
        (b"\xff\xfe", 200),
        (b"up 1\n", 200),
        (b"up one\n", 200),
        (b"no", 404),
        (b"x" * (17 << 20), 200),
    ],
    ids=["nothing", "a page", "no text", "others", "no number", "not there", "too much"],
)
def test_what_is_no_metrics_of_ours_is_away(body: bytes, status: int) -> None:
    with answering(body, status) as address, pytest.raises(UnavailableError, match=address):
        look(address, 10)


def test_the_view_shows_it_all_and_obeys_nothing() -> None:
    fake = Fake()
    name = "S/\x1b[31mM"
    fake.calls.of(name, "OK").add(3)
    items = GaugeMetricFamily("hashlens_collection_items", "Text.", labels=["collection"])
    for i in range(20):
        items.add_metric([f"c{i}"], i)
    fake.more = [gauge("hashlens_redis_connected", "Text.", 0), items]
    with exposed("127.0.0.1:0", fake.collect) as address:
        watch = Watch("search", address, 60)
        watch.look(5)
        away = Watch("encoder", "127.0.0.1:1", 60)
        away.look(5)
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(view({"encoder": away.describe(), "search": watch.describe()}))
    text = console.export_text()
    assert "encoder 127.0.0.1:1  away" in text
    assert "S/\\x1b[31mM" in text
    assert "\x1b[31mM" not in text
    assert "Redis away" in text
    assert "c19" in text
    assert "and 8 smaller ones" in text


def test_up_puts_metrics_where_it_can() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _metrics_beside(f"127.0.0.1:{port - 10}") == "127.0.0.1:0"
    assert _metrics_beside(f"0.0.0.0:{port - 10}") == f"127.0.0.1:{port}"
    assert _metrics_beside("127.0.0.1:0") == "127.0.0.1:0"
    assert _metrics_beside("127.0.0.1:65530") == "127.0.0.1:0"
    assert _metrics_beside("nonsense") == "127.0.0.1:0"
