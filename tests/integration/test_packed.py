"""Packed replies and batches, through a real search process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
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
    convert,
)
from hashlens.errors import HashlensError, InvalidInputError
from hashlens.packed import PackedHits
from hashlens.packed_items import PackedItems
from hashlens.rpc.status import error_of_call
from hashlens.types import SearchResult
from hashlens.v1 import embedding_pb2 as epb
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from search_service.engine import Engine, is_tiny
from search_service.snapshot import Snapshot
from tests.integration.conftest import SearchProcess

N_BITS, DIM = 48, 8
SMALL, LARGE = 500, 200_000
"""Rows of a collection that is searched in the event loop, and of one that is not."""

NOBODY = "127.0.0.1:1"
"""Where no encoder listens."""


def spec_of(name: str, dim: int) -> CollectionSpec:
    return CollectionSpec(name, "m", N_BITS, dim, FeatureDtype.F32, expected_rows=1000)


def embedding(rng: np.random.Generator, dim: int) -> Embedding:
    return Embedding(
        code=codes.pack(rng.random(N_BITS) < 0.2).tobytes(),
        n_bits=N_BITS,
        model_id="m",
        feature=rng.integers(0, 3, dim).astype(np.float32) if dim else None,
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchProcess]:
    """A search service with two small collections: with features, and codes only."""
    with SearchProcess(tmp_path_factory.mktemp("packed"), NOBODY) as process:
        with Client(process.target, NOBODY) as client:
            for name, dim in (("features", DIM), ("codes", 0)):
                rng = np.random.default_rng(1)
                client.create_collection(name, spec=spec_of(name, dim))
                client.upsert(
                    name,
                    [
                        Item(
                            id=f"\u00e9-{i:03}",
                            embedding=embedding(rng, dim),
                            payload=b"p" * (i % 5),
                        )
                        for i in range(SMALL)
                    ],
                )
                client.collection(name)
        yield process


@pytest.fixture
def peer(served: SearchProcess) -> Iterator[Client]:
    with Client(served.target, NOBODY) as client:
        yield client


@pytest.mark.parametrize("name", ["features", "codes"])
@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(k=1),
        SearchOptions(k=100, with_code=True, min_pool=50),
        SearchOptions(k=1000, with_payload=False),
        SearchOptions(k=20, rank=Rank.HAMMING),
    ],
)
def test_packed_replies_say_the_same(peer: Client, name: str, options: SearchOptions) -> None:
    query = embedding(np.random.default_rng(2), DIM if name == "features" else 0)
    plain = peer.search(name, embedding=query, options=options)
    packed = peer.search(name, embedding=query, options=replace(options, packed=True))
    assert isinstance(plain.hits, tuple)
    assert isinstance(packed.hits, PackedHits)
    assert packed.hits.unpacked() == plain.hits
    assert packed.hits.ids() == [hit.id for hit in plain.hits]
    assert (packed.hits.distances is None) == (name == "codes" or options.rank is Rank.HAMMING)
    assert packed.receipt.pool_histogram == plain.receipt.pool_histogram
    assert any(hit.payload for hit in plain.hits) or not options.with_payload or options.k == 1


def test_what_packed_hits_cannot_carry_is_refused(peer: Client) -> None:
    for change in ({"with_feature": True}, {"with_explanation": True}):
        with pytest.raises(InvalidInputError) as caught:
            peer.search("features", id="\u00e9-001", options=SearchOptions(packed=True, **change))
        assert caught.value.field == "options.packed"


def test_nobody_in_a_batch_harms_another(peer: Client) -> None:
    rng = np.random.default_rng(3)
    queries = [Query(embedding=embedding(rng, DIM)) for _ in range(20)]
    bad = Embedding(code=b"\0", n_bits=8, model_id="m")
    asked = [*queries[:7], Query(embedding=bad), Query(id="nobody"), *queries[7:]]
    options = SearchOptions(k=30, packed=True)
    results = peer.search_batch("features", asked, options=options)
    assert [isinstance(result, HashlensError) for result in results] == [
        i in (7, 8) for i in range(len(asked))
    ]
    good = [result for result in results if isinstance(result, SearchResult)]
    for query, result in zip(queries, good, strict=True):
        alone = peer.search("features", embedding=query.embedding, options=options)
        assert result.hits == alone.hits
    # Most of them waited while the first was searched.
    assert max(result.receipt.timings.batch_queries for result in good) > 1


def test_concurrent_queries_of_a_larger_collection_are_answered_together() -> None:
    """In process, where a large collection costs nothing to fill."""
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, (LARGE * 2, 8), dtype=np.uint8)
    small = Snapshot.from_arrays(packed[:SMALL], n_bits=64)
    large = Snapshot.from_arrays(packed, n_bits=64)
    assert is_tiny(small, SearchOptions())
    assert not is_tiny(large, SearchOptions())
    assert not is_tiny(small, SearchOptions(with_feature=True))
    assert not is_tiny(small, SearchOptions(k=5000))
    queries = [Embedding(code=code.tobytes(), n_bits=64, model_id="") for code in packed[:3]]
    engine = Engine()
    for query in queries:
        assert engine.search(large, query, SearchOptions(k=1)).hits[0].hamming_bits == 0


def test_many_callers_at_once_get_their_own_answers(served: SearchProcess) -> None:
    rng = np.random.default_rng(5)
    queries = [embedding(rng, DIM) for _ in range(64)]
    kinds: list[dict[str, Any]] = [{}, {"packed": True}, {"k": 300, "packed": True}, {"k": 3}]

    async def scenario() -> None:
        async with AsyncClient(served.target, NOBODY) as client:

            async def ask(i: int) -> SearchResult:
                return await client.search(
                    "features", embedding=queries[i], options=SearchOptions(**kinds[i % 4])
                )

            together = await asyncio.gather(*map(ask, range(len(queries))))
            for i, result in enumerate(together):
                alone = await ask(i)
                assert result.hits == alone.hits

    asyncio.run(scenario())


def test_a_batch_whose_answers_are_too_large_together_is_refused(served: SearchProcess) -> None:
    rng = np.random.default_rng(4)
    with Client(served.target, NOBODY) as client:
        client.create_collection("heavy", spec=spec_of("heavy", 0))
        client.upsert(
            "heavy",
            [
                Item(id=str(i), embedding=embedding(rng, 0), payload=b"x" * 60_000)
                for i in range(150)
            ],
        )
        options = SearchOptions(k=150, with_payload=True)
        queries = [Query(id=str(i)) for i in range(16)]  # 9 MB each
        for packed in (False, True):
            with pytest.raises(InvalidInputError, match="above the limit"):
                client.search_batch("heavy", queries, options=replace(options, packed=packed))
            assert len(client.search("heavy", id="3", options=options).hits) == 150
        client.drop_collection("heavy")


def test_a_write_by_column_is_the_write_item_by_item(served: SearchProcess) -> None:
    """The same write in either form, with one request id, is done once."""
    rng = np.random.default_rng(5)
    items = [Item(f"é{i}", embedding(rng, DIM), payload=b"x" * (i % 3)) for i in range(300)]
    packed = PackedItems.of(items)
    assert packed is not None
    columns = convert.packed_items_to_proto(packed)
    one_by_one = [convert.item_to_proto(item) for item in items]
    with grpc.insecure_channel(served.target) as channel, Client(served.target, NOBODY) as client:
        stub = spb_grpc.SearchServiceStub(channel)
        client.create_collection("forms", spec=spec_of("forms", DIM))
        first = stub.Upsert(
            spb.UpsertRequest(collection="forms", packed=columns, request_id="w"), timeout=20
        )
        again = stub.Upsert(
            spb.UpsertRequest(collection="forms", items=one_by_one, request_id="w"), timeout=20
        )
        assert (first.version, first.n_written) == (300, 300)
        assert again == first
        # Written by the stub: the client does not know of it.
        found = client.get_items(
            "forms", [item.id for item in items], with_feature=True, min_version=first.version
        )
        for item, back in zip(items, found, strict=True):
            assert convert.item_to_proto(back) == convert.item_to_proto(item)

        halves = columns.features[: len(columns.features) // 2]
        changes: list[tuple[dict[str, Any], str]] = [
            ({"model_id": "other"}, "packed.model_id"),
            ({"ids": b"\n" * len(columns.ids)}, "packed.ids"),
            ({"feature_dtype": epb.FEATURE_DTYPE_F16, "features": halves}, "packed.feature_dtype"),
        ]
        for change, field in changes:
            wrong = spb.PackedItems()
            wrong.CopyFrom(columns)
            for name, value in change.items():
                setattr(wrong, name, value)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Upsert(spb.UpsertRequest(collection="forms", packed=wrong), timeout=20)
            error = error_of_call(caught.value)
            assert getattr(error, "field", None) == field, error
        both = spb.UpsertRequest(collection="forms", packed=columns, items=one_by_one[:1])
        with pytest.raises(grpc.RpcError) as caught:
            stub.Upsert(both, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        narrow = [replace(items[0], embedding=embedding(rng, 0))]
        with pytest.raises(HashlensError) as refused:
            client.upsert("forms", narrow)
        assert getattr(refused.value, "field", None) == "packed.dim"
        assert client.collection("forms").version == 300
