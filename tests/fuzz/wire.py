"""Noise against both services: raw bytes, broken HTTP/2, and every method with odd requests.

``python -m tests.fuzz.wire`` is what ``make fuzz`` runs; a short form is part of the tests. After
each attack the process is alive, its descriptors are closed and its memory is bounded; during it a
healthy caller gets the right answers; and no call was INTERNAL or UNKNOWN.
"""

from __future__ import annotations

import random
import re
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens import Client, CollectionSpec, Embedding, FeatureDtype, Item
from hashlens.client import ClientConfig
from hashlens.rpc.metrics_http import LONGEST_S
from tests.fuzz.images import healthy_encoder, patiently
from tests.fuzz.messages import Method, methods, requests
from tests.fuzz.noise import ATTACKS, Attack
from tests.fuzz.side_noise import HTTP_ATTACKS, TLS_ATTACKS
from tests.fuzz.usage import Peak, Repeated, settled_descriptors, usage
from tests.support.certificates import Authority
from tests.support.services import ServiceProcess

ENCODER = "hashlens.v1.EncoderService"
SEARCH = "hashlens.v1.SearchService"
REPLICA = "hashlens.v1.ReplicaService"

_DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)

_GROWTH_MB = 400.0
"""What one attack may cost at most: a few messages of the largest size."""

_SLACK_DESCRIPTORS = 8
"""Connections of the healthy caller, and files that a service opens by itself."""

_BESIDE = ("--health-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")

_CALL_S = 1.0


@dataclass(frozen=True)
class Victim:
    """A service under attack."""

    process: ServiceProcess
    services: tuple[str, ...]
    attacked: str
    """Path of the method that raw bytes go to."""
    healthy: Callable[[], None]
    """Makes a call and compares its answer; raises if that is wrong."""
    log: Path
    attacks: tuple[Attack, ...]
    """What its main port has to endure."""

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.process.pid

    @property
    def main(self) -> Side:
        """The port that is for everybody."""
        return Side("main", self.process.target, self.attacked, self.attacks, self.healthy)

    @property
    def beside(self) -> list[Side]:
        """The ports for health and metrics."""
        said = self.log.read_text(errors="replace")
        (health, *_) = re.findall(r"health on ([0-9.]+:\d+)", said)
        (metrics, *_) = re.findall(r"metrics on http://([0-9.]+:\d+)/", said)
        return [
            Side(
                "health", health, "/grpc.health.v1.Health/Check", ATTACKS, lambda: _serves(health)
            ),
            Side("metrics", metrics, "/metrics", HTTP_ATTACKS, lambda: _tells(metrics)),
        ]


@dataclass(frozen=True)
class Side:
    """One port of a service."""

    name: str
    target: str
    attacked: str
    """Path of what raw bytes go to."""
    attacks: tuple[Attack, ...]
    healthy: Callable[[], None]
    """Asks it, and raises if the answer is wrong."""


def start(stack: ExitStack, folder: Path, *arguments: str) -> tuple[Victim, Victim]:
    """Start an encoder and a search service with a collection, and a healthy caller of each."""
    logs = folder / "encoder.log", folder / "search.log"
    arguments += _BESIDE
    encoder = stack.enter_context(ServiceProcess("encoder_service", *arguments, log=logs[0]))
    data = stack.enter_context(TemporaryDirectory(prefix="hashlens-fuzz-"))
    options = ("--data-dir", data, "--encoder", encoder.target, *arguments)
    search = stack.enter_context(ServiceProcess("search_service", *options, log=logs[1]))
    encodes, searches = healthy_encoder(encoder.target), _healthy_search(stack, search.target)
    next(encodes)
    next(searches)
    encoded, found = f"/{ENCODER}/Encode", f"/{SEARCH}/Search"
    attacks = (*ATTACKS, *OWN_ATTACKS)
    return (
        Victim(encoder, (ENCODER,), encoded, lambda: next(encodes), logs[0], attacks),
        Victim(search, (SEARCH, REPLICA), found, lambda: next(searches), logs[1], attacks),
    )


