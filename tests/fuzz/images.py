"""Spoiled images against the decoder and against a real encoder service.

``python -m tests.fuzz.images --cases 100000 --wire 10000`` is what ``make fuzz`` runs; a short form
is part of the tests. What is not OK or a typed refusal, crashes, takes too long or too much memory
is written to ``build/fuzz`` and ends the run with status 1; ``--seed N --only NUMBER`` makes it
again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import c_longlong
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import click
import grpc

from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from hashlens import Client
from hashlens.client import ClientConfig
from hashlens.errors import HashlensError, OverloadedError
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from tests.fuzz.bombs import bombs
from tests.fuzz.corpus import corpus
from tests.fuzz.mutations import Case, case
from tests.fuzz.usage import Peak, Repeated, peak_rss_mb, reset_peak, usage
from tests.support.services import ServiceProcess

LIMITS = DecodeLimits()

T = TypeVar("T")

_PATIENCE_S = 30.0

_BASE_CPU_S = 1.5
_CPU_S_PER_PIXEL = 1.2e-7
"""Of an image that is decoded. The slowest, a PNG of 16-bit colour with alpha, takes half of it."""

_BASE_MB = 64.0
_BYTES_PER_PIXEL = 18.0
_COPIES = 3.0
"""Of the file itself: what a parser keeps of it."""

_HANGS_S = 60.0

_TYPED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)


@dataclass
class Outcome:
    """What became of many images."""

    counts: Counter[str] = field(default_factory=Counter)
    by_base: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    """CPU time of the decoder, in seconds, and of what."""
    largest: tuple[float, str] = (0.0, "")
    """Memory that one image took, in MB, and which."""

    def add(self, other: Outcome) -> None:
        """Take another's results over."""
        self.counts += other.counts
        self.by_base += other.by_base
        self.failures += other.failures
        self.slowest = max(self.slowest, other.slowest)
        self.largest = max(self.largest, other.largest)


