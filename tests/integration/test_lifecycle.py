"""Starting, stopping and health of real processes, under load and with open streams."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens import Client, codes
from hashlens.cli.main import main
from hashlens.client import ClientConfig
from hashlens.errors import HashlensError, InvalidInputError, OverloadedError
from hashlens.rpc.health import LIVENESS, READINESS
from hashlens.rpc.server_config import ServerConfig
from hashlens.rpc.status import error_of_call
from hashlens.types import CollectionSpec, Embedding, Item
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.support.ports import held_port
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import ServiceProcess, wait_until

SPEC = CollectionSpec("photos", "m", 64, 0, expected_rows=40_000)
N = 30_000
NOBODY = "127.0.0.1:1"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def held_addresses(n: int) -> Iterator[list[str]]:
    """Addresses that nobody else is given while the block runs."""
    with ExitStack() as stack:
        yield [f"127.0.0.1:{stack.enter_context(held_port())}" for _ in range(n)]


def embeddings(n: int, seed: int = 0) -> list[Embedding]:
    packed = codes.pack(np.random.default_rng(seed).random((n, 64)) < 0.5)
    return [Embedding(code.tobytes(), 64, "m") for code in packed]


def fill(target: str, n: int = N) -> None:
    with Client(target, NOBODY) as client:
        client.create_collection(SPEC.name, spec=SPEC)
        client.upsert(
            SPEC.name,
            (Item(f"{i:06}", one, payload=bytes(400)) for i, one in enumerate(embeddings(n))),
        )
        client.collection(SPEC.name)


class Search(ServiceProcess):
    """A search process with its own store on one directory."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        super().__init__(
            "search_service", "--data-dir", str(folder / "data"), *arguments, log=self.log
        )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose data hold a collection."""
    folder = tmp_path_factory.mktemp("filled")
    with Search(folder) as process:
        fill(process.target)
    return folder


def ball(channel: grpc.Channel, timeout: float | None = 60) -> Iterator[spb.StreamBallResponse]:
    """All rows: far more than gRPC holds for who does not read."""
    query = spb.Query()
    query.embedding.code.bits = embeddings(1)[0].code
    query.embedding.code.n_bits = 64
    query.embedding.model_id = "m"
    stub = spb_grpc.SearchServiceStub(channel)
    request = spb.StreamBallRequest(
        collection=SPEC.name, query=query, radius_bits=64, with_payload=True
    )
    found: Iterator[spb.StreamBallResponse] = stub.StreamBall(request, timeout=timeout)
    return found


def check(target: str, name: str = "") -> int:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
        return status


@pytest.fixture
def health() -> Iterator[str]:
    """An address for health alone."""
    with held_addresses(1) as (address,):
        yield address


def test_sigterm_ends_watches_and_lets_what_is_in_flight_end(filled: Path, health: str) -> None:
    process = Search(filled, "--grace-s", "90", "--health-listen", health).start()
    try:
        with (
            grpc.insecure_channel(process.target) as channel,
            grpc.insecure_channel(health) as plain,
            Client(process.target, NOBODY) as client,
            ThreadPoolExecutor(8) as callers,
        ):
            watches = [
                health_pb2_grpc.HealthStub(one).Watch(
                    health_pb2.HealthCheckRequest(service=name), timeout=60
                )
                for one in (channel, plain)
                for name in ("", "", READINESS, "hashlens.v1.SearchService")
            ]
            for watch in watches:
                assert next(watch).status == SERVING
            half_read = ball(channel)
            n = len(next(half_read).hits)
            stop = threading.Event()

            def ask(number: int) -> list[HashlensError]:
                failures = []
                query = embeddings(1, number)[0]
                while not stop.is_set():
                    try:
                        assert len(client.search(SPEC.name, embedding=query, k=100).hits) == 100
                    except HashlensError as error:
                        failures.append(error)
                        return failures
                return failures

            asking = [callers.submit(ask, number) for number in range(4)]
            time.sleep(0.5)
            process.process.send_signal(signal.SIGTERM)
            for watch in watches:
                assert next(watch).status == NOT_SERVING
                assert list(watch) == []
            assert check(health, LIVENESS) == SERVING
            # Nobody is cut off: the reader of half a ball reads the other half.
            last = None
            for last in half_read:
                n += len(last.hits)
            assert n == N
            assert last is not None
            assert last.receipt.pool_size == N
            # Long before the grace is over.
            assert process.process.wait(45) == 0
            stop.set()
            # Each caller meets a server that is gone after its last answer, and nothing else.
            for failures in (one.result(30) for one in asking):
                assert [type(error).__name__ for error in failures] in ([], ["UnavailableError"])
    finally:
        process.kill()


def test_the_second_signal_ends_the_process_at_once(filled: Path) -> None:
    process = Search(filled, "--grace-s", "60").start()
    try:
        with grpc.insecure_channel(process.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=60
            )
            assert next(watch).status == SERVING
            half_read = ball(channel)
            next(half_read)
            process.process.send_signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            with pytest.raises(subprocess.TimeoutExpired):
                process.process.wait(1.0)  # The reader is waited for.
            process.process.send_signal(signal.SIGTERM)
            # Far from the grace's end.
            assert process.process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()


def test_a_reader_that_stands_still_is_cut_off_after_the_grace(filled: Path) -> None:
    process = Search(filled, "--grace-s", "1").start()
    try:
        with grpc.insecure_channel(process.target) as channel:
            half_read = ball(channel)
            next(half_read)
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(45) == 0
    finally:
        process.kill()


@dataclass(frozen=True)
class Ports:
    """A process with all of its ports."""

    process: Search
    health: str
    admin: str


@pytest.fixture(scope="module")
def ports(filled: Path) -> Iterator[Ports]:
    with held_addresses(2) as (health, admin):
        arguments = ("--health-listen", health, "--admin-listen", admin)
        with Search(filled, *arguments, "--method-limits", "StreamBall=2") as process:
            yield Ports(process, health, admin)


def test_limits_refuse_over_the_wire_with_a_time_to_come_back(ports: Ports) -> None:
    process = ports.process
    with grpc.insecure_channel(process.target) as channel, Client(process.target, NOBODY) as client:
        held = [ball(channel), ball(channel)]
        for one in held:
            next(one)
        for _ in range(40):
            with pytest.raises(grpc.RpcError) as caught:
                next(ball(channel))
            error = error_of_call(caught.value)
            assert isinstance(error, OverloadedError)
            assert error.retry_after_s > 0
        assert client.search(SPEC.name, id="000001", k=1).hits[0].id == "000001"
        assert check(process.target) == SERVING
        held[0].cancel()  # type: ignore[attr-defined]

        def has_room() -> bool:
            try:
                next(ball(channel))
            except grpc.RpcError:
                return False
            return True

        wait_until(has_room, within_s=30, what="a place is given back")
        held[1].cancel()  # type: ignore[attr-defined]
        log = process.log.read_text()
        assert 1 <= log.count("OverloadedError after") < 40, "they are not logged one by one"


def test_a_limit_of_an_unknown_method_does_not_start(tmp_path: Path) -> None:
    process = Search(tmp_path, "--method-limits", "Serch=3")
    with pytest.raises(AssertionError, match="did not start"):
        process.start()
    assert "no method Serch" in process.log.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method_limits": "Search=0"}, "at least 1"),
        ({"admin_listen": "0.0.0.0:7001"}, "loopback"),
        ({"health_listen": "nowhere"}, "host:port"),
        ({"max_bytes_in_flight": 1000}, "must hold one message"),
        ({"max_request_s": 0}, "above 0"),
    ],
)
def test_wrong_settings_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        ServerConfig(**changes)
    ServerConfig(admin_listen="[::1]:1", health_listen="0.0.0.0:1")


def test_health_has_names_and_a_port_and_channelz_is_for_operators(ports: Ports) -> None:
    for target in (ports.process.target, ports.health, ports.admin):
        for name in ("", LIVENESS, READINESS, "hashlens.v1.SearchService"):
            assert check(target, name) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(target, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(ports.health) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            spb_grpc.SearchServiceStub(channel).ListCollections(
                spb.ListCollectionsRequest(), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert _answered(ports.admin) > 0
    with grpc.insecure_channel(ports.process.target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channelz_pb2_grpc.ChannelzStub(channel).GetServers(
                channelz_pb2.GetServersRequest(), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    target = ports.process.target
    arguments = ["health", "--search", target, "--encoder", target, "-v", "--json"]
    answer = CliRunner().invoke(main, arguments)
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["services"][1]["ready"]


def test_without_redis_a_replica_is_ready_and_says_so(tmp_path: Path) -> None:
    redis = RedisServer(server_binaries()[0]).start()
    try:
        with (
            Search(tmp_path / "a", "--redis-url", redis.url) as process,
            Client(process.target, NOBODY) as client,
        ):
            fill(process.target, 100)
            # Health looks once a second: perhaps before the new collection had found its log.
            wait_until(
                lambda: client.health()[1].reasons == (), within_s=30, what="there is no trouble"
            )
            redis.stop()

            def says_so() -> bool:
                return any("Redis is away" in reason for reason in client.health()[1].reasons)

            wait_until(says_so, within_s=60, what="the reason is told")
            state = client.health()[1]
            assert (state.serving, state.ready, state.live) == (True, True, True)
            assert client.search(SPEC.name, id="000001", k=1).hits[0].id == "000001"
            arguments = ["health", "--search", process.target, "--encoder", process.target, "-v"]
            assert "Redis is away" in " ".join(CliRunner().invoke(main, arguments).stdout.split())
    finally:
        redis.stop()


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    """Of two processes: each its own, and its operator's."""
    with held_addresses(4) as held:
        yield held


