"""What Prometheus reads, while files rot and disks fill up under a real service."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from hashlens import (
    Client,
    CollectionSpec,
    Embedding,
    FeatureDtype,
    Item,
    SearchOptions,
    codes,
)
from hashlens.errors import DataLossError, LimitError
from search_service.storage.embedded import find_server
from tests.support.redis_server import RedisServer
from tests.support.services import ServiceProcess, wait_until

SPEC = CollectionSpec("photos", "m", 48, 16, FeatureDtype.F16, 1000)
NOBODY = "127.0.0.1:1"
PHOTOS = '{collection="photos"}'


def item_of(number: int) -> Item:
    rng = np.random.default_rng(number)
    code = codes.pack(rng.random(48) < 0.5).tobytes()
    feature = rng.standard_normal(16).astype(np.float16)
    return Item(f"{number:04}", Embedding(code, 48, "m", feature))


class Measured(ServiceProcess):
    """A search service that says where its metrics are."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "log"
        super().__init__(
            "search_service",
            *("--data-dir", str(folder / "data"), "--metrics-listen", "127.0.0.1:0"),
            *("--encoder", NOBODY, *arguments),
            log=self.log,
        )

    def metrics(self) -> dict[str, float]:
        (*_, address) = re.findall(r"metrics on (http://\S+)", self.log.read_text())
        with urllib.request.urlopen(address, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if line[0] != "#"
        }


def test_the_store_says_how_it_is(tmp_path: Path) -> None:
    process = Measured(tmp_path)
    with process, Client(process.target, NOBODY) as client:
        client.create_collection("photos", spec=SPEC)
        client.upsert("photos", [item_of(i) for i in range(100)])
        version = client.delete("photos", ["0001"]).version
        client.collection("photos")
        found = process.metrics()
        assert found['hashlens_collection_items{collection="photos"}'] == 99
        assert found['hashlens_collection_dead_rows{collection="photos"}'] == 1
        assert found['hashlens_collection_version{collection="photos"}'] == version
        assert found['hashlens_collection_writable{collection="photos"}'] == 1
        assert found["hashlens_store_damaged_features_total"] == 0
    (features,) = (tmp_path / "data" / "collections" / "photos").glob("features-*")
    data = bytearray(features.read_bytes())
    data[7 * 32] ^= 1
    features.write_bytes(data)
    with process, Client(process.target, NOBODY) as client:
        answer = client.search("photos", embedding=item_of(7).embedding, k=99)
        assert "0007" not in [hit.id for hit in answer.hits]
        assert (answer.receipt.rows_without_feature, answer.receipt.exact) == (1, False)
        (item,) = client.get_items("photos", ["0007"], with_feature=True)
        assert item.embedding is not None
        assert item.embedding.feature is None
        found = process.metrics()
        assert found["hashlens_store_damaged_features_total"] == 1
        assert found['hashlens_collection_missing_features{collection="photos"}'] == 1
        assert "do not match their checksums" in process.log.read_text()


def test_redis_and_its_log_are_seen_without_being_asked(tmp_path: Path) -> None:
    with RedisServer(find_server()) as server:
        process = Measured(tmp_path, "--redis-url", server.url)
        with process, Client(process.target, NOBODY) as client:
            client.create_collection("photos", spec=SPEC)
            client.upsert("photos", [item_of(i) for i in range(30)])

            def says(within_s: float = 30, **wanted: float) -> None:
                def so() -> bool:
                    found = process.metrics()
                    return all(found[f"hashlens_{name}"] == value for name, value in wanted.items())

                wait_until(so, within_s=within_s, what=f"metrics say {wanted}")

            says(redis_connected=1, redis_writable=1)
            wait_until(
                lambda: process.metrics()[f"hashlens_collection_log_entries{PHOTOS}"] == 30,
                within_s=30,
                what="the log has been looked at",
            )
            found = process.metrics()
            assert found[f"hashlens_collection_log_version{PHOTOS}"] == 30
            assert found[f"hashlens_collection_log_lag{PHOTOS}"] == 0
            assert found["hashlens_redis_last_call_seconds"] > 0
            assert found["hashlens_redis_call_seconds_count"] > 0
            with server.client() as redis:
                redis.config_set("maxmemory", "1")
            says(redis_connected=1, redis_writable=0)
            with server.client() as redis:
                redis.config_set("maxmemory", "0")
            says(redis_connected=1, redis_writable=1)
            n_failures = process.metrics()["hashlens_redis_failures_total"]
            server.kill()
            says(redis_connected=0, redis_writable=0)
            assert process.metrics()["hashlens_redis_failures_total"] > n_failures
            server.start()
            says(redis_connected=1, redis_writable=1)


@pytest.mark.parametrize(
    "failure",
    ["append.begin=enospc@3-9", "append.features=enospc@3-9", "append.commit=enospc@3-9"],
)
def test_a_full_disk_refuses_writes_and_all_comes_back_by_itself(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Measured(tmp_path)
    monkeypatch.setenv("HASHLENS_FAILPOINTS", failure)
    with process, Client(process.target, NOBODY) as client:
        client.create_collection("photos", spec=SPEC)
        n = 0

        def write_on() -> None:
            nonlocal n
            for n in range(50):
                client.upsert("photos", [item_of(n)], request_id=f"{n}", deadline_s=10)
                time.sleep(0.05)  # A batch of its own for each.

        with pytest.raises(LimitError, match="No space left"):
            write_on()
        assert process.metrics()['hashlens_collection_writable{collection="photos"}'] == 0
        query = item_of(0).embedding
        options = SearchOptions(k=1)
        # Another client knows of no write that it would wait for.
        with Client(process.target, NOBODY) as reader:
            assert not reader.collection("photos").writable
            found = reader.search("photos", embedding=query, options=options)
            assert found.hits[0].id == "0000"

        def written() -> bool:
            try:
                client.upsert("photos", [item_of(n)], request_id=f"{n}", deadline_s=10)
            except LimitError:
                return False
            return True

        wait_until(written, within_s=60, what="there is room again")
        items = client.get_items("photos", [f"{i:04}" for i in range(n + 1)])
        assert len(items) == n + 1
        assert client.collection("photos").writable


def test_a_disk_that_loses_writes_stops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Measured(tmp_path, "--checkpoint-interval-s", "0.3")
    monkeypatch.setenv("HASHLENS_FAILPOINTS", "checkpoint.sync=eio@1")
    with process, Client(process.target, NOBODY) as client:
        client.create_collection("photos", spec=SPEC)
        client.upsert("photos", [item_of(i) for i in range(50)])
        wait_until(
            lambda: process.metrics()["hashlens_store_failed_checkpoints_total"] >= 1,
            within_s=30,
            what="a checkpoint",
        )
        with pytest.raises(DataLossError, match="lost writes"):
            client.upsert("photos", [item_of(50)])
        info = client.collection("photos")
        assert not info.writable
        assert "restart" in info.detail
        answer = client.search("photos", embedding=item_of(7).embedding, k=1)
        assert answer.hits[0].id == "0007"
    monkeypatch.delenv("HASHLENS_FAILPOINTS")
    with process, Client(process.target, NOBODY) as client:
        wait_until(lambda: client.collection("photos").n_items == 50, within_s=30, what="replayed")
        client.upsert("photos", [item_of(50)])
        assert client.collection("photos").n_items == 51