def keep(folder: Path, seed: int, spoiled: Case, why: str) -> str:
    """Write an image that failed, and how to make it again; return one line about it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"image-{seed}-{spoiled.number}"
    (folder / f"{name}.bin").write_bytes(spoiled.data)
    told = asdict(spoiled) | {"seed": seed, "why": why}
    del told["data"]
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1))
    return f"{name}: {spoiled.base}, {'+'.join(spoiled.steps)}: {why.splitlines()[-1]}"


def judge(spoiled: Case, outcome: Outcome, preprocessing: Preprocessing) -> str:
    """Decode one image, note what it took; return what is wrong, if anything is."""
    reset_peak()
    before_mb = usage().rss_mb
    began_s = time.thread_time()
    pixels = LIMITS.max_pixels
    try:
        image = decode(spoiled.data, LIMITS)
        preprocessing(image)
        pixels = image.width * image.height
        kind = "OK"
        del image
    except HashlensError as error:
        kind = type(error).__name__
        if not error.message.endswith((".", "accepted")) or len(error.message) > 400:
            return f"a poor message: {error.message!r}"
    except Exception:
        return traceback.format_exc()
    spent_s = time.thread_time() - began_s
    taken_mb = peak_rss_mb() - before_mb
    outcome.counts[kind] += 1
    outcome.by_base[f"{spoiled.base.split()[0]} {kind}"] += 1
    what = f"{spoiled.base} ({'+'.join(spoiled.steps)})"
    outcome.slowest = max(outcome.slowest, (round(spent_s, 3), what))
    outcome.largest = max(outcome.largest, (round(taken_mb, 1), what))
    if spent_s > _BASE_CPU_S + pixels * _CPU_S_PER_PIXEL:
        return f"took {spent_s:.1f} s"
    allowed_bytes = pixels * _BYTES_PER_PIXEL + len(spoiled.data) * _COPIES
    if taken_mb > _BASE_MB + allowed_bytes / 2**20:
        return f"took {taken_mb:.0f} MB"
    return ""


def _numbered(cases: range, seed: int) -> Iterator[Case]:
    files = corpus()
    for number in cases:
        yield case(seed, number, files)


def _work(cases: range, seed: int, folder: Path, at: c_longlong, result: Connection) -> None:
    """Judge some cases in a process of its own; `at` always says which it is at."""
    outcome = Outcome()
    preprocessing = Preprocessing()
    for spoiled in _numbered(cases, seed):
        at.value = spoiled.number
        why = judge(spoiled, outcome, preprocessing)
        if why:
            outcome.counts["failed"] += 1
            outcome.failures.append(keep(folder, seed, spoiled, why))
    result.send(outcome)


def decode_all(n_cases: int, seed: int, folder: Path, n_processes: int, first: int = 0) -> Outcome:
    """Judge cases in several processes; one that dies or hangs is a failure."""
    context = multiprocessing.get_context("spawn")  # Who calls may have threads.
    total = Outcome()
    workers = []
    for i in range(n_processes):
        cases = range(first + i, first + n_cases, n_processes)
        at = context.RawValue(c_longlong, -1)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(cases, seed, folder, at, sender))
        process.start()
        sender.close()
        workers.append((process, receiver, at))
    for process, receiver, at in workers:
        outcome = _awaited(process, receiver, at)
        if outcome is None:
            spoiled = case(seed, max(at.value, first), corpus())
            why = f"the decoder's process ended or hung: exit status {process.exitcode}"
            outcome = Outcome(failures=[keep(folder, seed, spoiled, why)])
            outcome.counts["crashed"] += 1
        total.add(outcome)
    return total


def _awaited(
    process: multiprocessing.process.BaseProcess, receiver: Connection, at: c_longlong
) -> Outcome | None:
    last, since_s = at.value, time.monotonic()
    while not receiver.poll(0.5):
        if at.value != last:
            last, since_s = at.value, time.monotonic()
        if not process.is_alive() or time.monotonic() - since_s > _HANGS_S:
            if receiver.poll(0):
                break
            process.kill()
            process.join()
            return None
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        process.join()
        return None
    process.join()
    return outcome


def decode_bombs(seed: int, folder: Path) -> Outcome:
    """Judge the bombs, one after another."""
    outcome = Outcome()
    preprocessing = Preprocessing()
    for number, (name, data) in enumerate(bombs()):
        spoiled = Case(number, name, ("bomb",), data)
        why = judge(spoiled, outcome, preprocessing)
        if why:
            outcome.counts["failed"] += 1
            outcome.failures.append(keep(folder / "bombs", seed, spoiled, why))
    return outcome


def over_the_wire(
    target: str, cases: range, seed: int, folder: Path, n_callers: int = 4
) -> Outcome:
    """Send cases to an encoder service, from several callers at a time, in each form there is."""
    outcome, lock = Outcome(), threading.Lock()
    files = corpus()

    def call(callers_cases: range) -> None:
        with grpc.insecure_channel(target) as channel:
            stub = enc_grpc.EncoderServiceStub(channel)
            for number in callers_cases:
                spoiled = case(seed, number, files)
                code, why = _sent(stub, spoiled.data, in_batch=number // n_callers % 3 == 0)
                with lock:
                    outcome.counts[code.name] += 1
                    if code not in _TYPED:
                        outcome.failures.append(keep(folder, seed, spoiled, f"{code.name}: {why}"))

    threads = [threading.Thread(target=call, args=(cases[i::n_callers],)) for i in range(n_callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _sent(
    stub: enc_grpc.EncoderServiceStub, image: bytes, *, in_batch: bool
) -> tuple[grpc.StatusCode, str]:
    try:
        if not in_batch:
            stub.Encode(enc.EncodeRequest(image=image), timeout=60)
            return grpc.StatusCode.OK, ""
        reply = stub.EncodeBatch(enc.EncodeBatchRequest(images=[image]), timeout=60)
        error = reply.results[0].error
        by_number = {code.value[0]: code for code in grpc.StatusCode}
        return by_number[error.code], error.message
    except grpc.RpcError as error:
        return error.code(), str(error.details())


def healthy_encoder(target: str, config: ClientConfig | None = None) -> Iterator[None]:
    """At each turn, have a whole picture encoded, and compare its code with the first."""
    picture = corpus()["png"]
    with Client(target, target, config=config) as client:
        first = client.encode(picture).embedding.code
        while True:
            yield
            encoded = patiently(lambda: client.encode(picture, deadline_s=_PATIENCE_S))
            assert encoded.embedding.code == first


def patiently(call: Callable[[], T]) -> T:
    """Make a call again when the server says so, as its callers are told to, for a while."""
    ends_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call()
        except OverloadedError as error:
            if time.monotonic() > ends_s:
                raise
            time.sleep(error.retry_after_s)


def attack(target: str, pid: int, cases: range, seed: int, folder: Path) -> tuple[Outcome, Peak]:
    """Send cases while a healthy caller goes on; its codes stay right."""
    healthy = healthy_encoder(target)
    next(healthy)
    with Peak(pid) as peak, Repeated(lambda: next(healthy)) as caller:
        outcome = over_the_wire(target, cases, seed, folder)
    outcome.counts["healthy calls"] = caller.n
    outcome.slowest = (round(caller.longest_s, 3), "a healthy call")
    return outcome, peak


def report(title: str, outcome: Outcome, took_s: float) -> None:
    """Print what became of the images."""
    print(f"{title}: {took_s:.0f} s")
    for kind, n in sorted(outcome.counts.items()):
        print(f"  {kind:24} {n:>9,}")
    print(f"  slowest {outcome.slowest[0]:.2f} s: {outcome.slowest[1]}")
    if outcome.largest[0]:
        print(f"  most memory {outcome.largest[0]:.0f} MB: {outcome.largest[1]}")
    for line in outcome.failures[:20]:
        print(f"  FAILED {line}")
    sys.stdout.flush()


@click.command()
@click.option("--seed", default=1, show_default=True, help="Decides every case.")
@click.option("--cases", default=100_000, show_default=True, help="Images for the decoder.")
@click.option("--wire", default=10_000, show_default=True, help="How many go to a service, too.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True)
@click.option("--only", type=int, help="One case, in this process.")
@click.option("--folder", type=Path, default=Path("build/fuzz"), show_default=True)
def main(seed: int, cases: int, wire: int, processes: int, only: int | None, folder: Path) -> None:
    """Spoil images and see that they are decoded or refused."""
    if only is not None:
        spoiled = case(seed, only, corpus())
        print(spoiled.base, spoiled.steps, f"{len(spoiled.data)} bytes")
        outcome = Outcome()
        print(judge(spoiled, outcome, Preprocessing()) or outcome)
        return
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    began_s = time.monotonic()
    outcome = decode_all(cases, seed, folder, processes)
    report(f"{cases:,} spoiled images, decoder", outcome, time.monotonic() - began_s)
    for name, n in sorted(outcome.by_base.items()):
        print(f"    {name:30} {n:>8,}")
    failures += outcome.failures

    began_s = time.monotonic()
    outcome = decode_bombs(seed, folder)
    report("bombs, decoder", outcome, time.monotonic() - began_s)
    failures += outcome.failures

    began_s = time.monotonic()
    with ServiceProcess("encoder_service", log=folder / "encoder.log") as service:
        pid = service.process.pid
        outcome, peak = attack(service.target, pid, range(wire), seed, folder)
        print(f"encoder service: {peak.before_mb:.0f} MB before, at most {peak.rss_mb:.0f} MB")
        report(f"{wire:,} spoiled images, service", outcome, time.monotonic() - began_s)
        assert service.process.poll() is None, "the service has ended"
    failures += outcome.failures
    log = (folder / "encoder.log").read_text()
    if "Traceback" in log:
        failures.append(f"the service logged a traceback, see {folder / 'encoder.log'}")
    for line in failures:
        print("FAILED", line)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