@pytest.mark.slow
def test_replicas_are_restarted_one_after_the_other_and_no_call_fails(
    tmp_path: Path, addresses: list[str]
) -> None:
    redis = RedisServer(server_binaries()[0]).start()
    processes: list[Search] = []
    admins: list[str] = []
    try:
        common = ("--redis-url", redis.url, "--max-connection-age-s", "2", "--grace-s", "5")
        for i, name in enumerate("ab"):
            # The address has to be the same after the restart.
            address, admin = addresses[2 * i : 2 * i + 2]
            one = Search(tmp_path / name, "--listen", address, "--admin-listen", admin, *common)
            admins.append(admin)
            processes.append(one.start())
            if name == "a":
                fill(one.target, 2000)
        targets = "ipv4:" + ",".join(one.target for one in processes)
        stop = threading.Event()
        failures: list[HashlensError] = []
        n_answers = 0

        with Client(targets, NOBODY, config=ClientConfig(deadline_s=20)) as client:
            wait_until(
                lambda: all(_has_all(one.target) for one in processes), within_s=60, what="copied"
            )

            def ask(number: int) -> None:
                nonlocal n_answers
                query = embeddings(1, number)[0]
                while not stop.is_set():
                    try:
                        assert len(client.search(SPEC.name, embedding=query, k=10).hits) == 10
                        n_answers += 1
                    except HashlensError as error:
                        failures.append(error)

            with ThreadPoolExecutor(4) as callers:
                asking = [callers.submit(ask, number) for number in range(4)]
                for one, admin in zip(processes, admins, strict=True):
                    time.sleep(1)
                    assert one.stop() == 0
                    time.sleep(0.5)
                    one.start()
                    wait_until(
                        lambda admin=admin: _answered(admin) > 10,
                        within_s=60,
                        what="the new process gets traffic",
                    )
                stop.set()
                for each in asking:
                    each.result(60)
        assert failures == []
        assert n_answers > 50
    finally:
        for one in processes:
            one.kill()
        redis.stop()


def _has_all(target: str) -> bool:
    with Client(target, NOBODY) as client:
        try:
            return client.collection(SPEC.name).n_items == 2000
        except HashlensError:
            return False


def _answered(admin: str) -> int:
    """Return how many calls the busiest server of a process has taken: not the admin one."""
    with grpc.insecure_channel(admin) as channel:
        servers = channelz_pb2_grpc.ChannelzStub(channel).GetServers(
            channelz_pb2.GetServersRequest(), timeout=10
        )
    return max(server.data.calls_started for server in servers.server)
