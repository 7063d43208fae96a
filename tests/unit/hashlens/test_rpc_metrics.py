"""Counting from many threads, and what Prometheus reads of it."""

from __future__ import annotations

import threading
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hashlens.rpc.metrics import Counter, Gauge, Histogram, StageTimes
from hashlens.rpc.metrics_http import exposed
from hashlens.rpc.process import Process


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


def test_numbers_are_right_whoever_counts() -> None:
    counter = Counter("c", "Text.", ["who"])
    gauge = Gauge("g", "Text.")
    histogram = Histogram("h", "Text.", bounds=(1.0, 2.0))
    n_threads, n_rounds = 8, 5000
    begin = threading.Barrier(n_threads + 1)
    families = (counter, gauge, histogram)

    def count(who: int) -> None:
        begin.wait(10)
        for i in range(n_rounds):
            counter.of(str(who % 2)).add()
            gauge.of().add(1 if i % 2 else -1)
            histogram.of().observe((i % 3) + 0.5)

    threads = [threading.Thread(target=count, args=(who,)) for who in range(n_threads)]
    for thread in threads:
        thread.start()
    begin.wait(10)
    while any(thread.is_alive() for thread in threads):
        found = histogram.collect().samples  # What is read meanwhile fits together.
        if found:
            values = {(s.name, s.labels.get("le")): s.value for s in found}
            assert values["h_count", None] == values["h_bucket", "+Inf"]
            assert values["h_bucket", "1.0"] <= values["h_bucket", "2.0"]
    for thread in threads:
        thread.join(10)
    with exposed("127.0.0.1:0", lambda: [f.collect() for f in families]) as address:
        text = scrape(address)
    found_now = samples(text)
    total = n_threads * n_rounds
    assert found_now["c_total", (("who", "0"),)] == total / 2
    assert found_now["c_total", (("who", "1"),)] == total / 2
    assert found_now["g", ()] == 0
    thirds = [len(range(r, n_rounds, 3)) * n_threads for r in range(3)]
    assert found_now["h_bucket", (("le", "1.0"),)] == thirds[0]
    assert found_now["h_bucket", (("le", "2.0"),)] == thirds[0] + thirds[1]
    assert found_now["h_count", ()] == found_now["h_bucket", (("le", "+Inf"),)] == total
    assert found_now["h_sum", ()] == pytest.approx(sum((r + 0.5) * n for r, n in enumerate(thirds)))
    assert "_created" not in text


def test_a_value_on_a_bound_is_within_it() -> None:
    histogram = Histogram("h", "Text.", bounds=(1.0, 2.0))
    for value in (0.0, 1.0, 1.0000001, 2.0, 3.0):
        histogram.of().observe(value)
    values = {s.labels["le"]: s.value for s in histogram.collect().samples if "le" in s.labels}
    assert values == {"1.0": 2, "2.0": 4, "+Inf": 5}


def test_stages_that_did_not_run_are_not_counted() -> None:
    times = StageTimes("s", "Text.", ["a", "b"])
    times.observe((("a", 2_000_000), ("b", 0)))
    values = {(s.name, s.labels.get("stage")): s.value for s in times.collect().samples}
    assert values["s_count", "a"] == 1
    assert values["s_sum", "a"] == pytest.approx(0.002)
    assert values["s_count", "b"] == 0


def test_the_process_is_described() -> None:
    with exposed("127.0.0.1:0", lambda: list(Process().collect())) as address:
        found = samples(scrape(address))
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert found["process_open_fds", ()] > 2
    assert found["hashlens_process_threads", ()] >= threading.active_count() - 1
    assert any(name == "hashlens_build_info" for name, _ in found)


def test_an_address_that_is_in_use_says_which() -> None:
    with (
        exposed("127.0.0.1:0", list) as address,
        pytest.raises(OSError, match=address),
        exposed(address, list),
    ):
        pass


def test_an_ipv6_address_is_served() -> None:
    try:
        with exposed("[::1]:0", list) as address:
            assert address.startswith("[::1]:")
            scrape(address)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
