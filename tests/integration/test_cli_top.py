"""`hashlens top` on both services, on a terminal and on a pipe."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from hashlens import Client, Item
from tests.support.observed import Observed
from tests.support.services import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")

# A look may take longer than it would wait: the machine may be busy.
TOP = [
    sys.executable,
    "-c",
    "from hashlens.cli.top import command; command._LOOK_S = 60.0; "
    "from hashlens.cli.main import main; main()",
    "top",
]


@pytest.fixture(scope="module")
def busy(observed: Observed, images: list[bytes]) -> Iterator[list[str]]:
    """Options that lead to both services, while somebody asks them things."""
    stop = threading.Event()
    with Client(observed.search.target, observed.encoder.target) as client:
        client.create_collection("busy")
        client.upsert("busy", [Item(f"{i}", image=images[i]) for i in range(10)])

        def ask() -> None:
            while not stop.is_set():
                client.search("busy", image=images[0], k=2)

        client.search("busy", image=images[0], k=2)
        asking = threading.Thread(target=ask)
        asking.start()
        yield ["--search-metrics", observed.search.metrics, "--encoder-metrics",
               observed.encoder.metrics]  # fmt: skip
        stop.set()
        asking.join(60)


def test_once_as_json(observed: Observed, busy: list[str]) -> None:
    for interval in ("2", "10", "40"):  # A busy machine may answer nothing for a while.
        done = subprocess.run(
            [*TOP, "--once", "--json", "--interval", interval, *busy],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        search, encoder = found["search"], found["encoder"]
        if search["queries_per_s"] and encoder["images_per_s"]:
            break
    assert search["methods"]["SearchService/Search"]["calls_per_s"] > 0
    assert 0 < search["methods"]["SearchService/Search"]["p50_ms"] < 30_000
    assert search["queries_per_s"] > 0
    assert search["pool_p50_rows"] > 0
    assert search["stages"]["encode_call"]["p99_ms"] > 0
    assert search["redis"]["connected"]
    assert search["redis"]["writable"]
    assert search["collections"]["busy"] == {
        "items": 10,
        "dead_rows": 0,
        "version": 10,
        "log_version": 10,
        "lag": 0,
        "log_entries": search["collections"]["busy"]["log_entries"],
        "writable": 1,
    }
    assert encoder["images_per_s"] > 0
    assert encoder["batch_mean"] >= 1
    assert encoder["model"]["backbone"] == "resnet9"
    for service in (search, encoder):
        assert service["process"]["rss_bytes"] > 50e6
        assert service["process"]["threads"] > 3


def test_a_service_that_is_away_is_said_and_told_by_the_status(busy: list[str]) -> None:
    done = subprocess.run(
        [*TOP, "--once", "--interval", "0.2", *busy[:2], "--encoder-metrics", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "127.0.0.1:1  away" in done.stdout
    assert "--metrics-listen" in done.stderr
    assert "SearchService/Search" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_pipe_gets_object_after_object_until_ctrl_c(busy: list[str]) -> None:
    with subprocess.Popen(
        [*TOP, "--json", "--interval", "0.2", *busy],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for _ in range(3):
            assert json.loads(process.stdout.readline())["search"]["up"]
        os.kill(process.pid, 2)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


@pytest.mark.parametrize("keys", [b"\x1b[Aq", b"\x03"], ids=["q", "Ctrl-C"])
def test_a_terminal_is_used_and_given_back(busy: list[str], keys: bytes) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140", "LINES": "50"}
    # Ctrl-C reaches who has the terminal: the first of a session to open it. The program does it by
    # itself, as nothing of Python's may run between fork and exec in a process with gRPC's threads.
    opening = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    process = subprocess.Popen(
        [TOP[0], TOP[1], opening + TOP[2], TOP[3], "--interval", "0.2", *busy],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()

    def read() -> bool:
        while select.select([ours], [], [], 0)[0]:
            try:
                seen.extend(os.read(ours, 1 << 16))
            except OSError:  # It has ended.
                break
        return seen.count(b"SearchService/Search") >= 3

    try:
        wait_until(read, within_s=60, what="it shows something, more than once")
        os.write(ours, keys)
        began_s = time.monotonic()
        while process.poll() is None and time.monotonic() - began_s < 60:
            read()
            time.sleep(0.05)
        read()
        assert process.poll() == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
        os.close(ours)
    assert b"\x1b[?1049h" in seen  # The other screen,
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"SearchService/Search")  # and back.
