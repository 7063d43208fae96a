"""Audit over gRPC, by both clients and the command, against brute force."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hashlens import AsyncClient, Client, CollectionSpec, Embedding, Item, SearchOptions, codes
from hashlens.cli.images import enlarged
from hashlens.cli.main import main
from hashlens.errors import (
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
)
from hashlens.types import AuditResult, FeatureDtype, Rank
from search_service.bench.embeddings import Pictures, encode_by, read_pictures
from tests.integration.conftest import SearchProcess
from tests.reference import search as slow
from tests.support.services import ServiceProcess

N = 600
N_BITS = 12
DIM = 6
MODEL = "a-model"
SPEC = CollectionSpec(
    name="audit", model_id=MODEL, n_bits=N_BITS, dim=DIM, feature_dtype=FeatureDtype.F16
)


@pytest.fixture(scope="module")
def stored(encoder: ServiceProcess, search: SearchProcess) -> dict[str, Embedding]:
    """Ids to embeddings of the collection, which has seen deletes and updates; many are alike."""
    rng = np.random.default_rng(4)
    packed = codes.pack(rng.random((N, N_BITS)) < 0.5)
    features = rng.integers(0, 4, (N, DIM)).astype(np.float16)
    rows = {
        f"{i:03}": Embedding(
            packed[i].tobytes(), N_BITS, MODEL, features[i], rng.random(N_BITS).astype(np.float32)
        )
        for i in rng.permutation(N)
    }
    with Client(search.target, encoder.target) as client:
        client.create_collection("audit", spec=SPEC)
        client.upsert(
            "audit", [Item(id=i, embedding=e, payload=i.encode()) for i, e in rows.items()]
        )
        client.delete("audit", ["000", "100"])
        moved = {"007": replace(rows["008"], code=rows["009"].code)}
        client.upsert("audit", [Item(id=i, embedding=e) for i, e in moved.items()])
        client.collection("audit")
    return {i: e for i, e in (rows | moved).items() if i not in ("000", "100")}


def table_of(stored: dict[str, Embedding]) -> slow.Table:
    return slow.Table(
        [e.code for e in stored.values()],
        N_BITS,
        list(stored),
        np.stack([e.feature for e in stored.values()]),
    )


def check(result: AuditResult, stored: dict[str, Embedding], query: Embedding, k: int) -> None:
    found = [(hit.id, hit.hamming_bits, hit.distance) for hit in result.exhaustive_hits]
    assert found == slow.exhaustive(table_of(stored), query.code, query.feature, k)
    answered = {hit.id for hit in result.answer.hits}
    has = [item_id in answered for item_id, _, _ in found]
    assert result.recall == sum(has) / len(has)
    assert result.first_miss == (has.index(False) if False in has else None)


@pytest.mark.parametrize("k", [1, 10, 200, 1000])
@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(),
        SearchOptions(min_pool=0),
        SearchOptions(max_hamming_bits=2),
        SearchOptions(max_hamming_bits=N_BITS, max_pool=1000),
        SearchOptions(rank=Rank.HAMMING, min_pool=0),
    ],
)
def test_an_audit_is_the_search_beside_brute_force(
    client: Client, stored: dict[str, Embedding], options: SearchOptions, k: int
) -> None:
    asked = replace(options, k=k)
    for item_id in ("001", "007"):
        result = client.audit("audit", id=item_id, options=asked)
        check(result, stored, stored[item_id], k)
        searched = client.search("audit", id=item_id, options=asked)
        assert result.answer.hits == searched.hits
        ours, theirs = (replace(r.receipt, timings=None) for r in (result.answer, searched))
        assert ours == theirs
    query = stored["300"]
    result = client.audit("audit", embedding=query, options=asked)
    check(result, stored, query, k)
    assert result.answer.hits == client.search("audit", embedding=query, options=asked).hits
    assert [hit.payload for hit in result.exhaustive_hits] == [
        b"" if hit.id == "007" else hit.id.encode() for hit in result.exhaustive_hits
    ]
    timings = result.answer.receipt.timings
    assert timings.total_ns > timings.coarse_ns + timings.fine_ns


def test_a_small_radius_is_told_what_it_missed(
    client: Client, stored: dict[str, Embedding]
) -> None:
    narrow = client.audit("audit", id="001", options=SearchOptions(k=50, max_hamming_bits=1))
    assert narrow.recall < 0.5
    assert narrow.first_miss is not None
    wide = client.audit("audit", id="001", options=SearchOptions(k=50, max_hamming_bits=N_BITS))
    assert (wide.recall, wide.first_miss) == (1, None)
    assert wide.exhaustive_hits == narrow.exhaustive_hits


def test_both_clients_and_no_payloads(
    client: Client, search: SearchProcess, stored: dict[str, Embedding]
) -> None:
    options = SearchOptions(k=20, max_hamming_bits=2, with_payload=False)

    async def ask() -> AuditResult:
        async with AsyncClient(search.target, search.target) as peer:
            return await peer.audit("audit", embedding=stored["200"], options=options)

    theirs = asyncio.run(ask())
    ours = client.audit("audit", embedding=stored["200"], options=options)
    assert theirs.exhaustive_hits == ours.exhaustive_hits
    assert (theirs.recall, theirs.first_miss) == (ours.recall, ours.first_miss)
    assert not any(hit.payload for hit in ours.exhaustive_hits)


def test_by_image_through_the_encoder(client: Client, images: list[bytes]) -> None:
    client.create_collection("audit-images", expected_rows=100)
    client.upsert("audit-images", [Item(id=f"{i}", image=d) for i, d in enumerate(images[:40])])
    result = client.audit("audit-images", image=images[7], k=5)
    assert result.exhaustive_hits[0].id == "7"
    assert (result.recall, result.first_miss) == (1, None)
    assert [h.id for h in result.answer.hits] == [h.id for h in result.exhaustive_hits]
    assert result.answer.receipt.timings.encode.inference_ns > 0
    assert result.answer.receipt.timings.encode_call_ns > 0
    cut = SearchOptions(k=5, min_pool=0, max_pool=5, with_explanation=True)
    audited = client.audit("audit-images", image=images[7], options=cut).answer
    searched = client.search("audit-images", image=images[7], options=cut)
    assert audited.hits == searched.hits
    assert audited.explanation == searched.explanation
    assert audited.receipt.margins_used == searched.receipt.margins_used


def test_an_empty_collection_misses_nothing(client: Client, stored: dict[str, Embedding]) -> None:
    client.create_collection("audit-empty", spec=replace(SPEC, name="audit-empty"))
    result = client.audit("audit-empty", embedding=stored["001"])
    assert (result.exhaustive_hits, result.recall, result.first_miss) == ((), 1, None)


def test_what_cannot_be_audited_says_so(client: Client, stored: dict[str, Embedding]) -> None:
    query = stored["001"]

    def refused(kind: type[Exception], **arguments: Any) -> Any:
        with pytest.raises(kind) as caught:
            client.audit(**{"collection": "audit", **arguments})
        return caught.value

    client.create_collection("audit-codes", spec=replace(SPEC, name="audit-codes", dim=0))
    error = refused(PreconditionError, collection="audit-codes", embedding=query)
    assert error.field == "search.collection"
    assert "codes only" in error.message
    bare = replace(query, feature=None)
    for rank in (Rank.AUTO, Rank.HAMMING):
        error = refused(InvalidInputError, embedding=bare, options=SearchOptions(rank=rank))
        assert error.field == "search.query.embedding.feature"
    other = replace(query, model_id="another")
    error = refused(PreconditionError, embedding=other)
    assert error.field == "search.query.embedding.model_id"
    wide = SearchOptions(max_hamming_bits=N_BITS + 1)
    error = refused(InvalidInputError, id="001", options=wide)
    assert error.field == "search.options.max_hamming_bits"
    refused(NotFoundError, id="nobody")
    refused(NotFoundError, id="001", collection="nowhere")
    refused(InvalidInputError)
    refused(DeadlineError, id="001", deadline_s=-1)  # Passed: 0.1 ms suffices for one.
    assert client.audit("audit", id="001", k=1).recall == 1  # No place was left taken.


def test_one_audit_at_a_time_while_searches_go_on(
    client: Client, stored: dict[str, Embedding]
) -> None:
    """Callers that all insist: some are refused with advice, whoever gets through is right."""
    refused, done, wrong = [], [], []
    together = threading.Barrier(12)

    def insist() -> None:
        together.wait(20)
        for _ in range(200):
            try:
                result = client.audit("audit", id="001", k=100)
                check(result, stored, stored["001"], 100)
                done.append(1)
                return
            except OverloadedError as error:
                refused.append(error.retry_after_s)
            except AssertionError as error:
                wrong.append(error)
                return

    callers = [threading.Thread(target=insist) for _ in range(12)]
    for caller in callers:
        caller.start()
    assert client.search("audit", id="001", k=1).hits[0].id == "001"
    for caller in callers:
        caller.join()
    assert not wrong
    assert done
    assert refused
    assert min(refused) >= 0.1


def test_the_benchmark_of_pools_encodes_as_the_service_does(
    client: Client,
) -> None:
    pictures = read_pictures(None)
    few = Pictures(pictures.images[:70], pictures.labels[:70], pictures.is_test[:70])
    found = encode_by(client, few)
    assert found.n_bits == client.model().n_bits
    for row in (0, 1, 63, 64, 69):
        data = enlarged(few.images[row], 4, "JPEG" if row % 2 else "PNG")
        expected = client.encode(
            data, feature_dtype=FeatureDtype.F16, with_activations=True
        ).embedding
        query = found.query(row)
        assert (query.code, query.model_id) == (expected.code, expected.model_id)
        np.testing.assert_array_equal(query.feature, expected.feature)
        np.testing.assert_array_equal(query.activations, expected.activations)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_shows_and_prints(
    search: SearchProcess, encoder: ServiceProcess, client: Client, stored: dict[str, Embedding]
) -> None:
    flags = ["--search", search.target, "--encoder", encoder.target, "-c", "audit"]
    asked = ["search", "--id", "001", "-k", "30", "--max-hamming", "2", "--audit", *flags]
    expected = client.audit("audit", id="001", options=SearchOptions(k=30, max_hamming_bits=2))
    assert expected.first_miss is not None
    shown = CliRunner().invoke(main, asked)
    assert shown.exit_code == 0, shown.output
    missed = expected.exhaustive_hits[expected.first_miss].id
    assert f"recall {expected.recall:.3f} · " in shown.stdout
    assert f"first miss at {expected.first_miss + 1}: {missed}" in shown.stdout
    assert "exhaustive search" in shown.stdout
    assert "as 1 " in shown.stdout
    printed = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    audit = printed["audit"]
    assert audit["recall"] == expected.recall
    assert audit["first_miss_rank"] == expected.first_miss + 1
    assert [hit["id"] for hit in audit["exhaustive_hits"]] == [
        hit.id for hit in expected.exhaustive_hits
    ]
    assert [hit["answered"] for hit in audit["exhaustive_hits"]].index(False) == expected.first_miss
    assert [hit["id"] for hit in printed["hits"]] == [hit.id for hit in expected.answer.hits]
    wide = CliRunner().invoke(main, ["search", "--id", "001", "--audit", *flags])
    assert "recall 1.000 · 10 of the 10 nearest, none missed" in wide.stdout
