"""What bad input gets over gRPC: a status, the field's path, advice; and the service goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from hashlens import Client, CollectionSpec, Item, Query, SearchOptions, convert
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.rpc.status import error_of_call
from hashlens.types import Embedding
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.integration.conftest import SearchProcess
from tests.support.services import ServiceProcess

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def embedding(
    encoder: ServiceProcess, search: SearchProcess, images: list[bytes]
) -> Iterator[Embedding]:
    with Client(search.target, encoder.target) as client:
        found = client.encode(images[0], with_activations=True).embedding
        client.create_collection("photos", expected_rows=100)
        client.upsert("photos", [Item(id="a", embedding=found)])
        client.collection("photos")  # Others see it now.
        yield found
        # After everything below, the service still answers.
        assert client.search("photos", embedding=found).hits[0].id == "a"


@pytest.fixture
def search_stub(search: SearchProcess) -> Iterator[spb_grpc.SearchServiceStub]:
    with grpc.insecure_channel(search.target) as channel:
        yield spb_grpc.SearchServiceStub(channel)


@pytest.fixture
def encoder_stub(encoder: ServiceProcess) -> Iterator[enc_grpc.EncoderServiceStub]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(encoder.target, options) as channel:
        yield enc_grpc.EncoderServiceStub(channel)


def refusal(call: Callable[..., Message], request: Message) -> tuple[grpc.StatusCode, str, str]:
    """Return the code, the field's path and the message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    error = error_of_call(caught.value)
    return caught.value.code(), getattr(error, "field", ""), error.message


def spoiled(embedding: Embedding, how: str) -> spb.Query:
    message = convert.query_to_proto(Query(embedding=embedding))
    feature, code = message.embedding.feature, message.embedding.code
    if how == "code too short":
        code.bits = code.bits[:-1]
    elif how == "padding":
        code.n_bits = 45
        code.bits = b"\xff" * 6
    elif how == "other width":
        code.n_bits, code.bits = 64, bytes(8)
        message.embedding.ClearField("activations")
    elif how == "other dim":
        feature.dim, feature.values = 3, bytes(6)
    elif how == "other dtype":
        feature.dtype, feature.values = 1, bytes(4 * feature.dim)
    elif how == "nan":
        values = np.frombuffer(feature.values, dtype="<f2").copy()
        values[5] = np.nan
        feature.values = values.tobytes()
    elif how == "no feature":
        message.embedding.ClearField("feature")
    elif how == "other model":
        message.embedding.model_id = "another"
    elif how == "no code":
        message.embedding.ClearField("code")
    return message


CASES = [
    ("code too short", Code.INVALID_ARGUMENT, "code.bits"),
    ("padding", Code.INVALID_ARGUMENT, "code.bits"),
    ("no code", Code.INVALID_ARGUMENT, "code"),
    ("other width", Code.FAILED_PRECONDITION, "code.n_bits"),
    ("other dim", Code.FAILED_PRECONDITION, "feature.dim"),
    ("other dtype", Code.INVALID_ARGUMENT, "feature.dtype"),
    ("nan", Code.INVALID_ARGUMENT, "feature.values"),
    ("no feature", Code.INVALID_ARGUMENT, "feature"),
    ("other model", Code.FAILED_PRECONDITION, "model_id"),
]