def start_secured(stack: ExitStack, folder: Path, *arguments: str) -> Victim:
    """Start an encoder that speaks TLS, and a healthy caller."""
    log, authority = folder / "secured.log", Authority(folder)
    pair = authority.pair("server")
    tls = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key))
    process = ServiceProcess("encoder_service", *arguments, *tls, *_BESIDE, log=log)
    encoder = stack.enter_context(process)
    config = ClientConfig(security=authority.security())
    encodes = healthy_encoder(encoder.target, config)
    next(encodes)
    attacked = f"/{ENCODER}/Encode"
    return Victim(encoder, (ENCODER,), attacked, lambda: next(encodes), log, TLS_ATTACKS)


def _serves(target: str) -> None:
    """Ask a health port; raise if the service does not serve."""
    with grpc.insecure_channel(target) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="readiness"), timeout=30, wait_for_ready=True
        )
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def _tells(target: str) -> None:
    """Read the metrics, once there is a place; raise if there are none."""
    ends_s = time.monotonic() + LONGEST_S + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as reply:
                assert b"hashlens_build_info" in reply.read()
            return
        except OSError:
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.2)


def _healthy_search(stack: ExitStack, target: str) -> Iterator[None]:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((2_000, 256)).astype(np.float16)
    codes = rng.integers(0, 256, (2_000, 6), dtype=np.uint8)
    client = stack.enter_context(Client(target))
    for name in ("healthy", "fuzz"):
        spec = CollectionSpec(
            name=name, model_id="a", n_bits=48, dim=256, feature_dtype=FeatureDtype.F16
        )
        client.create_collection(name, spec=spec)
        items = [
            Item(id=f"{i}", embedding=Embedding(bytes(code), 48, "a", feature))
            for i, (code, feature) in enumerate(zip(codes, features, strict=True))
        ]
        client.upsert(name, items)
    first = [hit.id for hit in client.search("healthy", id="7", k=20).hits]
    assert first[0] == "7"
    while True:
        yield
        answer = patiently(lambda: client.search("healthy", id="7", k=20, deadline_s=30))
        assert [hit.id for hit in answer.hits] == first


def call_all(
    target: str, of: tuple[str, ...], seed: int, n: int, counts: Counter[str]
) -> list[str]:
    """Send requests to every method; return what is not OK or a typed refusal."""
    failures = []
    with grpc.insecure_channel(target, [("grpc.enable_retries", 0)]) as channel:
        for method in [method for service in of for method in methods(service)]:
            for i, data in enumerate(requests(method, seed, n)):
                code, said = _called(channel, method, data)
                counts[code.name] += 1
                if code in _DEFECTS:
                    failures.append(f"{method.path} {i} of seed {seed}: {code.name}: {said}")
    return failures


