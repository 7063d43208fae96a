"""StreamBall over gRPC, by both clients, against the definition."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from hashlens import AsyncClient, Client, CollectionSpec, Embedding, Item, codes, convert
from hashlens.client import ClientConfig
from hashlens.errors import (
    DeadlineError,
    HashlensError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from hashlens.types import BallPart, Receipt
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from search_service import ball
from search_service.ball_stream import Ball, BallStreamer
from search_service.executor import Executor
from search_service.storage import Record, Store, StoreConfig
from tests.integration.conftest import SearchProcess
from tests.reference.kernels import hamming
from tests.support.services import ServiceProcess

N = 3000
N_BITS = 20
MODEL = "a-model"
PAYLOAD = 500
"""Bytes: the whole ball is far more than gRPC's windows hold, so a reader that stops stops us."""


def embedding(code: bytes) -> Embedding:
    return Embedding(code=code, n_bits=N_BITS, model_id=MODEL)


@pytest.fixture(scope="module")
def stored(encoder: ServiceProcess, search: SearchProcess) -> dict[str, bytes]:
    """Ids to codes of the collection "ball", in the order of writing."""
    packed = codes.pack(np.random.default_rng(0).random((N, N_BITS)) < 0.5)
    spec = CollectionSpec(name="ball", model_id=MODEL, n_bits=N_BITS, dim=0)
    with Client(search.target, encoder.target) as client:
        client.create_collection("ball", spec=spec)
        rows = {f"{i:04}": packed[i].tobytes() for i in range(N)}
        items = [
            Item(id=i, embedding=embedding(c), payload=i.encode() * (PAYLOAD // 4))
            for i, c in rows.items()
        ]
        client.upsert("ball", items)
        # Deleted rows are gone; replaced ones come last, with their new code.
        client.delete("ball", ["0003", "1500"])
        moved = {"0007": rows["0001"], "0002": rows["2999"]}
        client.upsert("ball", [Item(id=i, embedding=embedding(c)) for i, c in moved.items()])
        client.collection("ball")
    gone = {"0003", "1500", *moved}
    return {i: c for i, c in rows.items() if i not in gone} | moved


def ball_of(stored: dict[str, bytes], code: bytes, radius_bits: int) -> list[tuple[str, int]]:
    pairs = [(item_id, hamming(other, code)) for item_id, other in stored.items()]
    return [(item_id, bits) for item_id, bits in pairs if bits <= radius_bits]


def read(parts: Any) -> tuple[list[tuple[str, int]], Receipt]:
    """Read to the end; the receipt is in the last part alone."""
    found: list[BallPart] = list(parts)
    assert [part.receipt is None for part in found] == [True] * (len(found) - 1) + [False]
    assert max(len(part.hits) for part in found) <= 1000
    receipt = found[-1].receipt
    assert receipt is not None
    return [(hit.id, hit.hamming_bits) for part in found for hit in part.hits], receipt


@pytest.mark.parametrize("radius_bits", [0, 4, 9, N_BITS])
def test_a_ball_is_what_the_definition_says(
    client: Client, stored: dict[str, bytes], radius_bits: int
) -> None:
    for item_id in ("0001", "0007", "2500"):
        code = stored[item_id]
        expected = ball_of(stored, code, radius_bits)
        hits, receipt = read(client.stream_ball("ball", id=item_id, radius_bits=radius_bits))
        assert hits == expected
        by_code = client.stream_ball("ball", embedding=embedding(code), radius_bits=radius_bits)
        assert read(by_code)[0] == expected
        assert receipt.rows_scanned == len(stored)
        assert (receipt.threshold_bits, receipt.pool_size) == (radius_bits, len(expected))
        assert sum(receipt.pool_histogram) == len(expected)
        assert len(receipt.pool_histogram) == radius_bits + 1
        assert receipt.exact
        assert receipt.version == client.collection("ball").version
        assert receipt.timings.total_ns > receipt.timings.coarse_ns > 0


def test_an_empty_ball_has_a_receipt(client: Client, stored: dict[str, bytes]) -> None:
    free = next(
        code for i in range(2**N_BITS) if not ball_of(stored, code := i.to_bytes(3, "little"), 0)
    )
    hits, receipt = read(client.stream_ball("ball", embedding=embedding(free), radius_bits=0))
    assert (hits, receipt.pool_size, receipt.pool_histogram) == ([], 0, (0,))
    empty = CollectionSpec(name="ball-empty", model_id=MODEL, n_bits=N_BITS, dim=0)
    client.create_collection("ball-empty", spec=empty)
    parts = client.stream_ball("ball-empty", embedding=embedding(free), radius_bits=N_BITS)
    assert read(parts)[0] == []


def test_hits_carry_what_is_asked_for(client: Client, stored: dict[str, bytes]) -> None:
    def first(**options: Any) -> Any:
        return next(iter(client.stream_ball("ball", id="0000", radius_bits=0, **options))).hits[0]

    plain = first(with_payload=False)
    assert (plain.payload, plain.code, plain.feature, plain.distance) == (b"", None, None, None)
    full = first(with_code=True)
    assert (full.payload, full.code) == (b"0000" * (PAYLOAD // 4), stored["0000"])


def test_an_image_is_a_centre(client: Client, images: list[bytes]) -> None:
    model = client.model()
    spec = CollectionSpec(name="ball-images", model_id=model.model_id, n_bits=model.n_bits, dim=0)
    client.create_collection("ball-images", spec=spec)
    client.upsert("ball-images", [Item(id=str(i), image=images[i]) for i in range(4)])
    hits, receipt = read(client.stream_ball("ball-images", image=images[2], radius_bits=0))
    assert ("2", 0) in hits
    assert receipt.timings.encode.inference_ns > 0
    assert receipt.timings.encode_call_ns > receipt.timings.encode.inference_ns


def test_the_asynchronous_client_reads_the_same(
    client: Client, search: SearchProcess, stored: dict[str, bytes]
) -> None:
    async def ask() -> list[BallPart]:
        async with AsyncClient(search.target, search.target) as peer:
            balls = peer.stream_ball("ball", id="0001", radius_bits=8)
            return [part async for part in balls]

    assert read(asyncio.run(ask()))[0] == ball_of(stored, stored["0001"], 8)


def test_what_anyone_has_written_is_in_a_ball_that_waits_for_it(
    client: Client, search: SearchProcess
) -> None:
    spec = CollectionSpec(name="ball-of-others", model_id=MODEL, n_bits=N_BITS, dim=0)
    client.create_collection(spec.name, spec=spec)
    item = Item(id="0", embedding=embedding(bytes(3)))

    async def ask() -> tuple[int, Receipt]:
        async with AsyncClient(search.target) as peer:
            version = await peer.newest_version(spec.name)
            parts = [
                part
                async for part in peer.stream_ball(
                    spec.name, embedding=item.embedding, radius_bits=0, min_version=version
                )
            ]
            return version, read(parts)[1]

    with Client(search.target) as other:
        for i in range(10):
            client.upsert(spec.name, [item])
            assert other.newest_version(spec.name) == 2 * i + 1
            parts = other.stream_ball(
                spec.name, embedding=item.embedding, radius_bits=0, min_version=2 * i + 1
            )
            assert read(parts)[1].version == 2 * i + 1
            client.upsert(spec.name, [item])
            version, receipt = asyncio.run(ask())
            assert receipt.version == version == 2 * i + 2
        with pytest.raises(InvalidInputError, match="not a version"):
            other.stream_ball(spec.name, id="0", radius_bits=0, min_version=-1)


def test_a_version_is_waited_for_no_longer_than_without_a_deadline(
    encoder: ServiceProcess, tmp_path: Path
) -> None:
    """The deadline is for reading, which may take hours."""
    with (
        SearchProcess(tmp_path, encoder.target, "--default-deadline-s", "1") as process,
        Client(process.target) as client,
    ):
        spec = CollectionSpec(name="ball", model_id=MODEL, n_bits=N_BITS, dim=0)
        client.create_collection(spec.name, spec=spec)
        code = embedding(bytes(3))
        parts = client.stream_ball(
            spec.name, embedding=code, radius_bits=0, min_version=1, deadline_s=86_400
        )
        with pytest.raises(DeadlineError, match=r"this replica has 0\. Ask again"):
            next(parts)


def test_a_ball_is_of_one_version_whatever_is_written_meanwhile(
    client: Client, stored: dict[str, bytes]
) -> None:
    spec = CollectionSpec(name="ball-moving", model_id=MODEL, n_bits=N_BITS, dim=0)
    client.create_collection("ball-moving", spec=spec)
    code = embedding(bytes(3))
    items = [Item(id=f"{i:04}", embedding=code, payload=bytes(2000)) for i in range(N)]
    client.upsert("ball-moving", items)
    parts = client.stream_ball("ball-moving", embedding=code, radius_bits=0)
    begun = next(parts)
    client.delete("ball-moving", ["2990", "2991"])
    client.upsert("ball-moving", [Item(id="new", embedding=code)])
    hits, receipt = read([begun, *parts])
    assert [item_id for item_id, _ in hits] == [item.id for item in items]
    assert receipt.version == N
    # A client reads its own writes.
    hits, receipt = read(client.stream_ball("ball-moving", embedding=code, radius_bits=0))
    assert [item_id for item_id, _ in hits] == [
        *(item.id for item in items if item.id not in ("2990", "2991")),
        "new",
    ]
    assert receipt.version == N + 3


def test_blocks_scanned_later_are_of_the_version_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of blocks that are not scanned yet are deleted, replaced, dropped: the ball has them."""
    monkeypatch.setattr(ball, "BLOCK_ROWS", 64)
    spec = CollectionSpec(name="moving", model_id=MODEL, n_bits=N_BITS, dim=0)
    rng = np.random.default_rng(2)

    def records(ids: range) -> list[Record]:
        packed = codes.pack(rng.random((len(ids), N_BITS)) < 0.5)
        pairs = zip(ids, packed, strict=True)
        return [Record(f"{i:03}", c.tobytes(), b"", f"{i}".encode()) for i, c in pairs]

    written = records(range(256))
    expected = [(r.id, hamming(r.code, bytes(3)), r.payload) for r in written]
    with (
        Executor(n_threads=2) as executor,
        Store.open(StoreConfig(data_dir=tmp_path / "data")) as store,
    ):
        collection = store.create(spec)
        version = collection.upsert(written, request_id="a", deadline_s=10)
        wanted = Ball(
            collection.wait_for(version, 10), bytes(3), N_BITS, with_payload=True, with_code=False
        )

        async def read_while_it_changes() -> list[BallPart]:
            stream = BallStreamer(executor, 1 << 20).stream(wanted, ends_s=time.monotonic() + 60)
            parts = [convert.ball_part_from_proto(await anext(stream))]
            gone = [f"{i:03}" for i in range(60, 200)]
            collection.delete(gone, request_id="b", deadline_s=10)
            version = collection.upsert(records(range(190, 400)), request_id="c", deadline_s=10)
            assert collection.wait_for(version, 10).n_alive != 256
            parts.append(convert.ball_part_from_proto(await anext(stream)))
            store.drop("moving", deadline_s=10)
            return [*parts, *[convert.ball_part_from_proto(m) async for m in stream]]

        parts = asyncio.run(read_while_it_changes())
    found = [(h.id, h.hamming_bits, h.payload) for part in parts for h in part.hits]
    assert found == expected
    assert len(parts) == 256 // 64 + 1
    receipt = parts[-1].receipt
    assert receipt is not None
    assert (receipt.version, receipt.pool_size) == (wanted.snapshot.version, 256)


# -- what goes wrong -------------------------------------------------------------------------------


def test_wrong_requests_are_refused_with_the_field(
    client: Client, stored: dict[str, bytes]
) -> None:
    def refused(kind: type[HashlensError], **arguments: Any) -> HashlensError:
        with pytest.raises(kind) as caught:
            next(client.stream_ball(**{"collection": "ball", "radius_bits": 1, **arguments}))
        return caught.value

    error = refused(InvalidInputError, id="0001", radius_bits=N_BITS + 1)
    assert isinstance(error, InvalidInputError)
    assert error.field == "radius_bits"
    error = refused(InvalidInputError, id="0001", radius_bits=-1)
    assert isinstance(error, InvalidInputError)
    assert error.field == "radius_bits"
    error = refused(InvalidInputError, id="")
    assert isinstance(error, InvalidInputError)
    assert error.field == "query.id"
    refused(InvalidInputError)
    refused(NotFoundError, id="nobody")
    refused(NotFoundError, id="0001", collection="nowhere")
    other = Embedding(code=bytes(3), n_bits=N_BITS, model_id="another")
    error = refused(PreconditionError, embedding=other)
    assert isinstance(error, PreconditionError)
    assert error.field == "query.embedding.model_id"
    refused(DeadlineError, id="0001", deadline_s=-1)  # Passed: 0.1 ms suffices for one.


def test_the_wire_says_invalid_argument(search: SearchProcess, stored: dict[str, bytes]) -> None:
    with grpc.insecure_channel(search.target) as channel:
        stub = spb_grpc.SearchServiceStub(channel)
        request = spb.StreamBallRequest(
            collection="ball", query=spb.Query(id="0001"), radius_bits=N_BITS + 1
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.StreamBall(request, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_version_that_never_comes_ends_by_the_deadline(
    search: SearchProcess, stored: dict[str, bytes]
) -> None:
    with grpc.insecure_channel(search.target) as channel:
        stub = spb_grpc.SearchServiceStub(channel)
        request = spb.StreamBallRequest(
            collection="ball", query=spb.Query(id="0001"), min_version=10**9
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.StreamBall(request, timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_callers_that_leave_or_dawdle_leave_the_service_free(
    client: Client, search: SearchProcess, encoder: ServiceProcess, stored: dict[str, bytes]
) -> None:
    expected = ball_of(stored, stored["0001"], N_BITS)
    dawdlers = [client.stream_ball("ball", id="0001", radius_bits=N_BITS) for _ in range(10)]
    begun = [next(parts) for parts in dawdlers]
    # Ten balls are open and half read; whoever comes is served meanwhile.
    assert client.search("ball", id="0001", k=1, deadline_s=20).hits[0].hamming_bits == 0
    for parts in dawdlers[1:]:
        parts.close()
    assert read(client.stream_ball("ball", id="0001", radius_bits=N_BITS))[0] == expected
    # The one that only dawdled still gets all of it.
    assert read([begun[0], *dawdlers[0]])[0] == expected

    async def cancel_midway() -> None:
        async with AsyncClient(search.target, encoder.target) as peer:
            async with aclosing(peer.stream_ball("ball", id="0001", radius_bits=N_BITS)) as parts:
                await anext(parts)
            found = await peer.search("ball", id="0001", k=1, deadline_s=20)
            assert found.hits[0].hamming_bits == 0

    asyncio.run(cancel_midway())


def test_a_server_that_stops_ends_the_ball_with_an_error(
    encoder: ServiceProcess, tmp_path: Any
) -> None:
    code = embedding(bytes(3))
    with (
        SearchProcess(tmp_path, encoder.target, "--grace-s", "0.2") as process,
        Client(process.target, encoder.target, config=ClientConfig(deadline_s=20)) as client,
    ):
        spec = CollectionSpec(name="ball", model_id=MODEL, n_bits=N_BITS, dim=0)
        client.create_collection("ball", spec=spec)
        items = [Item(id=f"{i:04}", embedding=code, payload=bytes(60_000)) for i in range(300)]
        client.upsert("ball", items)
        parts = client.stream_ball("ball", embedding=code, radius_bits=0)
        next(parts)
        process.stop()  # Nobody reads meanwhile: the ball cannot be finished.
        with pytest.raises(UnavailableError):
            list(parts)