@pytest.mark.parametrize(("how", "code", "field"), CASES, ids=[case[0] for case in CASES])
def test_bad_embeddings(
    search_stub: spb_grpc.SearchServiceStub,
    embedding: Embedding,
    how: str,
    code: grpc.StatusCode,
    field: str,
) -> None:
    query = spoiled(embedding, how)
    request = spb.SearchRequest(collection="photos", query=query, options=spb.SearchOptions(k=1))
    got = refusal(search_stub.Search, request)
    assert got[:2] == (code, f"query.embedding.{field}")
    assert len(got[2]) > 20

    good = spb.Item(id="b", embedding=convert.embedding_to_proto(embedding))
    bad = spb.Item(id="c", embedding=query.embedding)
    upsert = spb.UpsertRequest(collection="photos", items=[good, bad])
    assert refusal(search_stub.Upsert, upsert)[:2] == (code, f"items[1].embedding.{field}")
    found = search_stub.GetItems(spb.GetItemsRequest(collection="photos", ids=["b"]), timeout=20)
    assert not found.items, "a refused call writes nothing"

    batch = search_stub.SearchBatch(
        spb.SearchBatchRequest(
            collection="photos",
            queries=[spb.Query(id="a"), query],
            options=spb.SearchOptions(k=1),
        ),
        timeout=20,
    )
    assert batch.results[0].answer.hits[0].id == "a"
    assert batch.results[1].error.code == code.value[0]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (spb.SearchOptions(), "options.k"),
        (spb.SearchOptions(k=100_001), "options.k"),
        (spb.SearchOptions(k=1, max_hamming_bits=49), "options.max_hamming_bits"),
        (spb.SearchOptions(k=2, max_pool=1), "options.max_pool"),
    ],
    ids=["k = 0", "k too large", "threshold above n_bits", "max_pool below k"],
)
def test_bad_options(
    search_stub: spb_grpc.SearchServiceStub,
    embedding: Embedding,
    options: spb.SearchOptions,
    field: str,
) -> None:
    request = spb.SearchRequest(collection="photos", query=spb.Query(id="a"), options=options)
    assert refusal(search_stub.Search, request)[:2] == (Code.INVALID_ARGUMENT, field)


@pytest.mark.parametrize(
    ("method", "request_message", "code", "field"),
    [
        ("GetCollection", spb.GetCollectionRequest(name="nobody"), Code.NOT_FOUND, ""),
        ("GetCollection", spb.GetCollectionRequest(name="../etc"), Code.INVALID_ARGUMENT, "name"),
        ("DropCollection", spb.DropCollectionRequest(name="nobody"), Code.NOT_FOUND, ""),
        ("Upsert", spb.UpsertRequest(collection="nobody"), Code.NOT_FOUND, ""),
        ("Delete", spb.DeleteRequest(collection="nobody", ids=["a"]), Code.NOT_FOUND, ""),
        ("GetItems", spb.GetItemsRequest(collection="nobody"), Code.NOT_FOUND, ""),
        (
            "Search",
            spb.SearchRequest(
                collection="photos", query=spb.Query(id="nobody"), options=spb.SearchOptions(k=1)
            ),
            Code.NOT_FOUND,
            "",
        ),
        (
            "Search",
            spb.SearchRequest(collection="photos", options=spb.SearchOptions(k=1)),
            Code.INVALID_ARGUMENT,
            "query",
        ),
        (
            "Search",
            spb.SearchRequest(
                collection="photos", query=spb.Query(image=b""), options=spb.SearchOptions(k=1)
            ),
            Code.INVALID_ARGUMENT,
            "query.image",
        ),
        (
            "Upsert",
            spb.UpsertRequest(collection="photos", items=[spb.Item(id="", image=b"x")]),
            Code.INVALID_ARGUMENT,
            "items[0].id",
        ),
        (
            "Upsert",
            spb.UpsertRequest(collection="photos", items=[spb.Item(id="x")]),
            Code.INVALID_ARGUMENT,
            "items[0].content",
        ),
        (
            "Upsert",
            spb.UpsertRequest(collection="photos", request_id="x" * 65),
            Code.INVALID_ARGUMENT,
            "request_id",
        ),
        (
            "CreateCollection",
            spb.CreateCollectionRequest(spec=spb.CollectionSpec(name="x", model_id="m")),
            Code.INVALID_ARGUMENT,
            "spec.n_bits",
        ),
        (
            "CreateCollection",
            spb.CreateCollectionRequest(
                spec=spb.CollectionSpec(name="photos", model_id="m", n_bits=8)
            ),
            Code.ALREADY_EXISTS,
            "",
        ),
        ("Audit", spb.AuditRequest(), Code.INVALID_ARGUMENT, "search.collection"),
        (
            "Audit",
            spb.AuditRequest(search=spb.SearchRequest(collection="photos")),
            Code.INVALID_ARGUMENT,
            "search.options.k",
        ),
        (
            "Audit",
            spb.AuditRequest(
                search=spb.SearchRequest(collection="photos", options=spb.SearchOptions(k=5))
            ),
            Code.INVALID_ARGUMENT,
            "search.query",
        ),
        ("Verify", spb.VerifyRequest(), Code.INVALID_ARGUMENT, "collection"),
        ("Verify", spb.VerifyRequest(collection="none"), Code.NOT_FOUND, ""),
        ("Compact", spb.CompactRequest(), Code.INVALID_ARGUMENT, "collection"),
        ("Compact", spb.CompactRequest(collection="none"), Code.NOT_FOUND, ""),
    ],
)
def test_bad_requests(
    search_stub: spb_grpc.SearchServiceStub,
    embedding: Embedding,
    method: str,
    request_message: Message,
    code: grpc.StatusCode,
    field: str,
) -> None:
    got = refusal(getattr(search_stub, method), request_message)
    assert got[:2] == (code, field), got
    assert got[2]


