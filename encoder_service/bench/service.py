"""The encoder service as a process, its answers and a load on it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from encoder_service.bench.bare import Answers
from encoder_service.bench.command import EncodeConfig
from hashlens import codes, convert, traffic
from hashlens.cli.bench import cpu_s
from hashlens.cli.child import POLL_S, ServiceProcess
from hashlens.cli.processes import START_DEADLINE_S
from hashlens.cli.text import console, printable
from hashlens.errors import DeadlineError, HashlensError, PreconditionError
from hashlens.rpc.limits import channel_options
from hashlens.traffic import Load, Loaded
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc

_ENCODE = "/hashlens.v1.EncoderService/Encode"
_CALL_S = 60.0
_WARMUP_S = 0.5

_BAND = 1e-4
"""Bits whose H is nearer to 0.5 may differ from the bare loop's, whose passes have other shapes."""

_FEATURE_ERROR = 2e-3
"""How far a feature may be from the bare loop's, by its size or 1: float16 rounds."""


class WrongAnswerError(HashlensError):
    """The service does not say what the bare loop says, so its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a load."""

    loaded: Loaded
    server_cpu_ms: float
    """CPU time of the server for an image."""
    client_cpu_ms: float
    """The same of the load generator."""


@contextmanager
def spawned() -> Iterator[ProcessPoolExecutor]:
    """Give a fresh process to run functions in."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@contextmanager
def serving(
    checkpoint: Path, config: EncodeConfig, *, max_batch: int, max_wait_ms: float
) -> Iterator[ServiceProcess]:
    """Run the encoder service while the block runs."""
    log = console(stderr=True)
    stopping = threading.Event()

    def show(name: str, line: str) -> None:
        # At its end, a library of torch's prints pages about itself.
        if not stopping.is_set():
            log.print(f"{name}  {printable(line)}")

    arguments = ["--listen", "127.0.0.1:0", "--checkpoint", str(checkpoint), "--device", "cpu"]
    arguments += ["--log-level", "warning", "--n-threads", str(config.threads)]
    arguments += ["--max-batch", str(max_batch), "--max-wait-ms", str(max_wait_ms)]
    arguments += ["--n-decode-threads", str(config.decode_threads)]
    process = ServiceProcess(
        "encoder",
        "encoder_service",
        arguments,
        {k: v for k, v in os.environ.items() if not k.startswith("HASHLENS_")},
        show,
    )
    try:
        ends_s = time.monotonic() + START_DEADLINE_S
        while not process.is_serving():
            if time.monotonic() > ends_s:
                raise DeadlineError(f"the encoder did not serve within {START_DEADLINE_S:g} s")
            time.sleep(POLL_S)
        yield process
    finally:
        stopping.set()
        process.terminate()
        process.finish(threading.Event())


def requests_of(images: Sequence[bytes]) -> list[bytes]:
    """Return images as requests, ready to send."""
    return [enc.EncodeRequest(image=image).SerializeToString() for image in images]


def apply(
    pool: ProcessPoolExecutor,
    server: ServiceProcess,
    requests: Sequence[bytes],
    *,
    callers: int,
    seconds: float,
) -> Applied:
    """Let callers send requests for so long, from another process.

    Raises
    ------
    WrongAnswerError
        A call failed.
    PreconditionError
        None came back in time.
    """
    assert server.address is not None
    load = Load(
        method=_ENCODE,
        target=server.address,
        requests=requests,
        seconds=seconds,
        warmup_s=_WARMUP_S,
        in_flight=callers,
    )
    before_s = cpu_s(server.pid)
    loaded = pool.submit(traffic.run, load).result()
    spent_s = cpu_s(server.pid) - before_s
    if loaded.n_failed:
        raise WrongAnswerError(f"{loaded.n_failed} calls of Encode failed")
    if not loaded.latencies_ms:
        raise PreconditionError(
            f"no image came back within {seconds:g} s: measure for longer, or a smaller model"
        )
    n = loaded.n_sent
    return Applied(loaded, spent_s / n * 1e3, loaded.cpu_s / n * 1e3)


def check(server: ServiceProcess, images: Sequence[bytes], wanted: Answers) -> int:
    """Compare the service's answers, alone and in a crowd, with the bare loop's.

    Returns
    -------
    int
        Bits that differ from the bare loop's, all of them with H within 1e-4 of 0.5.

    Raises
    ------
    WrongAnswerError
        One differs.
    """
    assert server.address is not None
    requests = [
        enc.EncodeRequest(image=image, options=enc.EncodeOptions(with_activations=True))
        for image in images
    ]
    with grpc.insecure_channel(server.address, channel_options()) as channel:
        stub = enc_grpc.EncoderServiceStub(channel)
        crowd = [stub.Encode.future(request, timeout=_CALL_S) for request in requests]
        together = [future.result().embedding for future in crowd]
        alone = [stub.Encode(request, timeout=_CALL_S).embedding for request in requests]
    if together != alone:
        raise WrongAnswerError("an image's embedding depends on who is encoded with it")
    found = [convert.embedding_from_proto(message) for message in alone]
    n_bits = wanted.activations.shape[1]
    packed = np.frombuffer(b"".join(one.code for one in found), np.uint8)
    bits = codes.unpack(packed.reshape(len(found), -1), n_bits)
    differ = bits != codes.unpack(wanted.codes, n_bits)
    if (differ & (np.abs(wanted.activations - 0.5) > _BAND)).any():
        raise WrongAnswerError("a code is not the bare loop's")
    features = np.array([one.feature for one in found], dtype=np.float32)
    error = np.abs(features - wanted.features)
    if (error > _FEATURE_ERROR * np.maximum(np.abs(wanted.features), 1)).any():
        raise WrongAnswerError("a feature is not the bare loop's")
    return int(differ.sum())
