"""Streams of both clients: lazy, in order, resumed after a server's end, ended by their caller."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from typing import Any

import grpc
import pytest

from encoder_service.config import EncoderConfig
from hashlens import AsyncClient, Client, CollectionSpec, Embedding, Item
from hashlens.client import ClientConfig
from hashlens.errors import DeadlineError, InvalidInputError, UnavailableError
from hashlens.rpc.status import status_of
from hashlens.types import Encoded
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from tests.integration.conftest import SearchProcess
from tests.support.services import ServiceProcess, wait_until
from tests.support.stream_server import encoder_in_process


def items(n: int) -> list[Item]:
    return [
        Item(
            id=f"i{i % 50}",
            embedding=Embedding(code=i.to_bytes(4, "little"), n_bits=32, model_id="m"),
            payload=str(i).encode(),
        )
        for i in range(n)
    ]


def made(client: Client) -> str:
    name = uuid.uuid4().hex
    client.create_collection(name, spec=CollectionSpec(name, "m", 32, 0))
    return name


def test_results_keep_the_order_with_errors_in_their_places(
    client: Client, images: list[bytes]
) -> None:
    given = [*images[:20], b"no image", *images[20:30]]
    results = list(client.encode_stream(given, with_activations=True))
    assert [i for i, one in enumerate(results) if isinstance(one, InvalidInputError)] == [20]
    alone = client.encode(images[25]).embedding
    one = results[26]
    assert isinstance(one, Encoded)
    assert one.embedding.code == alone.code
    assert one.embedding.activations is not None


def test_the_asynchronous_client_gives_the_same(
    client: Client, search: SearchProcess, encoder: ServiceProcess, images: list[bytes]
) -> None:
    name = made(client)

    async def lazily() -> AsyncIterator[bytes]:
        for image in images[:30]:
            await asyncio.sleep(0)
            yield image

    async def ask() -> tuple[list[bytes], list[int]]:
        async with AsyncClient(search.target, encoder.target) as peer:
            encoded = [one async for one in peer.encode_stream(lazily())]
            versions = [one async for one in peer.upsert_stream(name, items(300))]
            (last,) = await peer.get_items(name, ["i49"])
            assert last.payload == b"299"
            codes = [one.embedding.code for one in encoded if isinstance(one, Encoded)]
            return codes, [one for one in versions if isinstance(one, int)]

    codes, versions = asyncio.run(ask())
    expected = [one for one in client.encode_stream(images[:30]) if isinstance(one, Encoded)]
    assert codes == [one.embedding.code for one in expected]
    assert len(versions) == 300
    assert versions == sorted(versions)


def test_the_caller_is_asked_a_few_ahead_only(encoder: ServiceProcess, images: list[bytes]) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield images[taken % 100]

    with Client(encoder.target, encoder.target, config=ClientConfig(stream_items=10)) as client:
        results = client.encode_stream(endless())
        assert taken == 0
        for n in range(1, 31):
            next(results)
            assert taken <= n + 10
        results.close()
        time.sleep(0.2)
        assert taken <= 41


def test_closing_early_ends_the_call_and_its_threads(client: Client, images: list[bytes]) -> None:
    before = threading.active_count()
    with closing(client.encode_stream(images[i % 50] for i in range(10**6))) as results:
        next(results)
    wait_until(lambda: threading.active_count() <= before, within_s=60, what="no thread is left")


def test_closing_early_ends_the_tasks_of_the_asynchronous_client(
    encoder: ServiceProcess, images: list[bytes]
) -> None:
    async def ask() -> None:
        async with AsyncClient(encoder.target, encoder.target) as peer:
            await peer.model()
            before = len(asyncio.all_tasks())
            stream = peer.encode_stream(images[i % 50] for i in range(10**6))
            async with aclosing(stream) as results:
                await anext(results)
            for _ in range(600):
                await asyncio.sleep(0.05)
                if len(asyncio.all_tasks()) <= before:
                    return
            raise AssertionError(asyncio.all_tasks())

    asyncio.run(ask())


class OutOfItemsError(Exception):
    """The caller's own."""


def test_what_the_callers_iterable_raises_comes_through(
    client: Client, encoder: ServiceProcess, search: SearchProcess, images: list[bytes]
) -> None:
    def failing() -> Iterator[bytes]:
        yield from images[:5]
        raise OutOfItemsError

    results: list[object] = []
    with pytest.raises(OutOfItemsError):
        results.extend(client.encode_stream(failing()))
    assert len(results) == 5

    async def ask() -> None:
        async with AsyncClient(search.target, encoder.target) as peer:
            stream = peer.encode_stream(failing())
            for _ in range(5):
                await anext(stream)
            with pytest.raises(OutOfItemsError):
                await anext(stream)

    asyncio.run(ask())


def test_a_deadline_is_for_the_whole_stream(client: Client, images: list[bytes]) -> None:
    for deadline_s in (1.0, 5.0, 30.0):  # A busy machine may take longer for the first answer.
        results: list[object] = []
        endless = (images[i % 50] for i in range(10**6))
        with pytest.raises(DeadlineError):
            results.extend(client.encode_stream(endless, deadline_s=deadline_s))
        if results:
            break
    assert results