@pytest.mark.parametrize(
    "image",
    [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + bytes(1000)],
    ids=["empty", "text", "only magic", "broken jpeg"],
)
def test_bytes_that_are_no_image(encoder_stub: enc_grpc.EncoderServiceStub, image: bytes) -> None:
    got = refusal(encoder_stub.Encode, enc.EncodeRequest(image=image))
    assert got[:2] == (Code.INVALID_ARGUMENT, "image")


def test_truncated_and_oversize_images(
    encoder_stub: enc_grpc.EncoderServiceStub, client: Client, images: list[bytes]
) -> None:
    cut = enc.EncodeRequest(image=images[0][: len(images[0]) // 2])
    assert refusal(encoder_stub.Encode, cut)[:2] == (Code.INVALID_ARGUMENT, "image")
    model = client.model()
    large = enc.EncodeRequest(image=images[0] + bytes(model.max_image_bytes))
    assert refusal(encoder_stub.Encode, large)[:2] == (Code.INVALID_ARGUMENT, "image")


def test_too_many_images_in_one_batch(
    encoder_stub: enc_grpc.EncoderServiceStub, client: Client, images: list[bytes]
) -> None:
    n = client.model().max_batch_items + 1
    request = enc.EncodeBatchRequest(images=[images[0]] * n)
    assert refusal(encoder_stub.EncodeBatch, request)[:2] == (Code.INVALID_ARGUMENT, "images")


def test_the_client_refuses_an_oversize_request_before_sending(client: Client) -> None:
    with pytest.raises(InvalidInputError, match="above the limit"):
        client.encode(bytes(65 * 2**20))


def test_another_models_collection_refuses_images(
    client: Client, embedding: Embedding, images: list[bytes]
) -> None:
    spec = CollectionSpec(name="foreign", model_id="another", n_bits=48, dim=embedding.dim)
    client.create_collection("foreign", spec=spec)
    with pytest.raises(PreconditionError) as caught:
        client.search("foreign", image=images[0])
    assert caught.value.field == "query.image.model_id"


def test_bytes_that_are_no_message_are_refused_as_such(search: SearchProcess) -> None:
    with grpc.insecure_channel(search.target) as channel:
        call = channel.unary_unary("/hashlens.v1.SearchService/Search")
        for noise in (b"\x0a\x02\xff\xfe", b"\xff" * 40):
            with pytest.raises(grpc.RpcError) as caught:
                call(noise, timeout=20)
            assert caught.value.code() is Code.INVALID_ARGUMENT


def test_options_beyond_the_message_are_refused_by_the_client(
    client: Client, embedding: Embedding
) -> None:
    with pytest.raises(InvalidInputError):
        client.search("photos", embedding=embedding, options=SearchOptions(k=-1))
    with pytest.raises(InvalidInputError):
        client.search("photos", embedding=embedding, options=SearchOptions(min_pool=2**33))
