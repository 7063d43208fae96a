"""kill -9, of the store's process and of Redis: nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from hashlens.errors import UnavailableError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Collection, Store, StoreConfig
from tests.support.redis_server import RedisServer
from tests.support.store_writer import SPEC, model_after, steps
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    contents,
    make_records,
    on_disk,
    wait_until,
)

ROUNDS = 6
SEED = 20_150
STEPS = 600


@pytest.fixture(scope="module")
def writer() -> Iterator[subprocess.Popen[str]]:
    """The process that forks writers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.store_writer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait(20)


def read_line(stream: IO[str]) -> str:
    line = stream.readline().strip()
    assert line, "the writer ended"
    return line


def test_killing_the_store_loses_nothing(
    server: RedisServer, writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert writer.stdin is not None
    assert writer.stdout is not None
    moments = random.Random(SEED)
    history = steps(SEED, STEPS)
    config = StoreConfig(data_dir=tmp_path, redis_url=server.url, segment_bytes=4096)
    acknowledged = 0
    for _ in range(ROUNDS):
        order = {"data_dir": str(tmp_path), "redis_url": server.url, "seed": SEED}
        # Killed somewhere in its next writes, wherever that finds it. Should the machine halt just
        # then, it does not write on until there is no history left.
        stop_after = acknowledged + moments.randint(1, 60)
        order |= {"first": acknowledged, "last": min(stop_after + 30, STEPS)}
        writer.stdin.write(json.dumps(order) + "\n")
        writer.stdin.flush()
        pid = int(read_line(writer.stdout).removeprefix("pid "))
        while acknowledged < stop_after:
            acknowledged = int(read_line(writer.stdout))
        time.sleep(moments.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        # The last number may have lost its end of line to the kill.
        while "ended" not in (line := read_line(writer.stdout)):
            acknowledged = acknowledged if line == "done" else int(line)
        with Store.open(config) as store:
            collection = store.get(SPEC.name)
            # Everything acknowledged is there, and of the write under way all or nothing.
            possible = [model_after(history[:n]) for n in (acknowledged, acknowledged + 1)]
            collection.wait_for(possible[0].version, DEADLINE_S)
            wait_until(lambda c=collection: c.info().writable, "the log is followed")
            with server.client() as client:
                version = int(client.hget(f"hl:{{{SPEC.name}}}:meta", "seq") or 0)
                assert version in [model.version for model in possible]
                actual = next(model for model in possible if model.version == version)
                assert_in_redis(client, SPEC.name, actual)
            assert_holds(collection, actual)
            acknowledged += actual is possible[1] and actual.version != possible[0].version
        assert on_disk(tmp_path / "collections" / SPEC.name) == (actual.version, actual.items)
    assert acknowledged > ROUNDS


def test_killing_redis_loses_nothing(server: RedisServer, tmp_path: Path) -> None:
    spec = CollectionSpec("c", "m", 64, 4, FeatureDtype.F32, 1000)
    moments = random.Random(SEED)
    model = Model()
    with Store.open(StoreConfig(data_dir=tmp_path, redis_url=server.url)) as store:
        collection = store.create(spec)
        stop = threading.Event()
        failures: list[str] = []

        def write() -> None:
            number = 0
            while not stop.is_set():
                records = make_records(spec, 20, seed=number, prefix=f"{number % 7}-")
                while True:
                    try:
                        version = collection.upsert(
                            records, request_id=f"r{number}", deadline_s=DEADLINE_S
                        )
                        break
                    except UnavailableError as error:
                        failures.append(error.message)
                model.upsert(records)
                assert version == model.version
                number += 1

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(4):
            time.sleep(moments.uniform(0.05, 0.2))
            server.kill()
            time.sleep(moments.uniform(0, 0.1))
            server.start()
            written = model.version
            wait_until(lambda n=written: model.version > n, "writing goes on")
        stop.set()
        thread.join()
        assert_holds(collection, model)
        with server.client() as client:
            assert_in_redis(client, spec.name, model)
        collection.checkpoint()
        assert on_disk(tmp_path / "collections" / "c") == (model.version, model.items)


def test_killing_both_at_once_loses_nothing(server: RedisServer, tmp_path: Path) -> None:
    spec = CollectionSpec("c", "m", 64, 0, expected_rows=1000)
    config = StoreConfig(data_dir=tmp_path, redis_url=server.url)
    model = Model()
    for number in range(3):
        store = Store.open(config)
        collection = store.create(spec, deadline_s=DEADLINE_S)
        for batch in range(5):
            records = make_records(spec, 300, seed=batch, prefix=f"{number}-{batch}-")
            collection.upsert(records, request_id=f"{number}-{batch}", deadline_s=DEADLINE_S)
            model.upsert(records)
        if number == 1:
            collection.wait_for(model.version, DEADLINE_S)
            collection.checkpoint()
        crash(store, collection)
        server.kill()
        server.start()
    with Store.open(config) as store:
        assert_holds(store.get("c"), model)
        assert contents(store.get("c").snapshot()) == model.items


def crash(store: Store, collection: Collection) -> None:
    """Close as a killed process would: without a last checkpoint."""
    collection.checkpoint = lambda: 0  # type: ignore[method-assign]
    store.close()
