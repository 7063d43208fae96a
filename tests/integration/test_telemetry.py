"""What is known of calls: counted, named, traced, logged; through both services."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from hashlens import Client, Item
from hashlens.errors import NotFoundError
from hashlens.rpc import call
from hashlens.rpc.otlp import Spans
from hashlens.rpc.trace import TraceContext, new_trace
from hashlens.types import Query
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.support.observed import Observed, ObservedProcess, value
from tests.support.services import wait_until


@pytest.fixture(scope="module")
def client(observed: Observed, images: list[bytes]) -> Iterator[Client]:
    with Client(observed.search.target, observed.encoder.target) as made:
        made.create_collection("seen")
        made.upsert("seen", [Item(f"{i}", image=images[i]) for i in range(20)])
        yield made


@pytest.fixture(scope="module")
def encode(observed: Observed) -> Iterator[Any]:
    """Encode, as gRPC has it."""
    with grpc.insecure_channel(observed.encoder.target) as channel:
        yield enc_grpc.EncoderServiceStub(channel).Encode


@pytest.fixture(scope="module")
def ask(observed: Observed, client: Client) -> Iterator[Any]:
    """Search, as gRPC has it."""
    with grpc.insecure_channel(observed.search.target) as channel:
        yield spb_grpc.SearchServiceStub(channel).Search


def grown(process: ObservedProcess, work: Callable[[], None]) -> Callable[..., float]:
    """Return by how much a counter has grown while `work` ran."""
    before = process.scrape()
    work()
    after = process.scrape()
    return lambda name, **labels: value(after, name, **labels) - value(before, name, **labels)


def by_image(image: bytes) -> spb.SearchRequest:
    options = spb.SearchOptions(k=3)
    return spb.SearchRequest(collection="seen", query=spb.Query(image=image), options=options)


def test_calls_are_counted_by_method_and_status(
    observed: Observed, client: Client, encode: Any, images: list[bytes]
) -> None:
    def work() -> None:
        for i in range(3):
            encode(enc.EncodeRequest(image=images[i]), timeout=20)
        with pytest.raises(grpc.RpcError):
            encode(enc.EncodeRequest(image=b"no image"), timeout=20)
        client.encode_batch([*images[:4], b"nor this"])

    growth = grown(observed.encoder, work)
    method = "EncoderService/Encode"
    assert growth("hashlens_rpc_calls_total", method=method, code="OK") == 3
    assert growth("hashlens_rpc_calls_total", method=method, code="INVALID_ARGUMENT") == 1
    assert growth("hashlens_rpc_refusals_total", method=method, reason="invalid_input") == 1
    assert growth("hashlens_rpc_seconds_count", method=method) == 4
    assert growth("hashlens_encoder_images_total", outcome="ok") == 7
    assert growth("hashlens_encoder_images_total", outcome="invalid_input") == 2
    for stage in ("decode", "queue", "inference"):
        assert growth("hashlens_encoder_stage_seconds_count", stage=stage) == 7
    assert growth("hashlens_encoder_batch_images_count") == 7
    samples = observed.encoder.scrape()
    assert value(samples, "hashlens_rpc_in_flight", method=method) == 0
    # Of one name, so that a query can divide the one by the other.
    assert value(samples, "hashlens_rpc_limit", method=method) == 256
    assert value(samples, "hashlens_encoder_admitted_images") == 0


def test_queries_are_counted_however_they_come(
    observed: Observed, client: Client, images: list[bytes]
) -> None:
    def work() -> None:
        client.search("seen", image=images[0], k=3)
        client.search("seen", id="1", k=3)
        queries = [
            Query(embedding=client.encode(images[2]).embedding),
            Query(id="2"),
            Query(id="nobody"),
        ]
        results = client.search_batch("seen", queries, k=3)
        assert [isinstance(result, NotFoundError) for result in results] == [False, False, True]
        list(client.stream_ball("seen", id="3", radius_bits=48))
        client.audit("seen", id="4", k=3)

    growth = grown(observed.search, work)
    # An audit's answer is one query, whatever else it does.
    assert growth("hashlens_search_queries_total", outcome="ok") == 6
    assert growth("hashlens_search_queries_total", outcome="not_found") == 1
    assert growth("hashlens_search_rows_scanned_total") >= 5 * 20
    assert growth("hashlens_search_pool_rows_count") == 5
    assert growth("hashlens_search_stage_seconds_count", stage="coarse") == 5
    assert growth("hashlens_search_stage_seconds_count", stage="encode_call") == 1
    assert growth("hashlens_rpc_calls_total", method="SearchService/StreamBall", code="OK") == 1


def test_strangers_make_up_no_labels(observed: Observed, encode: Any) -> None:
    names = ["/no.Such/Method", "/hashlens.v1.EncoderService/Nothing", "/" + "x" * 500, "/a/b/c"]

    def work() -> None:
        with grpc.insecure_channel(observed.encoder.target) as channel:
            for name in names:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(name)(b"", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    growth = grown(observed.encoder, work)
    assert growth("hashlens_rpc_calls_total", method="other", code="UNIMPLEMENTED") == len(names)
    samples = observed.encoder.scrape()
    methods = {v for _, labels in samples for k, v in labels if k == "method"}
    assert methods == {
        *(f"EncoderService/{m}" for m in ("Encode", "EncodeBatch", "EncodeStream", "GetModel")),
        *("Health/Check", "Health/Watch", "other"),
    }
    assert value(samples, "hashlens_rpc_in_flight", method="other") == 0


def test_who_leaves_and_who_is_late_are_told_apart(
    observed: Observed, encode: Any, images: list[bytes]
) -> None:
    many = enc.EncodeBatchRequest(images=images[:200])
    method = "EncoderService/EncodeBatch"
    with grpc.insecure_channel(observed.encoder.target) as channel:
        batch = enc_grpc.EncoderServiceStub(channel).EncodeBatch
        batch(enc.EncodeBatchRequest(images=images[:1]), timeout=20)
        for name, end in (
            ("CANCELLED", lambda _: _left(batch.future(many, timeout=60), observed, method)),
            ("DEADLINE_EXCEEDED", lambda turn: _late(batch, many, 0.05 + 0.02 * turn)),
        ):
            before = observed.encoder.scrape()

            def counted(name: str = name, before: Any = before) -> bool:
                """Whether what was done since has ended, and one call of it in the way meant."""
                key = {"method": method, "code": name}
                wait_until(
                    lambda: (
                        value(observed.encoder.scrape(), "hashlens_rpc_in_flight", method=method)
                        == 0
                    ),
                    within_s=60,
                    what="the call has ended",
                )
                now = observed.encoder.scrape()
                return value(now, "hashlens_rpc_calls_total", **key) > value(
                    before, "hashlens_rpc_calls_total", **key
                )

            # A call may be over before we leave or are late, or begin only after that.
            for turn in range(20):
                end(turn)
                if counted():
                    break
            assert counted(), name


def _left(future: Any, observed: Observed, method: str) -> None:
    wait_until(
        lambda: (
            value(observed.encoder.scrape(), "hashlens_rpc_in_flight", method=method) == 1
            or future.done()
        ),
        within_s=60,
        what="the call has begun",
    )
    future.cancel()


def _late(batch: Any, many: enc.EncodeBatchRequest, deadline_s: float) -> None:
    try:
        batch(many, timeout=deadline_s)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017 - it may succeed


def id_of(done: Any) -> str:
    (found,) = [v for k, v in done.trailing_metadata() if k == "x-request-id"]
    return str(found)


def test_a_call_has_one_name_in_replies_and_both_logs(
    observed: Observed, ask: Any, images: list[bytes]
) -> None:
    place = new_trace()
    metadata = (("x-request-id", "a-call/1"), *place.headers())
    _, done = ask.with_call(by_image(images[1]), timeout=20, metadata=metadata)
    assert id_of(done) == "a-call/1"
    with pytest.raises(grpc.RpcError) as caught:
        ask(spb.SearchRequest(collection="nothing"), timeout=20, metadata=(metadata[0],))
    assert id_of(caught.value) == "a-call/1"
    for process, method in (
        (observed.search, "SearchService/Search"),
        (observed.encoder, "EncoderService/Encode"),
    ):
        line = next(line for line in process.lines() if line.get("request_id") == "a-call/1")
        assert line["logger"] == "hashlens.access"
        assert line["method"] == method
        assert line["trace_id"] == place.trace_id
        assert line["code"] == "OK"
        assert line["duration_ms"] > 0
        assert line["peer"].startswith("ipv4:127.0.0.1:")


@pytest.mark.parametrize("given", ["two words", "x" * 65, '{"a":1}'])
def test_a_name_that_is_none_is_replaced(encode: Any, images: list[bytes], given: str) -> None:
    request = enc.EncodeRequest(image=images[0])
    _, done = encode.with_call(request, timeout=20, metadata=(("x-request-id", given),))
    assert id_of(done) != given
    assert call.request_id_of(id_of(done)) == id_of(done)


def test_calls_at_the_same_time_keep_their_names(
    observed: Observed, ask: Any, images: list[bytes]
) -> None:
    def search(i: int) -> str:
        metadata = (
            ("x-request-id", f"together-{i}"),
            *TraceContext(f"{i + 1:032x}", "1" * 16).headers(),
        )
        _, done = ask.with_call(by_image(images[i]), timeout=60, metadata=metadata)
        return id_of(done)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(search, range(60))) == [f"together-{i}" for i in range(60)]
    for process in (observed.search, observed.encoder):
        found = {
            line["request_id"]: line["trace_id"]
            for line in process.lines()
            if line.get("request_id", "").startswith("together-")
        }
        assert found == {f"together-{i}": f"{i + 1:032x}" for i in range(60)}


def test_logs_are_objects_without_secrets_or_payloads(
    observed: Observed, client: Client, ask: Any, images: list[bytes]
) -> None:
    secrets = ("Bearer hunter2", "tell-nobody", "d0n't-l0g")
    item = Item("secretive", image=images[3], payload=secrets[1].encode(), tags=(secrets[2],))
    client.upsert("seen", [item])
    ask(by_image(images[3]), timeout=20, metadata=(("authorization", secrets[0]),))
    with pytest.raises(grpc.RpcError):
        ask(by_image(secrets[1].encode()), timeout=20, metadata=(("authorization", secrets[0]),))
    for process in (observed.search, observed.encoder):
        text = process.log.read_text()
        assert all(secret not in text for secret in secrets)
        lines = [json.loads(line) for line in text.splitlines()]
        assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
        assert not any(line.get("method", "").startswith("Health/") for line in lines)


def test_one_trace_from_client_to_encoder(
    observed: Observed, client: Client, images: list[bytes]
) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "a-program"}))
    exporter = OTLPSpanExporter(observed.collector.endpoint, insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("look for it") as span:
        trace_id = f"{span.get_span_context().trace_id:032x}"
        client.search("seen", image=images[5], k=3)
    provider.shutdown()
    wanted = {
        ("a-program", "look for it"): None,
        ("hashlens.v1.SearchService", "SearchService/Search"): "look for it",
        ("hashlens.v1.SearchService", "encode_call"): "SearchService/Search",
        ("hashlens.v1.SearchService", "coarse"): "SearchService/Search",
        ("hashlens.v1.SearchService", "fine"): "SearchService/Search",
        ("hashlens.v1.SearchService", "fetch"): "SearchService/Search",
        ("hashlens.v1.SearchService", "reply"): "SearchService/Search",
        ("hashlens.v1.EncoderService", "EncoderService/Encode"): "encode_call",
        ("hashlens.v1.EncoderService", "decode"): "EncoderService/Encode",
        ("hashlens.v1.EncoderService", "inference"): "EncoderService/Encode",
    }
    wait_until(
        lambda: wanted.keys() <= {(s, x.name) for s, x in observed.collector.spans(trace_id)},
        within_s=20,
        what=f"all spans in {observed.collector.spans(trace_id)}",
    )
    spans = observed.collector.spans(trace_id)
    by_id = {found.span_id: found for _, found in spans}
    parents = {
        (service, found.name): by_id[found.parent_span_id].name if found.parent_span_id else None
        for service, found in spans
    }
    assert {key: parents[key] for key in wanted} == wanted
    assert set(parents) - set(wanted) <= {
        ("hashlens.v1.SearchService", "queue"),
        ("hashlens.v1.EncoderService", "queue"),
    }
    for _, found in spans:
        assert found.start_time_unix_nano <= found.end_time_unix_nano
        if found.parent_span_id:
            parent = by_id[found.parent_span_id]
            # Wall clocks are read a moment apart from each other.
            slack_ns = 5_000_000
            assert found.start_time_unix_nano >= parent.start_time_unix_nano - slack_ns
            assert found.end_time_unix_nano <= parent.end_time_unix_nano + slack_ns
    served = next(x for _, x in spans if x.name == "SearchService/Search")
    assert served.kind == Span.SPAN_KIND_SERVER
    attributes = {a.key: a.value for a in served.attributes}
    assert attributes["rpc.method"].string_value == "Search"
    assert attributes["rpc.grpc.status_code"].int_value == 0
    names = {
        line["request_id"] for line in observed.search.lines() if line.get("trace_id") == trace_id
    }
    assert names == {attributes["hashlens.request_id"].string_value}


def test_what_the_caller_does_not_record_is_not_recorded(
    observed: Observed, ask: Any, images: list[bytes]
) -> None:
    silent, loud = TraceContext("a" * 32, "1" * 16, 0), TraceContext("b" * 32, "1" * 16, 1, "k=v")
    ask(by_image(images[6]), timeout=20, metadata=silent.headers())
    ask(by_image(images[6]), timeout=20, metadata=loud.headers())
    wait_until(
        lambda: (
            {name for name, _ in observed.collector.spans("b" * 32)}
            == {"hashlens.v1.SearchService", "hashlens.v1.EncoderService"}
        ),
        within_s=20,
        what="the loud one",
    )
    assert observed.collector.spans("a" * 32) == []
    assert {x.trace_state for _, x in observed.collector.spans("b" * 32)} == {"k=v"}


def test_a_share_of_the_traces_begun_here_is_recorded() -> None:
    spans = Spans("http://127.0.0.1:1", service="s", sample_ratio=0.25)
    n = sum(spans.begin("S/M", None).is_recording for _ in range(2000))
    assert 400 < n < 600
    spans.close()


def test_a_collector_that_is_away_costs_no_call_and_no_stop(tmp_path: Path) -> None:
    process = ObservedProcess(
        "search_service",
        tmp_path,
        *("--data-dir", str(tmp_path / "data"), "--encoder", "127.0.0.1:1"),
        *("--otlp-endpoint", "http://127.0.0.1:1"),
    )
    with process, Client(process.target, "127.0.0.1:1") as client:
        for _ in range(20):
            assert client.collections() == []
        began_s = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began_s < 15


@pytest.mark.parametrize(
    ("prelude", "endpoint", "words"),
    [
        ("sys.modules['opentelemetry'] = None", "http://127.0.0.1:1", "Install hashlens[otel]"),
        ("", "127.0.0.1:4317", "otlp_endpoint is http://"),
    ],
)
def test_spans_that_cannot_be_sent_stop_the_start(
    tmp_path: Path, prelude: str, endpoint: str, words: str
) -> None:
    program = f"import sys; {prelude or 'pass'}; from search_service.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--otlp-endpoint", endpoint, "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
