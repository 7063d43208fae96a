"""Both services over gRPC, with real pictures."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hashlens import (
    AsyncClient,
    Client,
    CollectionSpec,
    Embedding,
    FeatureDtype,
    Item,
    Query,
    Rank,
    SearchOptions,
    codes,
)
from hashlens.errors import HashlensError, InvalidInputError, NotFoundError
from hashlens.types import Encoded, Hit, SearchResult
from search_service.engine import Engine
from search_service.snapshot import Snapshot
from tests.integration.conftest import SearchProcess
from tests.support.services import ServiceProcess, wait_until

N = 200
"""How many pictures the shared collection holds; the rest of `images` are queries."""


def encoded(results: list[Encoded | HashlensError]) -> list[Embedding]:
    """Return the embeddings of a batch in which nothing may have failed."""
    good = [result for result in results if isinstance(result, Encoded)]
    assert len(good) == len(results)
    return [result.embedding for result in good]


@pytest.fixture(scope="module")
def embeddings(encoder: ServiceProcess, images: list[bytes]) -> list[Embedding]:
    with Client(encoder.target, encoder.target) as client:
        return encoded(client.encode_batch(images, with_activations=True))


@pytest.fixture(scope="module")
def photos(
    encoder: ServiceProcess, search: SearchProcess, embeddings: list[Embedding]
) -> tuple[str, int]:
    """A collection with N pictures: its name and version."""
    with Client(search.target, encoder.target) as client:
        client.create_collection("photos", expected_rows=1000)
        items = [
            Item(id=f"{i:03}", embedding=embeddings[i], payload=f"payload {i}".encode())
            for i in range(N)
        ]
        result = client.upsert("photos", items)
        assert (result.n_written, result.failures) == (N, ())
        assert result.version == N
        # This client reads its own writes; from here on, so does every other.
        client.search("photos", id="000")
        return "photos", result.version


def facts(hits: tuple[Hit, ...]) -> list[tuple[Any, ...]]:
    return [(hit.id, hit.hamming_bits, hit.distance, hit.payload) for hit in hits]


# -- encoder ---------------------------------------------------------------------------------------


def test_the_model_says_what_it_is(client: Client) -> None:
    model = client.model()
    assert (model.n_bits, model.backbone, len(model.classes)) == (48, "resnet9", 10)
    assert model.licence
    assert model.metrics
    assert model.max_message_bytes > model.max_image_bytes


def test_encoding_gives_code_feature_and_timings(client: Client, images: list[bytes]) -> None:
    model = client.model()
    answer = client.encode(images[0], feature_dtype=FeatureDtype.F32, with_activations=True)
    embedding, timings = answer.embedding, answer.timings
    assert embedding.model_id == model.model_id
    assert len(embedding.code) == codes.n_bytes(model.n_bits)
    assert embedding.feature is not None
    assert embedding.feature.dtype == np.float32
    assert embedding.dim == model.dim
    assert embedding.activations is not None
    assert codes.pack(embedding.activations > 0.5).tobytes() == embedding.code
    assert timings.decode_ns > 0
    assert timings.inference_ns > 0
    assert timings.total_ns >= timings.decode_ns + timings.queue_ns + timings.inference_ns


def test_neither_batch_nor_neighbours_change_an_embedding(
    client: Client, images: list[bytes], embeddings: list[Embedding]
) -> None:
    for i in (0, 7, 100):
        alone = client.encode(images[i], with_activations=True).embedding
        assert alone.code == embeddings[i].code
        assert np.array_equal(alone.feature, embeddings[i].feature)
        assert np.array_equal(alone.activations, embeddings[i].activations)


def test_a_bad_image_fails_alone_in_a_batch(client: Client, images: list[bytes]) -> None:
    results = client.encode_batch([images[0], b"no image", images[1][:200], images[2]])
    assert [isinstance(result, Encoded) for result in results] == [True, False, False, True]
    for i in (1, 2):
        error = results[i]
        assert isinstance(error, InvalidInputError)
        assert error.field == f"images[{i}]"


# -- search ----------------------------------------------------------------------------------------


def test_image_embedding_and_id_give_the_same_answer(
    client: Client, photos: tuple[str, int], images: list[bytes], embeddings: list[Embedding]
) -> None:
    name, version = photos
    for i in (0, 50, 199):
        by_id = client.search(name, id=f"{i:03}", k=20)
        by_embedding = client.search(name, embedding=embeddings[i], k=20)
        by_image = client.search(name, image=images[i], k=20)
        assert by_id.hits[0].id == f"{i:03}"
        assert by_id.hits[0].distance == 0
        assert by_id.hits[0].payload == f"payload {i}".encode()
        assert facts(by_id.hits) == facts(by_embedding.hits) == facts(by_image.hits)
        assert by_id.receipt.version == version
        timings = by_image.receipt.timings
        assert timings.encode.inference_ns > 0
        assert timings.coarse_ns > 0
        assert timings.fine_ns > 0
        assert timings.total_ns > timings.encode_call_ns > timings.encode.total_ns


def naive_answer(
    stored: list[Embedding], query: Embedding, options: SearchOptions
) -> list[tuple[str, int, float | None]]:
    """The two-stage definition, sentence by sentence; shares no code with the engine."""
    query_bits = int.from_bytes(query.code, "little")
    hamming = [(query_bits ^ int.from_bytes(e.code, "little")).bit_count() for e in stored]
    threshold = options.max_hamming_bits
    if threshold is None:
        wanted = min(max(options.k, options.min_pool), len(stored))
        threshold = sorted(hamming)[wanted - 1]
    rows = [row for row, bits in enumerate(hamming) if bits <= threshold]
    if options.rank is Rank.HAMMING:
        assert query.activations is not None
        weights = [round(510 * abs(float(h) - 0.5)) for h in query.activations]
        if options.ignore_margins:
            weights = [0] * query.n_bits

        def asymmetric(row: int) -> int:
            differing = query_bits ^ int.from_bytes(stored[row].code, "little")
            return sum(weight for i, weight in enumerate(weights) if differing >> i & 1)

        order = sorted((hamming[row], asymmetric(row), f"{row:03}") for row in rows)
        return [(item_id, bits, None) for bits, _, item_id in order[: options.k]]
    assert query.feature is not None
    q = query.feature.astype(np.float64)
    keyed = [
        (float(np.sqrt(((e.feature.astype(np.float64) - q) ** 2).sum())), hamming[row], f"{row:03}")
        for row in rows
        if (e := stored[row]).feature is not None
    ]
    return [(item_id, bits, d) for d, bits, item_id in sorted(keyed)[: options.k]]


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(k=10),
        SearchOptions(k=25, min_pool=0),
        SearchOptions(k=5, min_pool=60),
        SearchOptions(k=300, max_hamming_bits=6),
        SearchOptions(k=200, max_hamming_bits=48),
        SearchOptions(k=3, max_hamming_bits=0),
        SearchOptions(k=40, rank=Rank.HAMMING, min_pool=0),
        SearchOptions(k=40, rank=Rank.HAMMING, max_hamming_bits=10),
        SearchOptions(k=200, rank=Rank.HAMMING),
        SearchOptions(k=200, rank=Rank.HAMMING, ignore_margins=True),
    ],
    ids=repr,
)
def test_answers_over_grpc_are_those_of_the_definition_and_of_the_engine(
    client: Client,
    photos: tuple[str, int],
    embeddings: list[Embedding],
    options: SearchOptions,
) -> None:
    name, _ = photos
    stored = embeddings[:N]
    packed = np.frombuffer(b"".join(e.code for e in stored), dtype=np.uint8).reshape(N, -1)
    snapshot = Snapshot.from_arrays(
        packed,
        n_bits=48,
        features=np.stack([e.feature for e in stored if e.feature is not None]),
        ids=[f"{i:03}" for i in range(N)],
    )
    engine = Engine()
    for query in embeddings[N : N + 20]:
        over_grpc = client.search(name, embedding=query, options=options)
        local = engine.search(snapshot, query, options)
        plain = [(hit.id, hit.hamming_bits, hit.distance) for hit in over_grpc.hits]
        assert plain == [(hit.id, hit.hamming_bits, hit.distance) for hit in local.hits]
        naive = naive_answer(stored, query, options)
        assert [(i, b) for i, b, _ in plain] == [(i, b) for i, b, _ in naive]
        for (_, _, got), (_, _, expected) in zip(plain, naive, strict=True):
            assert got == (None if expected is None else pytest.approx(expected, rel=1e-5))
        receipt = over_grpc.receipt
        assert receipt.exact
        assert receipt.rows_scanned == N
        assert sum(receipt.pool_histogram) == receipt.pool_size
        assert len(receipt.pool_histogram) == receipt.threshold_bits + 1
        assert replace(receipt, version=0, timings=local.receipt.timings) == local.receipt


def test_a_batch_answers_like_single_queries_and_a_bad_one_fails_alone(
    client: Client, photos: tuple[str, int], images: list[bytes], embeddings: list[Embedding]
) -> None:
    name, _ = photos
    results = client.search_batch(
        name,
        [
            Query(id="007"),
            Query(id="nobody"),
            Query(embedding=embeddings[N]),
            Query(image=images[N]),
            Query(image=b"no image"),
        ],
        k=5,
    )
    first, unknown, by_embedding, by_image, broken = results
    assert isinstance(first, SearchResult)
    assert isinstance(by_embedding, SearchResult)
    assert isinstance(by_image, SearchResult)
    assert facts(first.hits) == facts(client.search(name, id="007", k=5).hits)
    assert facts(by_embedding.hits) == facts(by_image.hits)
    assert isinstance(unknown, NotFoundError)
    assert isinstance(broken, InvalidInputError)
    assert broken.field == "queries[4].image"


def test_max_pool_cuts_and_says_so(
    client: Client, photos: tuple[str, int], embeddings: list[Embedding]
) -> None:
    name, _ = photos
    options = SearchOptions(k=5, max_hamming_bits=48, max_pool=20)
    receipt = client.search(name, embedding=embeddings[N], options=options).receipt
    assert (receipt.pool_size, receipt.pool_truncated, receipt.exact) == (20, True, False)
    assert sum(receipt.pool_histogram) == N


def test_hits_carry_what_is_asked_for(
    client: Client, photos: tuple[str, int], embeddings: list[Embedding]
) -> None:
    name, _ = photos
    options = SearchOptions(
        k=3, with_payload=False, with_code=True, with_feature=True, with_explanation=True
    )
    query = embeddings[N]
    for hit in client.search(name, embedding=query, options=options).hits:
        row = int(hit.id)
        assert hit.payload == b""
        assert hit.code == embeddings[row].code
        assert np.array_equal(hit.feature, embeddings[row].feature)
        assert hit.explanation is not None
        assert len(hit.explanation.differing_bits) == hit.hamming_bits
        assert query.activations is not None
        sure = np.abs(query.activations - np.float32(0.5))
        assert list(hit.explanation.certainty) == [
            float(sure[bit]) for bit in hit.explanation.differing_bits
        ]


def test_by_image_the_explanation_knows_how_sure_each_bit_was(
    client: Client, photos: tuple[str, int], images: list[bytes]
) -> None:
    options = SearchOptions(k=50, with_explanation=True)
    hits = client.search(photos[0], image=images[N], options=options).hits
    explained = [hit.explanation for hit in hits if hit.explanation and hit.hamming_bits]
    assert explained
    assert all(len(e.certainty) == len(e.differing_bits) for e in explained)


# -- items -----------------------------------------------------------------------------------------


def test_items_are_read_back_as_they_were_written(
    client: Client, photos: tuple[str, int], embeddings: list[Embedding]
) -> None:
    found = client.get_items(photos[0], ["005", "nobody", "003"], with_feature=True)
    assert [item.id for item in found] == ["005", "003"]
    for item in found:
        row = int(item.id)
        assert item.payload == f"payload {row}".encode()
        assert item.embedding is not None
        assert item.embedding.code == embeddings[row].code
        assert item.embedding.model_id == embeddings[row].model_id
        assert np.array_equal(item.embedding.feature, embeddings[row].feature)


def test_update_and_delete_are_read_by_whoever_wrote_them(
    client: Client, embeddings: list[Embedding]
) -> None:
    client.create_collection("changing", expected_rows=100)
    a, b = embeddings[0], embeddings[1]
    client.upsert("changing", [Item(id="x", embedding=a), Item(id="y", embedding=b)])
    assert client.search("changing", embedding=a, k=2).hits[0].id == "x"
    client.upsert("changing", [Item(id="x", embedding=b, payload=b"new")])
    hits = client.search("changing", embedding=b, k=5).hits
    assert [(hit.id, hit.distance, hit.payload) for hit in hits] == [
        ("x", 0.0, b"new"),
        ("y", 0.0, b""),
    ]
    deleted = client.delete("changing", ["x", "nobody"])
    assert deleted.n_deleted == 1
    assert [hit.id for hit in client.search("changing", embedding=b, k=5).hits] == ["y"]
    assert client.get_items("changing", ["x"]) == []
    info = client.collection("changing")
    assert (info.n_items, info.n_dead_rows, info.version) == (1, 2, deleted.version)
    client.drop_collection("changing")
    with pytest.raises(NotFoundError):
        client.collection("changing")


def test_images_are_upserted_and_a_bad_one_fails_alone(
    client: Client, images: list[bytes], embeddings: list[Embedding]
) -> None:
    client.create_collection("by-image", expected_rows=100)
    items = [
        Item(id="a", image=images[0]),
        Item(id="bad", image=images[1][:100]),
        Item(id="c", embedding=embeddings[2]),
    ]
    result = client.upsert("by-image", items)
    assert result.n_written == 2
    assert [(f.index, f.id) for f in result.failures] == [(1, "bad")]
    error = result.failures[0].error
    assert isinstance(error, InvalidInputError)
    assert error.field == "items[1].image"
    hits = client.search("by-image", embedding=embeddings[0], k=3).hits
    assert [hit.id for hit in hits] == ["a", "c"]
    assert hits[0].distance == 0


def test_a_repeated_write_changes_nothing(client: Client, embeddings: list[Embedding]) -> None:
    client.create_collection("repeated", expected_rows=100)
    items = [Item(id=str(i), embedding=embeddings[i]) for i in range(5)]
    first = client.upsert("repeated", items, request_id="once")
    again = client.upsert("repeated", items, request_id="once")
    assert (again.version, again.n_written) == (first.version, first.n_written)
    with pytest.raises(InvalidInputError) as caught:
        client.upsert("repeated", items[::-1], request_id="once")
    assert caught.value.field == "request_id"
    assert client.collection("repeated").n_items == 5


def test_a_repeated_write_of_images_changes_nothing(client: Client, images: list[bytes]) -> None:
    client.create_collection("repeated-images", expected_rows=100)
    items = [Item(id="a", image=images[0]), Item(id="b", image=images[1][:100])]
    first = client.upsert("repeated-images", items, request_id="once")
    again = client.upsert("repeated-images", items, request_id="once")
    assert (again.version, again.n_written) == (first.version, first.n_written)
    assert len(again.failures) == len(first.failures) == 1
    with pytest.raises(InvalidInputError):
        client.upsert("repeated-images", [Item(id="a", image=images[2])], request_id="once")


def test_codes_only_collections_rank_by_hamming(
    client: Client, embeddings: list[Embedding]
) -> None:
    spec = CollectionSpec(name="codes", model_id="other", n_bits=70, dim=0)
    client.create_collection("codes", spec=spec)
    rng = np.random.default_rng(0)
    packed = codes.pack(rng.random((50, 70)) < 0.5)
    made = [Embedding(code=code.tobytes(), n_bits=70, model_id="other") for code in packed]
    client.upsert("codes", [Item(id=f"{i:02}", embedding=e) for i, e in enumerate(made)])
    result = client.search("codes", embedding=made[9], k=50)
    assert (result.hits[0].id, result.hits[0].hamming_bits) == ("09", 0)
    keys = [(hit.hamming_bits, hit.id) for hit in result.hits]
    assert keys == sorted(keys)
    assert {hit.distance for hit in result.hits} == {None}


def test_a_codes_only_collection_takes_and_finds_images(
    client: Client, images: list[bytes]
) -> None:
    model = client.model()
    spec = CollectionSpec(name="bits", model_id=model.model_id, n_bits=model.n_bits, dim=0)
    client.create_collection("bits", spec=spec)
    result = client.upsert("bits", [Item(id=str(i), image=images[i]) for i in range(5)])
    assert (result.n_written, result.failures) == (5, ())
    hits = client.search("bits", image=images[3], k=5).hits
    assert (hits[0].hamming_bits, hits[0].distance) == (0, None)
    assert {hit.id for hit in hits} == set("01234")


def test_collections_are_listed_and_created_once(client: Client, photos: tuple[str, int]) -> None:
    # It is asked for beside the start.
    wait_until(
        lambda: client.collection(photos[0]).durability == "always",
        within_s=30,
        what="the level is known",
    )
    before = client.collection(photos[0])
    again = client.create_collection(photos[0], expected_rows=1000)
    assert (again.epoch, again.n_items) == (before.epoch, N)
    assert before.writable
    names = [info.spec.name for info in client.collections()]
    assert photos[0] in names
    assert names == sorted(names)


def test_the_asynchronous_client_gives_the_same_answers(
    client: Client,
    search: SearchProcess,
    encoder: ServiceProcess,
    photos: tuple[str, int],
    images: list[bytes],
) -> None:
    async def ask() -> list[SearchResult]:
        async with AsyncClient(search.target, encoder.target) as peer:
            assert await peer.model() == client.model()
            return await asyncio.gather(
                *(peer.search(photos[0], image=image, k=10) for image in images[N : N + 30])
            )

    for image, answer in zip(images[N:], asyncio.run(ask()), strict=False):
        assert facts(answer.hits) == facts(client.search(photos[0], image=image, k=10).hits)


def test_health_says_serving(client: Client) -> None:
    assert [health.serving for health in client.health()] == [True, True]
