"""Repeated writes, awaited versions, and what a caller may rely on when something else is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from hashlens import Client, Embedding, Item, SearchOptions, convert
from hashlens.errors import DeadlineError, InvalidInputError, OverloadedError
from hashlens.rpc.status import status_of
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.integration.conftest import SearchProcess
from tests.support.observed import Observed, value
from tests.support.services import ServiceProcess, wait_until


class Moody(enc_grpc.EncoderServiceServicer):
    """Passes calls on to a real encoder, but is too busy for the third image of a batch once.

    An overload of exactly one image, exactly once, cannot be had from the real one.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._real = enc_grpc.EncoderServiceStub(self._channel)
        self.is_busy = True

    def EncodeBatch(self, request: enc.EncodeBatchRequest, context: Any) -> Any:  # noqa: N802
        reply = self._real.EncodeBatch(request, timeout=20)
        if self.is_busy:
            self.is_busy = False
            error = status_of(OverloadedError("busy", retry_after_s=0.1))
            reply.results[2].CopyFrom(enc.EncodeResult(error=error))
        return reply

    def close(self) -> None:
        self._channel.close()


@pytest.fixture
def moody(encoder: ServiceProcess) -> Iterator[str]:
    servicer = Moody(encoder.target)
    server = grpc.server(ThreadPoolExecutor(2))
    enc_grpc.add_EncoderServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(1).wait(10)
    servicer.close()


def test_a_write_that_met_an_overload_is_complete_when_repeated(
    moody: str,
    encoder: ServiceProcess,
    images: list[bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    items = [Item(id=str(i), image=images[i]) for i in range(5)]
    with (
        SearchProcess(tmp_path_factory.mktemp("moody"), moody) as search,
        Client(search.target, encoder.target) as client,
    ):
        client.create_collection("photos", expected_rows=100)
        with pytest.raises(OverloadedError):
            client.upsert("photos", items, request_id="once")
        assert client.collection("photos").n_items == 0
        result = client.upsert("photos", items, request_id="once")
        assert (result.n_written, result.failures) == (5, ())
        assert client.collection("photos").n_items == 5


@pytest.fixture(scope="module")
def embedding(encoder: ServiceProcess, search: SearchProcess, images: list[bytes]) -> Embedding:
    with Client(search.target, encoder.target) as client:
        client.create_collection("photos", expected_rows=100)
        found = client.encode(images[0]).embedding
        client.upsert("photos", [Item(id="a", embedding=found)])
        # This client reads its own writes; from here on, so does every other.
        client.collection("photos")
        return found


def test_a_search_waits_for_the_version_it_asks_for(
    observed: Observed, embedding: Embedding
) -> None:
    target = observed.search.target
    answers = []

    def n_waiting() -> float:
        samples = observed.search.scrape()
        return value(samples, "hashlens_rpc_in_flight", method="SearchService/Search")

    with Client(target, observed.encoder.target) as client:
        client.create_collection("awaited", expected_rows=100)
        client.upsert("awaited", [Item(id="a", embedding=embedding)])
        version = client.collection("awaited").version + 1

        def ask() -> None:
            with Client(target, target) as other:
                options = SearchOptions(k=5, min_version=version)
                answers.append(other.search("awaited", embedding=embedding, options=options))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: n_waiting() == 1, within_s=20, what="the search is there")
        time.sleep(0.3)
        assert not answers
        client.upsert("awaited", [Item(id="b", embedding=embedding)])
        asking.join(30)
        client.drop_collection("awaited")
    (answer,) = answers
    assert answer.receipt.version >= version
    assert {"a", "b"} <= {hit.id for hit in answer.hits}
    assert answer.receipt.timings.wait_version_ns > 100_000_000


def test_waiting_for_a_version_ends_in_time_and_holds_nobody_up(
    client: Client, search: SearchProcess, embedding: Embedding
) -> None:
    options = SearchOptions(k=1, min_version=2**64 - 1)
    began_s = time.monotonic()
    with pytest.raises(DeadlineError):
        client.search("photos", embedding=embedding, options=options, deadline_s=0.5)
    assert time.monotonic() - began_s < 15
    request = spb.SearchRequest(
        collection="photos", query=spb.Query(id="a"), options=convert.options_to_proto(options)
    )
    with grpc.insecure_channel(search.target) as channel:
        stub = spb_grpc.SearchServiceStub(channel)
        # More than the service has threads.
        waiting = [stub.Search.future(request, timeout=90) for _ in range(30)]
        time.sleep(0.5)
        client.upsert("photos", [Item(id="c", embedding=embedding)], deadline_s=45)
        assert client.get_items("photos", ["c"], deadline_s=45)
        assert not any(one.done() for one in waiting)
        for one in waiting:
            one.cancel()


def test_any_request_id_of_the_contract_passes_through_the_client(
    client: Client, embedding: Embedding
) -> None:
    items = [Item(id=f"{i:04}", embedding=embedding) for i in range(300)]
    first = client.upsert("photos", items, request_id="x" * 64)
    again = client.upsert("photos", items, request_id="x" * 64)
    assert first.version == again.version
    assert again.n_written == 300


def test_a_collection_made_anew_by_others_is_read_anew(
    client: Client, search: SearchProcess, encoder: ServiceProcess, embedding: Embedding
) -> None:
    client.create_collection("anew", expected_rows=100)
    client.upsert("anew", [Item(id=str(i), embedding=embedding) for i in range(20)])
    with Client(search.target, encoder.target) as other:
        other.drop_collection("anew")
        other.create_collection("anew", expected_rows=100)
    client.create_collection("anew", expected_rows=100)
    assert client.search("anew", embedding=embedding, deadline_s=20).hits == ()


def test_a_reply_that_cannot_fit_is_refused_before_any_work(
    client: Client, embedding: Embedding
) -> None:
    ids = ["a"] * 200_000
    with pytest.raises(InvalidInputError, match="above the limit"):
        client.get_items("photos", ids, with_feature=True)
