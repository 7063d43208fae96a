"""UpsertStream over gRPC: order, status for each item, durable when answered, every kind of end."""

from __future__ import annotations

import queue
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from hashlens import Client, CollectionSpec, Embedding, Item, convert
from hashlens.errors import (
    DeadlineError,
    HashlensError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from hashlens.rpc.status import error_of, error_of_call
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.integration.conftest import SearchProcess
from tests.support.services import ServiceProcess

MODEL = "a-model"
N_BITS = 32


def embedding(number: int, *, model: str = MODEL) -> Embedding:
    return Embedding(code=number.to_bytes(4, "little"), n_bits=N_BITS, model_id=model)


def item(item_id: str, number: int = 0) -> Item:
    return Item(id=item_id, embedding=embedding(number), payload=str(number).encode())


def requests_of(name: str, items: list[Item]) -> Iterator[spb.UpsertStreamRequest]:
    for i, one in enumerate(items):
        # Only the first message's name counts.
        yield spb.UpsertStreamRequest(
            collection="" if i else name, item=convert.item_to_proto(one), tag=100 + i
        )


@pytest.fixture
def stub(search: SearchProcess) -> Iterator[spb_grpc.SearchServiceStub]:
    with grpc.insecure_channel(search.target) as channel:
        yield spb_grpc.SearchServiceStub(channel)


@pytest.fixture
def name(client: Client) -> str:
    """A new, empty collection of codes."""
    name = uuid.uuid4().hex
    client.create_collection(name, spec=CollectionSpec(name, MODEL, N_BITS, 0))
    return name


def stored(client: Client, name: str, ids: list[str], version: int) -> dict[str, bytes]:
    found = client.get_items(name, ids, min_version=version)
    return {one.id: one.payload for one in found}


def test_each_item_is_answered_in_order_and_there(client: Client, stub: Any, name: str) -> None:
    items = [item(f"i{n}", n) for n in range(3000)]
    replies = list(stub.UpsertStream(requests_of(name, items), timeout=60))
    assert [reply.tag for reply in replies] == list(range(100, 3100))
    versions = [reply.version for reply in replies]
    assert versions == sorted(versions)
    assert versions[0] >= 1
    # Many share a write.
    assert len(set(versions)) < 1500
    found = stored(client, name, [one.id for one in items], versions[-1])
    assert found == {one.id: one.payload for one in items}


def test_a_lone_item_is_written_at_once(client: Client, stub: Any, name: str) -> None:
    pending: queue.SimpleQueue[spb.UpsertStreamRequest | None] = queue.SimpleQueue()
    call = stub.UpsertStream(iter(pending.get, None), timeout=60)
    for n, request in enumerate(requests_of(name, [item("same", n) for n in range(5)])):
        pending.put(request)
        reply = next(call)
        assert reply.tag == 100 + n
        assert stored(client, name, ["same"], reply.version) == {"same": str(n).encode()}
    pending.put(None)
    assert next(call, None) is None


def test_a_bad_item_fails_alone(client: Client, stub: Any, name: str) -> None:
    bad: dict[int, tuple[spb.Item, type[HashlensError], str]] = {
        1: (spb.Item(id="no-content"), InvalidInputError, "item.content"),
        2: (convert.item_to_proto(item("")), InvalidInputError, "item.id"),
        4: (
            convert.item_to_proto(Item(id="other", embedding=embedding(1, model="another"))),
            PreconditionError,
            "item.embedding.model_id",
        ),
    }
    requests = [
        spb.UpsertStreamRequest(
            collection=name,
            item=bad[n][0] if n in bad else convert.item_to_proto(item(f"i{n}", n)),
            tag=n,
        )
        for n in range(7)
    ]
    replies = list(stub.UpsertStream(iter(requests), timeout=60))
    assert [reply.tag for reply in replies] == list(range(7))
    for n, reply in enumerate(replies):
        assert reply.HasField("error") == (n in bad)
        if n in bad:
            error = error_of(reply.error)
            assert type(error) is bad[n][1]
            assert isinstance(error, InvalidInputError | PreconditionError)
            assert error.field == bad[n][2]
    # Written by the stub: the client does not know of it.
    good = [f"i{n}" for n in range(7) if n not in bad]
    assert list(stored(client, name, good, replies[-1].version)) == good
    assert client.collection(name).n_items == 4


def test_images_are_encoded_on_the_way(client: Client, images: list[bytes]) -> None:
    name = uuid.uuid4().hex
    client.create_collection(name)
    known = client.encode(images[0]).embedding
    items = [Item(id=str(i), image=image) for i, image in enumerate(images[:40])]
    items[5] = Item(id="5", image=b"no image")
    items[6] = Item(id="6", embedding=known)
    results = list(client.upsert_stream(name, items, deadline_s=60))
    assert [isinstance(result, int) for result in results] == [i != 5 for i in range(40)]
    error = results[5]
    assert isinstance(error, InvalidInputError)
    assert error.field == "item.image"
    found = client.get_items(name, ["0", "6", "39"], with_feature=True)
    assert [one.id for one in found] == ["0", "6", "39"]
    for one in found[:2]:
        assert one.embedding is not None
        assert one.embedding.code == known.code
        assert np.array_equal(one.embedding.feature, known.feature)  # type: ignore[arg-type]


def test_without_a_collection_the_stream_ends(stub: Any) -> None:
    for wrong, kind in (("not-there", NotFoundError), ("", InvalidInputError)):
        call = stub.UpsertStream(requests_of(wrong, [item("a")] * 3), timeout=20)
        with pytest.raises(grpc.RpcError) as failure:
            next(call)
        assert type(error_of_call(failure.value)) is kind


def test_bytes_that_are_no_message_end_the_stream_and_nothing_before_it(
    client: Client, search: SearchProcess, name: str
) -> None:
    good = [request.SerializeToString() for request in requests_of(name, [item("a"), item("b")])]
    with grpc.insecure_channel(search.target) as channel:
        raw = channel.stream_stream("/hashlens.v1.SearchService/UpsertStream")
        call = raw(iter([*good, b"\xff\xff\xff", good[0]]), timeout=20)
        versions = [spb.UpsertStreamResponse.FromString(next(call)).version for _ in range(2)]
        with pytest.raises(grpc.RpcError) as failure:
            next(call)
    assert isinstance(error_of_call(failure.value), InvalidInputError)
    assert set(stored(client, name, ["a", "b"], versions[-1])) == {"a", "b"}


def test_a_deadline_holds_for_the_whole_stream(client: Client, stub: Any, name: str) -> None:
    def endless() -> Iterator[spb.UpsertStreamRequest]:
        n = 0
        while True:
            yield spb.UpsertStreamRequest(
                collection=name, item=convert.item_to_proto(item(f"i{n}", n))
            )
            n += 1
            time.sleep(0.001)

    replies: list[spb.UpsertStreamResponse] = []
    # On a machine that stands still, nothing may be written within the first one.
    for deadline_s in (1.5, 6.0, 24.0):
        replies.clear()
        call = stub.UpsertStream(endless(), timeout=deadline_s)
        with pytest.raises(grpc.RpcError) as failure:
            replies.extend(call)
        assert isinstance(error_of_call(failure.value), DeadlineError)
        written = [reply for reply in replies if not reply.HasField("error")]
        if written:
            break
    # The last ones may have been told so each.
    assert replies[: len(written)] == written
    found = stored(client, name, [f"i{n}" for n in range(len(written))], written[-1].version)
    assert len(found) == len(written) > 0


@pytest.mark.parametrize("seed", range(4))
def test_what_is_there_is_a_replay_of_what_was_acknowledged(
    client: Client, search: SearchProcess, name: str, seed: int
) -> None:
    """Ids repeated, some items bad, pauses, two streams of different ids, against a model."""
    chance = random.Random(seed)
    model: dict[str, bytes] = {}
    version = 0

    def items(prefix: str, sent: list[Item | None]) -> Iterator[Item]:
        for n in range(400):
            one = item(f"{prefix}{chance.randrange(12)}", chance.randrange(2**31))
            is_bad = chance.random() < 0.1
            if is_bad:
                one = Item(id=one.id, embedding=embedding(n, model="another"), payload=b"bad")
            sent.append(None if is_bad else one)
            if chance.random() < 0.02:
                time.sleep(chance.random() / 50)
            yield one

    streams = []
    for prefix in "ab":
        sent: list[Item | None] = []
        streams.append((sent, client.upsert_stream(name, items(prefix, sent), deadline_s=60)))
    for n in range(400):
        for sent, results in streams:
            result = next(results)
            one = sent[n]
            if one is None:
                assert isinstance(result, PreconditionError)
            else:
                assert isinstance(result, int)
                model[one.id] = one.payload
                version = max(version, result)
    assert all(next(results, None) is None for _, results in streams)
    assert stored(client, name, list(model), version) == model
    assert client.collection(name).n_items == len(model)


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(encoder: ServiceProcess, tmp_path: Path) -> None:
    search = SearchProcess(tmp_path, encoder.target)
    acknowledged: dict[str, bytes] = {}
    with search, Client(search.target, encoder.target) as client:
        client.create_collection("kill", spec=CollectionSpec("kill", MODEL, N_BITS, 0))
        sent = [item(f"i{n % 700}", n) for n in range(100_000)]
        results = client.upsert_stream("kill", sent, deadline_s=60)
        for n in range(2000):
            assert isinstance(next(results), int)
            acknowledged[sent[n].id] = sent[n].payload
        search.kill()
        rest: list[int | HashlensError] = []
        with pytest.raises(UnavailableError):
            rest.extend(results)
        for n, result in enumerate(rest, 2000):
            assert isinstance(result, int)
            acknowledged[sent[n].id] = sent[n].payload
    again = SearchProcess(tmp_path, encoder.target)
    with again, Client(again.target, encoder.target) as client:
        # It may still be reading the log.
        newest = client.newest_version("kill")
        found = stored(client, "kill", list(acknowledged), newest)
        assert set(found) == set(acknowledged)
        # Replaced meanwhile by what was on its way, perhaps, but never older.
        assert all(int(found[i]) >= int(acknowledged[i]) for i in found)


def test_a_server_that_stops_answers_what_it_has_read(
    encoder: ServiceProcess, tmp_path: Path
) -> None:
    search = SearchProcess(tmp_path, encoder.target)
    with search, Client(search.target, encoder.target) as client:
        client.create_collection("stop", spec=CollectionSpec("stop", MODEL, N_BITS, 0))
        items = [item(f"i{n}", n) for n in range(50_000)]
        with grpc.insecure_channel(search.target) as channel:
            stub = spb_grpc.SearchServiceStub(channel)
            call = stub.UpsertStream(requests_of("stop", items), timeout=60)
            replies = [next(call) for _ in range(100)]
            search.process.terminate()
            with pytest.raises(grpc.RpcError) as failure:
                replies.extend(call)
            assert isinstance(error_of_call(failure.value), UnavailableError)
            assert "is stopping" in str(failure.value.details())
            assert search.process.wait(60) == 0
    assert [reply.tag for reply in replies] == list(range(100, 100 + len(replies)))
    assert all(reply.HasField("version") for reply in replies)
    again = SearchProcess(tmp_path, encoder.target)
    with again, Client(again.target, encoder.target) as client:
        # It may still be reading the log.
        found = stored(client, "stop", ["i0"], client.newest_version("stop"))
        assert found == {"i0": b"0"}
        assert client.collection("stop").n_items == len(replies)
