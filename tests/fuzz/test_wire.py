"""A short form of ``python -m tests.fuzz.wire``, and what it has found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from hashlens.rpc.metrics_http import MOST_CONNECTIONS
from hashlens.v1 import encoder_service_pb2 as enc
from tests.fuzz.http2 import (
    END_HEADERS,
    GOAWAY,
    HEADERS,
    Connection,
    call_headers,
    data_frames,
    frame,
    message,
)
from tests.fuzz.messages import methods, requests
from tests.fuzz.noise import ATTACKS, Attack
from tests.fuzz.side_noise import HTTP_ATTACKS, TLS_ATTACKS
from tests.fuzz.usage import settled_descriptors, usage
from tests.fuzz.wire import (
    ENCODER,
    OWN_ATTACKS,
    REPLICA,
    SEARCH,
    Victim,
    endure,
    endure_requests,
    start,
    start_secured,
    tracebacks,
)

SEED = 7
MAX_CONNECTIONS = 200
SCALE = 0.04


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Victim]]:
    options = (
        *("--max-message-bytes", str(8 * 2**20)),
        *("--max-bytes-in-flight", str(256 * 2**20)),
        *("--max-connections", str(MAX_CONNECTIONS)),
    )
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("wire")
        encoder, search = start(stack, folder, *options)
        secured = start_secured(stack, folder, *options)
        yield {"encoder": encoder, "search": search, "secured": secured}
        for victim in (encoder, search, secured):
            assert not tracebacks(victim)


@pytest.fixture(params=["encoder", "search"])
def victim(request: pytest.FixtureRequest, victims: dict[str, Victim]) -> Victim:
    return victims[request.param]


@pytest.mark.parametrize("attack", [*ATTACKS, *OWN_ATTACKS], ids=lambda attack: attack.__name__)
def test_a_service_endures(victim: Victim, attack: Attack) -> None:
    endure(victim, attack, SEED, SCALE)


@pytest.mark.parametrize("attack", TLS_ATTACKS, ids=lambda attack: attack.__name__)
def test_a_port_with_tls_endures(victims: dict[str, Victim], attack: Attack) -> None:
    endure(victims["secured"], attack, SEED, SCALE)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_port_for_health_endures(victims: dict[str, Victim], attack: Attack) -> None:
    health, _ = victims["search"].beside
    endure(victims["search"], attack, SEED, SCALE, health)


@pytest.mark.parametrize("attack", HTTP_ATTACKS, ids=lambda attack: attack.__name__)
def test_the_port_for_metrics_endures(victims: dict[str, Victim], attack: Attack) -> None:
    _, metrics = victims["search"].beside
    endure(victims["search"], attack, SEED, SCALE, metrics)


def test_connections_for_metrics_are_counted_and_end(victims: dict[str, Victim]) -> None:
    """Each may take a thread; those who say nothing are closed, and Prometheus gets its turn."""
    victim = victims["search"]
    _, metrics = victim.beside
    before = usage(victim.pid)
    with ExitStack() as stack:
        for _ in range(10 * MOST_CONNECTIONS):
            stack.enter_context(Connection(metrics.target, None))
        assert usage(victim.pid).n_threads <= before.n_threads + MOST_CONNECTIONS + 4
        metrics.healthy()  # While all of them are still there.


def test_every_method_answers_or_refuses(victim: Victim) -> None:
    counts, failures, grown_mb = endure_requests(victim, SEED, 12)
    assert not failures
    n_methods = sum(len(methods(service)) for service in victim.services)
    assert sum(counts.values()) == 12 * n_methods
    assert counts["INVALID_ARGUMENT"] >= n_methods
    assert grown_mb < 200


def test_requests_can_be_made_again() -> None:
    for service in (ENCODER, SEARCH, REPLICA):
        for method in methods(service):
            once, again = (list(requests(method, SEED, 20)) for _ in range(2))
            assert once == again


def test_a_path_that_is_no_text_leaves_the_server_alone(victim: Victim) -> None:
    """gRPC 1.84 and 1.85 end the whole server at one."""
    whole = call_headers(victim.attacked)
    spoiled = whole.replace(b"Service/", b"Serv\xf2ce/")
    assert spoiled != whole
    with Connection(victim.process.target) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, spoiled) + data_frames(1, message(b"")))
        connection.read(0.5)
    victim.healthy()
    with grpc.insecure_channel(victim.process.target) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)


def test_what_a_stranger_says_is_in_no_log(victim: Victim) -> None:
    said = b"A STRANGER WAS HERE\n2026-11-28 00:00:00,000 INFO root: all is well"
    with Connection(victim.process.target) as connection:
        connection.send(frame(GOAWAY, 0, 0, bytes(7) + b"\5" + said))
        connection.read(0.3)
    headers = call_headers(victim.attacked, (b"authorization", b"Bearer \xffSTRANGER"))
    with Connection(victim.process.target) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers) + data_frames(1, message(b"")))
        connection.read(0.3)
    victim.healthy()
    assert b"STRANGER" not in victim.log.read_bytes()


def test_connections_are_counted(victim: Victim) -> None:
    """Those beyond the limit are closed at once, and those that are there go on."""
    before = usage(victim.pid).n_descriptors
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 50):
            stack.enter_context(Connection(victim.process.target))
        # As many as there will be, then those that are too many are closed.
        time.sleep(1.0)
        allowed = before + MAX_CONNECTIONS
        assert settled_descriptors(victim.pid, allowed, within_s=30) <= allowed
        victim.healthy()


def test_a_batch_of_bombs_refuses_each(victims: dict[str, Victim]) -> None:
    images = [b"\x89PNG\r\n\x1a\n" + bytes(20), b"GIF89a\xff\xff\xff\xff\0\0\0", b""]
    with grpc.insecure_channel(victims["encoder"].process.target) as channel:
        call = channel.unary_unary(
            f"/{ENCODER}/EncodeBatch",
            enc.EncodeBatchRequest.SerializeToString,
            enc.EncodeBatchResponse.FromString,
        )
        reply = call(enc.EncodeBatchRequest(images=images), timeout=60)
    assert [result.error.code for result in reply.results] == [3, 3, 3]
