"""The port for metrics, and who may hold it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest

from hashlens.rpc import metrics_http
from hashlens.rpc.metrics import Metric, gauge
from hashlens.rpc.metrics_http import MOST_CONNECTIONS, exposed


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.settimeout(30)
    return connection


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
        return str(reply.read().decode())


def numbers() -> list[Metric]:
    return [gauge("n", "Text.", 7)]


def test_one_connection_too_many_is_closed_and_a_place_is_free_again() -> None:
    with exposed("127.0.0.1:0", numbers) as address:
        with ExitStack() as stack:
            for _ in range(MOST_CONNECTIONS):
                stack.enter_context(connect(address)).send(b"GET")
            with connect(address) as surplus:
                assert surplus.recv(1) == b""  # Closed, without a word.
        ends_s = time.monotonic() + 30
        while True:
            try:
                assert "n 7.0" in scrape(address)
                break
            except OSError:
                assert time.monotonic() < ends_s


@pytest.mark.parametrize("begun", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_who_says_nothing_more_is_closed(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(metrics_http._Handler, "timeout", 0.3)
    with exposed("127.0.0.1:0", numbers) as address, connect(address) as silent:
        silent.send(begun)
        assert silent.recv(1) == b""


def test_who_says_little_is_closed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "LONGEST_S", 1.0)
    closed = threading.Event()
    with exposed("127.0.0.1:0", numbers) as address, connect(address) as slow:

        def drip() -> None:
            try:
                while True:
                    slow.send(b"X")
                    time.sleep(0.05)
            except OSError:
                closed.set()

        thread = threading.Thread(target=drip)
        thread.start()
        assert closed.wait(30)
        thread.join(30)


def test_who_reads_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends: what it waits for is a place in the buffers of a reply of megabytes."""
    monkeypatch.setattr(metrics_http._Handler, "timeout", 0.3)
    before = threading.active_count()
    many = [gauge(f"n{i}", "Text " * 100, i) for i in range(20_000)]
    asked = threading.Event()

    def megabytes() -> list[Metric]:
        asked.set()
        return many

    with exposed("127.0.0.1:0", megabytes) as address, connect(address) as mute:
        mute.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert asked.wait(30)
        ends_s = time.monotonic() + 60
        while threading.active_count() > before + 1:
            assert time.monotonic() < ends_s
            time.sleep(0.01)


def test_strangers_write_nothing_into_the_log(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with exposed("127.0.0.1:0", numbers) as address:
        for noise in (b"\0\xff\r\n\r\n", b"STRANGER / HTTP/1.1\r\n\r\n", b"GET /\r\n"):
            with connect(address) as stranger:
                stranger.send(noise)
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        scrape(address)
    assert [record for record in caplog.records if record.name.startswith("hashlens")] == []
    assert capfd.readouterr() == ("", "")


def test_numbers_that_cannot_be_read_are_a_defect_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> list[Metric]:
        raise ZeroDivisionError("of all things")

    with exposed("127.0.0.1:0", broken) as address:
        with pytest.raises(urllib.error.HTTPError) as refused:
            scrape(address)
        refused.value.close()
    assert refused.value.code == 500
    assert "the metrics cannot be read" in caplog.text
    assert "of all things" in caplog.text