def _called(channel: grpc.Channel, method: Method, data: bytes) -> tuple[grpc.StatusCode, str]:
    many, out = method.descriptor.client_streaming, method.descriptor.server_streaming
    try:
        if many:
            for _ in channel.stream_stream(method.path)(iter([data, data]), timeout=_CALL_S):
                pass
        elif out:
            for _ in channel.unary_stream(method.path)(data, timeout=_CALL_S):
                pass
        else:
            channel.unary_unary(method.path)(data, timeout=_CALL_S)
    except grpc.RpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def large_metadata(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Send metadata through a well-behaved client; what is too much is refused as such."""
    with grpc.insecure_channel(target) as channel:
        for size in (100, 9_000, 100_000, 2_000_000):
            for key in ("x-many", "traceparent", "authorization", "x-request-id"):
                call = channel.unary_unary(path).future(
                    b"", metadata=((key, "v" * size),), timeout=60
                )
                assert call.code() not in _DEFECTS, (key, size, call.details())
                if size > 16_384:
                    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, call.code()


def balls_never_read(target: str, path: str, rng: random.Random, scale: float) -> None:
    """Ask for whole collections, begin to read, and stop."""
    if SEARCH not in path:
        return
    method = next(m for m in methods(SEARCH) if m.path.endswith("StreamBall"))
    ball = method.request()
    ball.collection, ball.radius_bits, ball.query.id = "healthy", 48, "7"  # type: ignore[attr-defined]
    request = ball.SerializeToString()
    with ExitStack() as stack:
        calls = []
        for _ in range(max(1, round(60 * scale))):
            channel = stack.enter_context(grpc.insecure_channel(target))
            call = channel.unary_stream(method.path)(request, timeout=60)
            next(call)
            calls.append(call)
        time.sleep(5 * scale)
        for call in calls:
            call.cancel()


OWN_ATTACKS: tuple[Attack, ...] = (large_metadata, balls_never_read)


def endure(victim: Victim, attack: Attack, seed: int, scale: float, at: Side | None = None) -> str:
    """Attack a port, the main one unless another is given; tell of it, or raise AssertionError."""
    at = at or victim.main
    name, before = attack.__name__, usage(victim.pid)
    began_s = time.monotonic()
    with Peak(victim.pid) as peak, Repeated(victim.healthy) as caller:
        rng = random.Random(f"{seed}/{name}")
        attack(at.target, at.attacked, rng, scale)
    took_s = time.monotonic() - began_s
    assert victim.process.process.poll() is None, f"{name} ended the process"
    allowed = before.n_descriptors + _SLACK_DESCRIPTORS
    left = settled_descriptors(victim.pid, allowed, within_s=60)
    assert left <= allowed, f"{name}: {left} descriptors, {before.n_descriptors} before"
    assert peak.grown_mb < _GROWTH_MB, f"{name}: {peak.grown_mb:.0f} MB"
    victim.healthy()
    at.healthy()
    return (
        f"{name:20} {took_s:5.1f} s, +{peak.grown_mb:4.0f} MB, {left:3} descriptors, "
        f"{caller.n:4} healthy calls, the slowest {caller.longest_s:.2f} s"
    )


def endure_requests(victim: Victim, seed: int, n: int) -> tuple[Counter[str], list[str], float]:
    """Send requests to every method beside a healthy caller; return codes, defects, MB grown."""
    counts: Counter[str] = Counter()
    with Peak(victim.pid) as peak, Repeated(victim.healthy):
        failures = call_all(victim.process.target, victim.services, seed, n, counts)
    victim.healthy()
    return counts, failures, peak.grown_mb


def tracebacks(victim: Victim) -> str:
    """Return what a service's log says of defects.

    gRPC itself writes one, rarely, when a caller goes away while it is told of an error.
    """
    text = victim.log.read_bytes().decode(errors="replace")
    for told in text.split("Traceback (most recent call last):")[1:]:
        raised = next((line for line in told.splitlines()[1:] if not line.startswith(" ")), "")
        if not raised.startswith("grpc._cython.cygrpc.ExecuteBatchError"):
            return told[:3_000]
    return ""


@click.command()
@click.option("--seed", default=1, show_default=True, help="Decides every attack.")
@click.option("--requests", "n_requests", default=300, show_default=True, help="To each method.")
@click.option("--scale", default=1.0, show_default=True, help="How much of each attack.")
@click.option("--rounds", default=2, show_default=True, help="How often all attacks are made.")
@click.option("--folder", type=Path, default=Path("build/fuzz"), show_default=True)
def main(seed: int, n_requests: int, scale: float, rounds: int, folder: Path) -> None:
    """Attack both services and see that they go on."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    failures: list[str] = []
    with ExitStack() as stack:
        plain = start(stack, folder)
        for victim in (*plain, start_secured(stack, folder)):
            print(f"{victim.log.stem} at {victim.process.target}: {usage(victim.pid)}", flush=True)
            for turn, at in product(range(rounds), (victim.main, *victim.beside)):
                for attack in at.attacks:
                    told = endure(victim, attack, seed + turn, scale, at)
                    print(f"  {at.name:8} {told}", flush=True)
                print(f"  after round {turn + 1}, {at.name}: {usage(victim.pid)}", flush=True)
            if victim in plain:
                counts, defects, grown_mb = endure_requests(victim, seed, n_requests)
                print(f"  requests: {dict(sorted(counts.items()))}, +{grown_mb:.0f} MB", flush=True)
                failures += defects
            if said := tracebacks(victim):
                failures.append(f"{victim.log}: {said}")
    for line in failures:
        print("FAILED", line)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