def test_an_item_that_fits_no_message_is_refused_here(
    encoder: ServiceProcess, images: list[bytes]
) -> None:
    config = ClientConfig(max_message_bytes=100_000)
    with Client(encoder.target, encoder.target, config=config) as client:
        results: list[object] = []
        with pytest.raises(InvalidInputError, match="above the limit"):
            results.extend(client.encode_stream([images[0], bytes(200_000), images[1]]))
        assert len(results) == 1


class Mute(enc_grpc.EncoderServiceServicer):
    """Answers once, and then listens only, which the real one does not."""

    def EncodeStream(self, requests: Any, context: Any) -> Any:  # noqa: N802
        first = next(requests)
        yield enc.EncodeStreamResponse(
            tag=first.tag, result=enc.EncodeResult(error=status_of(InvalidInputError("no")))
        )
        while context.is_active():
            time.sleep(0.05)


@pytest.fixture
def mute() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    enc_grpc.add_EncoderServiceServicer_to_server(Mute(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(1).wait(10)


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(
    mute: str, images: list[bytes]
) -> None:
    def ask(config: ClientConfig) -> int:
        results: list[object] = []
        with Client(mute, mute, config=config) as client, pytest.raises(DeadlineError) as caught:
            results.extend(client.encode_stream(images[:5]))
        assert f"no answer has come for {config.deadline_s:g} s" in str(caught.value)
        return len(results)

    async def ask_too(config: ClientConfig) -> int:
        n_results = 0

        async def read(results: AsyncIterator[object]) -> None:
            nonlocal n_results
            async for _ in results:
                n_results += 1

        async with AsyncClient(mute, mute, config=config) as peer:
            with pytest.raises(DeadlineError) as caught:
                await read(peer.encode_stream(images[:5]))
        assert f"no answer has come for {config.deadline_s:g} s" in str(caught.value)
        return n_results

    for asked in (ask, lambda config: asyncio.run(ask_too(config))):
        for deadline_s in (1.0, 5.0, 30.0):  # A busy machine may take longer for the first.
            began_s = time.monotonic()
            n_results = asked(ClientConfig(deadline_s=deadline_s))
            assert time.monotonic() - began_s >= deadline_s
            if n_results:
                break
        assert n_results == 1


def test_a_stream_goes_on_when_its_connection_ends(client: Client, images: list[bytes]) -> None:
    """Servers end connections of a certain age, so that clients find new servers."""
    n = 150

    def slowly() -> Iterator[bytes]:
        for i in range(n):
            time.sleep(0.01)
            yield images[i % 100]

    expected = client.encode_batch(images[:100])
    with encoder_in_process(
        EncoderConfig(), max_connection_age_ms=700, max_connection_age_grace_ms=100
    ) as server:
        with Client(server.target, server.target) as peer:
            results = list(peer.encode_stream(slowly()))
        assert len(results) == n
        for i, one in enumerate(results):
            alone = expected[i % 100]
            assert isinstance(one, Encoded)
            assert isinstance(alone, Encoded)
            assert one.embedding.code == alone.embedding.code

        async def ask() -> int:
            async with AsyncClient(server.target, server.target) as other:
                found = [one async for one in other.encode_stream(slowly())]
                return sum(isinstance(one, Encoded) for one in found)

        assert asyncio.run(ask()) == n


def test_a_stream_ends_when_no_server_is_there(images: list[bytes]) -> None:
    with encoder_in_process(EncoderConfig()) as server:
        client = Client(server.target, server.target)
        results = client.encode_stream(images[i % 50] for i in range(10**6))
        next(results)
    rest: list[object] = []
    with client, pytest.raises(UnavailableError):
        rest.extend(results)
    assert all(isinstance(one, Encoded) for one in rest)


def test_a_source_that_rests_for_long_is_waited_for(images: list[bytes]) -> None:
    rest_s = 2.0  # As long as many streams that have nothing to do.

    def slow() -> Iterator[bytes]:
        yield images[0]
        time.sleep(rest_s)
        yield images[1]
        time.sleep(rest_s)

    async def slow_too() -> AsyncIterator[bytes]:
        yield images[0]
        await asyncio.sleep(rest_s)
        yield images[1]
        await asyncio.sleep(rest_s)

    async def ask(target: str) -> list[object]:
        async with AsyncClient(target, target) as peer:
            return [one async for one in peer.encode_stream(slow_too())]

    # Long enough for an image to come on a busy machine: four in a row that do not are a failure.
    with (
        encoder_in_process(EncoderConfig(stream_idle_s=0.25)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        meanwhile = pool.submit(lambda: asyncio.run(ask(server.target)))
        with Client(server.target, server.target) as client:
            found: list[object] = list(client.encode_stream(slow()))
        found += meanwhile.result()
    assert len(found) == 4
    assert all(isinstance(one, Encoded) for one in found)
