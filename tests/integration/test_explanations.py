"""Explanations and soft codes through both services, as real processes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hashlens import AsyncClient, Client, CollectionSpec, Embedding, Item, Query, SearchOptions
from hashlens import codes as bit_codes
from hashlens.bits import bit_meanings
from hashlens.errors import InvalidInputError
from hashlens.types import Encoded, ModelInfo, Rank, SearchResult
from search_service.explain import Meanings, explain_query
from tests.integration.conftest import SearchProcess
from tests.support.services import ServiceProcess

N = 120
"""How many pictures the collections hold; the rest of `images` are queries."""

EXPLAINED = SearchOptions(k=30, with_explanation=True, with_code=True)
BY_HAMMING = SearchOptions(k=N, rank=Rank.HAMMING)


@pytest.fixture(scope="module")
def embeddings(encoder: ServiceProcess, images: list[bytes]) -> list[Embedding]:
    with Client(encoder.target, encoder.target) as client:
        results = client.encode_batch(images, with_activations=True)
    return [result.embedding for result in results if isinstance(result, Encoded)]


@pytest.fixture(scope="module")
def items(embeddings: list[Embedding]) -> list[Item]:
    return [Item(id=f"{i:03}", embedding=embeddings[i]) for i in range(N)]


@pytest.fixture(scope="module")
def model(encoder: ServiceProcess) -> ModelInfo:
    with Client(encoder.target, encoder.target) as client:
        return client.model()


@pytest.fixture(scope="module", autouse=True)
def photos(encoder: ServiceProcess, search: SearchProcess, items: list[Item]) -> None:
    """A collection of pictures, and one of their codes only."""
    with Client(search.target, encoder.target) as client:
        spec = client.create_collection("photos", expected_rows=1000).spec
        client.upsert("photos", items)
        client.create_collection("codes", spec=replace(spec, name="codes", dim=0))
        bare = [
            replace(item, embedding=replace(item.embedding, feature=None))
            for item in items
            if item.embedding is not None
        ]
        client.upsert("codes", bare)
        for name in ("photos", "codes"):
            client.search(name, id="000")  # Waits for the writes.


def likeliest(model: ModelInfo, seen: np.ndarray) -> tuple[int, float]:
    """Classify H or bits, shape ``[n_bits]``."""
    assert model.classifier is not None
    scores = np.asarray(model.classifier.weights, np.float64) @ seen + model.classifier.bias
    shares = np.exp(scores) / np.exp(scores).sum()
    return int(shares.argmax()), float(shares.max())


def test_the_encoder_says_what_its_classifier_is(
    client: Client, model: ModelInfo, embeddings: list[Embedding]
) -> None:
    classifier = model.classifier
    assert classifier is not None
    assert classifier.weights.shape == (len(model.classes), model.n_bits)
    assert classifier.bias.shape == (len(model.classes),)
    seen = [likeliest(model, np.asarray(e.activations))[0] for e in embeddings]
    assert len(set(seen)) > 5, "real pictures are of many classes"


def test_an_image_is_explained(
    client: Client, model: ModelInfo, images: list[bytes], embeddings: list[Embedding]
) -> None:
    assert model.classifier is not None
    meanings = bit_meanings(model.classifier.weights, model.classifier.bias)
    for i in range(N, N + 5):
        result = client.search("photos", image=images[i], options=EXPLAINED)
        found, query = result.explanation, embeddings[i]
        assert found is not None
        assert (found.classes, found.detail, found.code) == (model.classes, "", query.code)
        assert query.activations is not None
        assert found.certainty == pytest.approx(abs(query.activations - 0.5), abs=1e-7)
        assert [bit.fires_for for bit in found.bits] == [m.fires_for for m in meanings]
        assert [bit.silent_for for bit in found.bits] == [m.silent_for for m in meanings]
        assert found.prediction is not None
        class_index, probability = likeliest(model, query.activations)
        assert found.prediction.class_index == class_index
        assert found.prediction.probability == pytest.approx(probability, abs=1e-6)
        for hit in result.hits:
            assert hit.code is not None
            bits = bit_codes.unpack(np.frombuffer(hit.code, np.uint8), model.n_bits)
            assert hit.explanation is not None
            assert hit.explanation.prediction is not None
            class_index, probability = likeliest(model, bits)
            assert hit.explanation.prediction.class_index == class_index
            assert hit.explanation.prediction.probability == pytest.approx(probability, abs=1e-6)
            assert hit.explanation.certainty == tuple(
                found.certainty[bit] for bit in hit.explanation.differing_bits
            )


def test_image_embedding_and_batch_are_explained_alike(
    client: Client, images: list[bytes], embeddings: list[Embedding]
) -> None:
    by_image = client.search("photos", image=images[N], options=EXPLAINED)
    by_embedding = client.search("photos", embedding=embeddings[N], options=EXPLAINED)
    (in_batch,) = client.search_batch("photos", [Query(embedding=embeddings[N])], options=EXPLAINED)
    assert isinstance(in_batch, SearchResult)
    assert by_image.explanation == by_embedding.explanation == in_batch.explanation
    assert by_image.hits == by_embedding.hits == in_batch.hits


def test_a_stored_item_is_explained_by_its_code(
    client: Client, model: ModelInfo, embeddings: list[Embedding]
) -> None:
    found = client.search("photos", id="007", options=EXPLAINED).explanation
    stored = replace(embeddings[7], activations=None)
    assert found is not None
    assert found.certainty == ()
    want = explain_query(stored, Meanings.of(model))
    assert found.prediction is not None
    assert want.prediction is not None
    assert found.prediction.class_index == want.prediction.class_index
    assert found.bits == want.bits


def test_no_explanation_unless_asked_for(client: Client, images: list[bytes]) -> None:
    result = client.search("photos", image=images[N])
    assert result.explanation is None
    assert {hit.explanation for hit in result.hits} == {None}


def test_another_models_bits_are_not_explained(client: Client) -> None:
    spec = CollectionSpec(name="foreign", model_id="foreign", n_bits=48, dim=0)
    client.create_collection("foreign", spec=spec)
    code = Embedding(code=bytes(6), n_bits=48, model_id="foreign")
    client.upsert("foreign", [Item(id="x", embedding=code)])
    result = client.search("foreign", embedding=code, options=EXPLAINED)
    assert result.explanation is not None
    assert "another model" in result.explanation.detail
    assert result.explanation.bits == ()
    assert result.hits[0].explanation is not None
    assert result.hits[0].explanation.prediction is None


def test_while_the_encoder_is_away_the_bits_still_differ(
    tmp_path: Path, client: Client, items: list[Item], embeddings: list[Embedding]
) -> None:
    spec = client.collection("photos").spec
    with (
        SearchProcess(tmp_path, "127.0.0.1:1") as process,
        Client(process.target, process.target) as bereft,
    ):
        bereft.create_collection("photos", spec=spec)
        bereft.upsert("photos", items)
        result = bereft.search("photos", embedding=embeddings[N], options=EXPLAINED)
    explained = client.search("photos", embedding=embeddings[N], options=EXPLAINED)
    assert result.explanation is not None
    assert "does not say" in result.explanation.detail
    assert result.explanation.certainty
    assert [hit.id for hit in result.hits] == [hit.id for hit in explained.hits]
    for hit, other in zip(result.hits, explained.hits, strict=True):
        assert hit.explanation is not None
        assert other.explanation is not None
        assert hit.explanation == replace(other.explanation, prediction=None)


# -- soft codes ------------------------------------------------------------------------------------


def soft_order(stored: list[Embedding], query: Embedding) -> list[str]:
    """Order by (Hamming, asymmetric distance, id), bit by bit."""
    assert query.activations is not None
    asked = bit_codes.unpack(np.frombuffer(query.code, np.uint8), query.n_bits)
    keys = []
    for i, embedding in enumerate(stored):
        bits = bit_codes.unpack(np.frombuffer(embedding.code, np.uint8), query.n_bits)
        sure = [
            round(510 * abs(float(h) - 0.5))
            for h, a, b in zip(query.activations, asked, bits, strict=True)
            if a != b
        ]
        keys.append((len(sure), sum(sure), f"{i:03}"))
    return [key[2] for key in sorted(keys)]


@pytest.mark.parametrize("name", ["photos", "codes"])
def test_margins_order_equal_distances_however_the_query_comes(
    client: Client, images: list[bytes], embeddings: list[Embedding], name: str
) -> None:
    options = BY_HAMMING if name == "photos" else replace(BY_HAMMING, rank=Rank.AUTO)
    n_moved = 0
    for i in range(N, N + 10):
        query = embeddings[i] if name == "photos" else replace(embeddings[i], feature=None)
        want = soft_order(embeddings[:N], query)
        by_image = client.search(name, image=images[i], options=options)
        by_embedding = client.search(name, embedding=query, options=options)
        assert [hit.id for hit in by_image.hits] == want
        assert [hit.id for hit in by_embedding.hits] == want
        assert by_image.receipt.margins_used
        ignoring = replace(options, ignore_margins=True)
        plain = client.search(name, image=images[i], options=ignoring)
        without_h = replace(query, activations=None)
        bare = client.search(name, embedding=without_h, options=options)
        assert plain.hits == bare.hits
        assert not plain.receipt.margins_used
        assert not bare.receipt.margins_used
        n_moved += [hit.id for hit in plain.hits] != want
    assert n_moved == 10


def test_margins_choose_whom_an_over_full_pool_keeps(
    client: Client, images: list[bytes], embeddings: list[Embedding]
) -> None:
    options = SearchOptions(k=20, max_hamming_bits=48, max_pool=20)
    for i in range(N, N + 10):
        result = client.search("photos", image=images[i], options=options)
        kept = soft_order(embeddings[:N], embeddings[i])[:20]
        assert {hit.id for hit in result.hits} == set(kept)
        assert (result.receipt.margins_used, result.receipt.pool_truncated) == (True, True)
        uncut = client.search("photos", image=images[i], options=replace(options, max_pool=None))
        assert not uncut.receipt.margins_used


def test_a_stored_item_has_no_margins(client: Client) -> None:
    assert not client.search("photos", id="003", options=BY_HAMMING).receipt.margins_used


def test_the_asynchronous_client_says_the_same(
    client: Client, search: SearchProcess, encoder: ServiceProcess, images: list[bytes]
) -> None:
    options = replace(BY_HAMMING, with_explanation=True)

    async def ask() -> SearchResult:
        async with AsyncClient(search.target, encoder.target) as peer:
            return await peer.search("photos", image=images[N], options=options)

    answer = asyncio.run(ask())
    again = client.search("photos", image=images[N], options=options)
    assert (answer.hits, answer.explanation) == (again.hits, again.explanation)


def test_activations_out_of_range_are_refused_where_they_are(
    client: Client, embeddings: list[Embedding]
) -> None:
    wrong = replace(embeddings[0], activations=np.full(48, 2, dtype=np.float32))
    with pytest.raises(InvalidInputError) as caught:
        client.search("photos", embedding=wrong)
    assert caught.value.field == "query.embedding.activations.values"
