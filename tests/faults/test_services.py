"""Both services through crashes and outages: nothing acknowledged is lost, searching goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from hashlens import Client, CollectionSpec, Embedding, FeatureDtype, Item, codes
from hashlens.errors import DeadlineError, HashlensError, PreconditionError, UnavailableError
from hashlens.types import Hit
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import ServiceProcess, wait_until

N_BITS, DIM = 48, 16
SPEC = CollectionSpec(
    name="photos", model_id="m", n_bits=N_BITS, dim=DIM, feature_dtype=FeatureDtype.F16
)


def embedding_of(number: int) -> Embedding:
    """The embedding that item `number` always has."""
    random = np.random.default_rng(number)
    return Embedding(
        code=codes.pack(random.random(N_BITS) < 0.5).tobytes(),
        n_bits=N_BITS,
        model_id="m",
        feature=random.standard_normal(DIM).astype(np.float16),
    )


def item_of(number: int) -> Item:
    return Item(id=f"{number:05}", embedding=embedding_of(number), payload=str(number).encode())


def facts(hits: tuple[Hit, ...]) -> list[tuple[str, int, float | None, bytes]]:
    return [(hit.id, hit.hamming_bits, hit.distance, hit.payload) for hit in hits]


def search_service(folder: Path, *arguments: str) -> ServiceProcess:
    return ServiceProcess(
        "search_service", "--data-dir", str(folder / "data"), *arguments, log=folder / "log"
    )


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(server_binaries()[0]) as server:
        yield server


def answers(client: Client, version: int) -> list[list[tuple[str, int, float | None, bytes]]]:
    """Answers to twenty queries, at this version exactly."""
    results = [client.search("photos", embedding=embedding_of(q), k=15) for q in range(1000, 1020)]
    assert {result.receipt.version for result in results} == {version}
    return [facts(result.hits) for result in results]


def assert_told_that_redis_is_away(client: Client, item: Item) -> None:
    """A write gets that answer in time.

    It is sent a moment before the deadline: where the machine halts for as long, try again.
    """

    def is_told() -> bool:
        began_s = time.monotonic()
        with pytest.raises((UnavailableError, DeadlineError)) as caught:
            client.upsert("photos", [item], deadline_s=2)
        # The deadline, and the time that gRPC's own retries may add on a slow machine.
        assert time.monotonic() - began_s < 20
        return caught.type is UnavailableError

    wait_until(is_told, within_s=60, what="Redis is away")


def test_a_graceful_restart_changes_no_answer(tmp_path: Path) -> None:
    process = search_service(tmp_path)
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        client.upsert("photos", map(item_of, range(500)))
        client.upsert("photos", [Item(id="00007", embedding=embedding_of(9000))])
        version = client.delete("photos", ["00003", "00004"]).version
        before = answers(client, version)
        assert process.stop() == 0
    with process, Client(process.target) as client:
        assert answers(client, version) == before
        info = client.collection("photos")
        assert (info.n_items, info.checkpoint_version) == (498, version)
        assert client.get_items("photos", ["00003"]) == []


@dataclass
class Writer:
    """Writes and deletes until the service is gone; knows what was acknowledged."""

    target: str
    next_number: int = 0
    written: set[int] = field(default_factory=set)
    """Acknowledged upserts."""
    deleted: set[int] = field(default_factory=set)
    """Acknowledged deletes."""
    attempted_deletes: set[int] = field(default_factory=set)
    """Deletes that were sent; the last of them may have been done without an acknowledgement."""
    progressed: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with Client(self.target) as client:
            client.create_collection("photos", spec=SPEC)
            try:
                for _ in range(5000):
                    numbers = range(self.next_number, self.next_number + 7)
                    self.next_number += 7
                    client.upsert("photos", map(item_of, numbers), deadline_s=5)
                    self.written.update(numbers)
                    self.attempted_deletes.add(numbers[0])
                    client.delete("photos", [f"{numbers[0]:05}"], deadline_s=5)
                    self.deleted.add(numbers[0])
                    self.progressed.set()
            except HashlensError:
                return


def test_kill_9_under_writes_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    random = np.random.default_rng(2015)
    process = search_service(tmp_path, "--checkpoint-interval-s", "0.2")
    writer = Writer("")
    for _ in range(3):
        process.start()
        writer.target = process.target
        writer.progressed.clear()
        thread = threading.Thread(target=writer.run)
        thread.start()
        try:
            assert writer.progressed.wait(30)
            time.sleep(random.uniform(0.2, 0.8))
        finally:
            process.kill()
            thread.join(30)
        assert not thread.is_alive()

        with process, Client(process.target) as client:
            client.delete("photos", ["nobody"])  # Its version is that of all writes before.
            ids = [f"{number:05}" for number in range(writer.next_number)]
            found = client.get_items("photos", ids, with_feature=True)
            got = {int(item.id): item for item in found}
            assert writer.written - writer.attempted_deletes <= set(got)
            assert not writer.deleted & set(got)
            for number, item in got.items():
                wanted = item_of(number)
                assert item.payload == wanted.payload
                assert item.embedding is not None
                assert wanted.embedding is not None
                assert item.embedding.code == wanted.embedding.code
                assert np.array_equal(item.embedding.feature, wanted.embedding.feature)


def test_redis_away_searching_goes_on_and_writes_recover(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    process = search_service(tmp_path, "--redis-url", redis_server.url)
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        version = client.upsert("photos", map(item_of, range(200))).version
        before = answers(client, version)

        redis_server.kill()
        assert answers(client, version) == before
        assert_told_that_redis_is_away(client, item_of(200))
        assert answers(client, version) == before
        wait_until(lambda: not client.collection("photos").writable, within_s=30, what="it shows")

        redis_server.start()

        def written() -> bool:
            try:
                client.upsert("photos", [item_of(201)], request_id="again", deadline_s=2)
            except (UnavailableError, DeadlineError):
                return False
            return True

        wait_until(written, within_s=30, what="a write succeeds again")
        assert client.search("photos", embedding=embedding_of(201), k=1).hits[0].id == "00201"
        wait_until(lambda: client.collection("photos").writable, within_s=30, what="writable again")
        assert client.collection("photos").durability == "always"


def test_a_paused_redis_holds_up_writes_only(tmp_path: Path, redis_server: RedisServer) -> None:
    process = search_service(tmp_path, "--redis-url", redis_server.url)
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        version = client.upsert("photos", map(item_of, range(100))).version
        before = answers(client, version)
        redis_server.pause()
        try:
            with pytest.raises(HashlensError) as caught:
                client.upsert("photos", [item_of(100)], request_id="held", deadline_s=1.5)
            assert caught.value.retriable
            assert answers(client, version) == before
        finally:
            redis_server.resume()
        # Whether the paused write was done or not: repeating it has it done once.
        again = client.upsert("photos", [item_of(100)], request_id="held", deadline_s=20)
        assert again.version == version + 1


def test_the_service_starts_and_answers_while_redis_is_away(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    process = search_service(tmp_path, "--redis-url", redis_server.url)
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        version = client.upsert("photos", map(item_of, range(100))).version
        before = answers(client, version)
    redis_server.kill()
    with process, Client(process.target) as client:
        assert answers(client, version) == before
        assert_told_that_redis_is_away(client, item_of(100))


def test_a_redis_that_lost_writes_gets_none_and_answers_stay(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    process = search_service(tmp_path, "--redis-url", redis_server.url)
    data = redis_server.directory / "appendonlydir"
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        client.upsert("photos", map(item_of, range(50)))
        redis_server.stop()
        shutil.copytree(data, tmp_path / "older")
        redis_server.start()
        version = client.upsert("photos", map(item_of, range(50, 100)), deadline_s=20).version
        before = answers(client, version)
        redis_server.stop()
        # Else Redis itself might be the first to notice, and say it in other words.
        wait_until(lambda: not client.collection("photos").writable, within_s=30, what="it shows")
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "older", data)
        redis_server.start()
        with pytest.raises(PreconditionError, match="went back from version 100 to 50"):
            client.upsert("photos", [item_of(100)], deadline_s=20)
        info = client.collection("photos")
        assert not info.writable
        assert "went back" in info.detail
        assert answers(client, version) == before
        with redis_server.client() as direct:
            assert direct.hget("hl:{photos}:meta", "seq") == b"50"


def test_an_emptied_redis_stops_writes_and_wipes_nothing(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    process = search_service(tmp_path, "--redis-url", redis_server.url)
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        version = client.upsert("photos", map(item_of, range(100))).version
        before = answers(client, version)
        with redis_server.client() as direct:
            direct.flushall()
        with pytest.raises(HashlensError) as caught:
            client.upsert("photos", [item_of(100)], deadline_s=20)
        assert not caught.value.retriable
        assert answers(client, version) == before
        process.stop()
    with process, Client(process.target) as client:
        assert answers(client, version) == before


def test_one_data_directory_has_one_process(tmp_path: Path) -> None:
    process = search_service(tmp_path)
    with process:
        second = search_service(tmp_path)
        with pytest.raises(AssertionError, match=r"did not start") as caught:
            second.start()
        assert "data" in str(caught.value)
        with Client(process.target) as client:
            assert client.collections() == []


def test_a_collection_whose_files_are_damaged_comes_back(tmp_path: Path) -> None:
    process = search_service(tmp_path)
    with process, Client(process.target) as client:
        client.create_collection("photos", spec=SPEC)
        client.upsert("photos", map(item_of, range(100)))
        expected = client.search("photos", embedding=embedding_of(0), k=9).hits
    (payloads,) = (tmp_path / "data" / "collections" / "photos").glob("payloads-*")
    damaged = bytearray(payloads.read_bytes())
    damaged[0] ^= 1
    payloads.write_bytes(damaged)
    with process, Client(process.target) as client:
        # The log was trimmed at the checkpoint, so the files are made anew: until they are, there
        # is never an empty answer that claims to be exact.
        def answered() -> bool:
            try:
                assert client.search("photos", embedding=embedding_of(0), k=9).hits == expected
            except (UnavailableError, DeadlineError):
                return False
            return True

        wait_until(answered, within_s=30, what="the collection is back")
        assert [item.id for item in client.get_items("photos", ["00001"])] == ["00001"]
        wait_until(lambda: client.collection("photos").writable, within_s=30, what="it follows")
        client.upsert("photos", map(item_of, range(100, 110)))
        assert client.collection("photos").n_items == 110
    assert list((tmp_path / "data" / "quarantine").iterdir())
