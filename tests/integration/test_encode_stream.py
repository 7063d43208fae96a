"""EncodeStream over gRPC: order, status for each, a window, flow control, every kind of end."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from encoder_service.config import EncoderConfig
from hashlens import Client
from hashlens.errors import DeadlineError, InvalidInputError, UnavailableError
from hashlens.rpc.status import error_of, error_of_call
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from tests.support.services import ServiceProcess, wait_until
from tests.support.stream_server import InProcess, encoder_in_process

WINDOW = 6
IDLE_S = 2.5


def requests_of(images: list[bytes]) -> Iterator[enc.EncodeStreamRequest]:
    for i, image in enumerate(images):
        yield enc.EncodeStreamRequest(image=image, tag=1000 + i)


class Hose:
    """Requests that are asked for, and how many were."""

    def __init__(self, image: bytes, most: int = 10**6) -> None:
        self._image = image
        self._most = most
        self.n_taken = 0

    def __iter__(self) -> Iterator[enc.EncodeStreamRequest]:
        while self.n_taken < self._most:
            self.n_taken += 1
            yield enc.EncodeStreamRequest(image=self._image, tag=self.n_taken)


@pytest.fixture(scope="module")
def inside() -> Iterator[InProcess]:
    # A machine that stands still for seconds makes no stream of a test idle.
    config = EncoderConfig(max_stream_window=WINDOW, stream_idle_s=60.0, max_queue=256)
    with encoder_in_process(config) as server:
        yield server


@pytest.fixture
def impatient(inside: InProcess, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """The same, but that streams of this test end when they are idle for IDLE_S."""
    servicer = inside.servicer
    monkeypatch.setattr(servicer, "_config", replace(servicer._config, stream_idle_s=IDLE_S))
    return inside


@pytest.fixture
def stub(inside: InProcess) -> Iterator[enc_grpc.EncoderServiceStub]:
    with grpc.insecure_channel(inside.target) as channel:
        yield enc_grpc.EncoderServiceStub(channel)


def quiet(inside: InProcess) -> None:
    """Wait until nothing of a stream is left in the server."""
    wait_until(lambda: inside.n_admitted == 0, within_s=60, what="an idle pipeline")


def at_rest(inside: InProcess) -> int:
    """Wait until no task of a stream before is left; return how many tasks there are then."""
    n_tasks = inside.n_tasks_at_rest
    wait_until(lambda: inside.n_tasks <= n_tasks, within_s=60, what="no task of a stream is left")
    return n_tasks


def test_answers_keep_the_order_and_are_what_encode_says(
    encoder: ServiceProcess, client: Client, images: list[bytes]
) -> None:
    with grpc.insecure_channel(encoder.target) as channel:
        stub = enc_grpc.EncoderServiceStub(channel)
        replies = list(stub.EncodeStream(requests_of(images[:150]), timeout=60))
    assert [reply.tag for reply in replies] == list(range(1000, 1150))
    for i in (0, 1, 77, 149):
        alone = client.encode(images[i]).embedding
        embedding = replies[i].result.embedding
        assert embedding.code.bits == alone.code
        assert alone.feature is not None
        assert embedding.feature.values == alone.feature.tobytes()
    assert max(reply.result.timings.batch_items for reply in replies) > 8


def test_a_bad_image_fails_alone(stub: Any, images: list[bytes]) -> None:
    bad = {2: b"", 3: b"no image", 7: images[7][:200]}
    mixed = [bad.get(i, images[i]) for i in range(12)]
    replies = list(stub.EncodeStream(requests_of(mixed), timeout=60))
    assert [reply.tag for reply in replies] == list(range(1000, 1012))
    for i, reply in enumerate(replies):
        assert reply.result.HasField("error") == (i in bad)
        if i in bad:
            error = error_of(reply.result.error)
            assert isinstance(error, InvalidInputError)
            assert error.field == "image"


def test_options_hold_for_one_image(stub: Any, images: list[bytes]) -> None:
    options = [
        enc.EncodeOptions(omit_feature=True),
        enc.EncodeOptions(with_activations=True),
        enc.EncodeOptions(feature_dtype=99),  # type: ignore[arg-type]
    ]
    requests = [
        enc.EncodeStreamRequest(image=images[0], tag=i, options=one)
        for i, one in enumerate(options)
    ]
    plain, full, wrong = stub.EncodeStream(iter(requests), timeout=60)
    assert not plain.result.embedding.HasField("feature")
    assert full.result.embedding.HasField("activations")
    wrong_error = error_of(wrong.result.error)
    assert isinstance(wrong_error, InvalidInputError)
    assert wrong_error.field == "options.feature_dtype"


def test_an_empty_stream_is_fine(stub: Any) -> None:
    assert list(stub.EncodeStream(iter(()), timeout=20)) == []


def test_a_caller_that_waits_for_each_answer_gets_it(stub: Any, images: list[bytes]) -> None:
    pending: queue.SimpleQueue[enc.EncodeStreamRequest | None] = queue.SimpleQueue()
    call = stub.EncodeStream(iter(pending.get, None), timeout=60)
    for i in range(10):
        pending.put(enc.EncodeStreamRequest(image=images[i], tag=i))
        assert next(call).tag == i
    pending.put(None)
    assert next(call, None) is None


def test_no_more_than_the_window_is_in_the_works(
    inside: InProcess, stub: Any, images: list[bytes]
) -> None:
    seen = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.0005):
            seen.append(inside.n_admitted)

    looking = threading.Thread(target=look)
    looking.start()
    assert len(list(stub.EncodeStream(requests_of(images), timeout=60))) == len(images)
    is_over.set()
    looking.join()
    assert WINDOW // 2 < max(seen) <= WINDOW


def test_a_slow_reader_stops_the_writer(inside: InProcess, images: list[bytes]) -> None:
    # Else gRPC on the caller's side would take thousands of answers in before it stops us.
    small_window = [("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(inside.target, options=small_window) as channel:
        # And hundreds of requests, were they smaller.
        hose = Hose(images[0] + bytes(500_000), most=500)
        call = enc_grpc.EncoderServiceStub(channel).EncodeStream(iter(hose), timeout=120)
        assert next(call).tag == 1
        # Shorter than it takes to be cut off for not reading.
        wait_until(lambda: _stands_still(hose, 0.5), within_s=60, what="the writer stops")
        assert hose.n_taken < 450
        assert [reply.tag for reply in call] == list(range(2, 501))


def _stands_still(hose: Hose, seconds: float) -> bool:
    before = hose.n_taken
    time.sleep(seconds)
    return hose.n_taken == before


def test_a_caller_that_never_reads_is_cut_off(impatient: InProcess, images: list[bytes]) -> None:
    inside = impatient
    tasks = at_rest(inside)
    encoded = inside.n_encoded
    # Else gRPC on the caller's side would take thousands of answers in before it stops us.
    small_window = [("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(inside.target, options=small_window) as channel:
        stub = enc_grpc.EncoderServiceStub(channel)
        hose = Hose(images[0])
        call = stub.EncodeStream(iter(hose), timeout=60)
        # Not by its tasks: they come and go before it has begun.
        wait_until(lambda: inside.n_encoded > encoded, within_s=60, what="a stream under way")
        # One task is gRPC's own, which waits for the caller to take the status.
        wait_until(lambda: inside.n_tasks <= tasks + 1, within_s=60, what="the end of the stream")
        quiet(inside)
        replies: list[enc.EncodeStreamResponse] = []
        with pytest.raises(grpc.RpcError) as failure:
            replies.extend(call)
        assert isinstance(error_of_call(failure.value), UnavailableError)
        assert f"no answer was read for {IDLE_S} s" in str(failure.value.details())
        # What was on its way, it still gets.
        assert [reply.tag for reply in replies] == list(range(1, len(replies) + 1))


def test_an_idle_stream_ends(impatient: InProcess, stub: Any, images: list[bytes]) -> None:
    pending: queue.SimpleQueue[enc.EncodeStreamRequest | None] = queue.SimpleQueue()
    call = stub.EncodeStream(iter(pending.get, None), timeout=60)
    for i in range(9):
        time.sleep(0.3)  # Together longer than the limit, but there was something to do.
        began_s = time.monotonic()
        pending.put(enc.EncodeStreamRequest(image=images[i]))
        next(call)
    with pytest.raises(grpc.RpcError) as failure:
        next(call)
    pending.put(None)
    assert IDLE_S <= time.monotonic() - began_s < 60
    error = error_of_call(failure.value)
    assert isinstance(error, UnavailableError)
    assert f"nothing was sent for {IDLE_S} s" in error.message


def test_bytes_that_are_no_message_are_refused_in_mid_stream(
    inside: InProcess, images: list[bytes]
) -> None:
    good = enc.EncodeStreamRequest(image=images[0], tag=5).SerializeToString()
    with grpc.insecure_channel(inside.target) as channel:
        raw = channel.stream_stream("/hashlens.v1.EncoderService/EncodeStream")
        call = raw(iter([good, b"\xff\xff\xff", good]), timeout=20)
        assert enc.EncodeStreamResponse.FromString(next(call)).tag == 5
        with pytest.raises(grpc.RpcError) as failure:
            next(call)
    assert isinstance(error_of_call(failure.value), InvalidInputError)
    quiet(inside)


def test_a_caller_that_leaves_costs_nothing_more(
    inside: InProcess, stub: Any, images: list[bytes]
) -> None:
    tasks = at_rest(inside)
    calls = [stub.EncodeStream(iter(Hose(images[i])), timeout=60) for i in range(5)]
    for call in calls:
        next(call)
    while not inside.n_admitted:  # All that may be unread is.
        next(calls[0])
    for call in calls:
        call.cancel()
    quiet(inside)
    wait_until(lambda: inside.n_tasks <= tasks, within_s=60, what="no task of a stream is left")
    waiting = inside.pipeline._batcher._queue
    wait_until(lambda: not waiting or waiting[0].future.done(), within_s=60, what="a free queue")


def test_a_deadline_holds_for_the_whole_stream(
    inside: InProcess, stub: Any, images: list[bytes]
) -> None:
    for timeout_s in (1.5, 6.0, 30.0):  # A busy machine may take longer for the first answer.
        began_s = time.monotonic()
        call = stub.EncodeStream(iter(Hose(images[0])), timeout=timeout_s)
        replies: list[enc.EncodeStreamResponse] = []
        with pytest.raises(grpc.RpcError) as failure:
            replies.extend(call)
        assert isinstance(error_of_call(failure.value), DeadlineError)
        assert 0.5 * timeout_s < time.monotonic() - began_s < timeout_s + 30
        if replies:
            break
    assert replies
    quiet(inside)


def test_a_full_pipeline_is_waited_for(images: list[bytes]) -> None:
    config = EncoderConfig(max_queue=4, max_batch_items=4, max_batch=2, max_stream_window=16)
    with (
        encoder_in_process(config) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = enc_grpc.EncoderServiceStub(channel)
        replies = list(stub.EncodeStream(requests_of(images[:60]), timeout=60))
        assert [reply.tag for reply in replies] == list(range(1000, 1060))
        assert all(reply.result.HasField("embedding") for reply in replies)


def test_a_full_pipeline_is_waited_for_until_the_item_is_over_time(images: list[bytes]) -> None:
    config = EncoderConfig(max_queue=4, max_batch_items=4, default_deadline_s=0.5)
    with (
        encoder_in_process(config) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        server.pipeline._n_admitted += 4  # As if others had taken all there is.
        stub = enc_grpc.EncoderServiceStub(channel)
        (reply,) = stub.EncodeStream(requests_of(images[:1]))
        assert isinstance(error_of(reply.result.error), DeadlineError)
        server.pipeline._n_admitted -= 4


def rss_mb(process: ServiceProcess) -> float:
    pages = int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_caller_does(images: list[bytes], tmp_path: Path) -> None:
    """A writer that never reads, and one of images as large as they may be."""
    largest = images[1] + bytes((20 << 20) - len(images[1]))
    with (
        ServiceProcess("encoder_service", log=tmp_path / "log") as server,
        grpc.insecure_channel(
            server.target, options=[("grpc.max_send_message_length", 64 << 20)]
        ) as channel,
    ):
        stub = enc_grpc.EncoderServiceStub(channel)
        list(stub.EncodeStream(requests_of(images), timeout=60))  # What it takes anyway.
        before_mb = rss_mb(server)
        unread = stub.EncodeStream(iter(Hose(images[1] + bytes(300_000))), timeout=60)
        time.sleep(4)
        assert rss_mb(server) - before_mb < 200
        unread.cancel()
        call = stub.EncodeStream(iter(Hose(largest)), timeout=120)
        peaks_mb = [max(rss_mb(server) for _ in range(10) if next(call)) for _ in range(3)]
        call.cancel()
        # 600 MB have passed: a few images at a time, each in a few copies.
        assert peaks_mb[-1] - before_mb < 500
        assert peaks_mb[-1] - peaks_mb[1] < 100  # The first ones may be on the way up.
        # Others are served.
        assert len(list(stub.EncodeStream(requests_of(images[:5]), timeout=60))) == 5


def test_a_server_that_stops_answers_what_it_has_read(images: list[bytes], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ServiceProcess("encoder_service", "--grace-s", "100", log=log) as server:
        with grpc.insecure_channel(server.target) as channel:
            stub = enc_grpc.EncoderServiceStub(channel)
            call = stub.EncodeStream(iter(Hose(images[3])), timeout=60)
            replies = [next(call)]
            server.process.terminate()
            with pytest.raises(grpc.RpcError) as failure:
                replies.extend(call)
            assert isinstance(error_of_call(failure.value), UnavailableError)
            assert "is stopping" in str(failure.value.details())
            assert server.process.wait(80) == 0  # Long before its grace is over.
        assert [reply.tag for reply in replies] == list(range(1, len(replies) + 1))
        assert len({reply.result.embedding.code.bits for reply in replies}) == 1
        assert np.all([reply.result.HasField("embedding") for reply in replies])
    assert "Traceback" not in log.read_text()
