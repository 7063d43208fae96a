"""Tags and filters through the store and over the wire."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
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
    SearchOptions,
    TagFilter,
)
from hashlens.errors import InvalidInputError
from hashlens.types import Query, Rank, SearchResult
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from search_service import filtered
from search_service.engine import Engine
from search_service.snapshot import Snapshot
from search_service.storage import Collection, Record, Store, StoreConfig
from search_service.storage.embedded import find_server
from tests.integration.conftest import SearchProcess
from tests.reference import search as slow
from tests.reference.kernels import hamming
from tests.support.redis_server import RedisServer
from tests.support.services import ServiceProcess
from tests.support.stores import DEADLINE_S, Model, contents, make_record, wait_until

SPEC = CollectionSpec("c", "m", 20, 3, FeatureDtype.F32, 1000)
WORDS = ["cat", "dog", "Ünïcode", "\U0001f600", "two words", "w" * 255]


def tagged(spec: CollectionSpec, item_id: str, rng: np.random.Generator) -> Record:
    """An item with few codes, so that ties are everywhere, and some of the words."""
    record = make_record(spec, item_id, rng)
    tags = {word for word in WORDS if rng.random() < 0.3} | {f"only-{item_id}"}
    kept = tags if rng.random() < 0.8 else ()
    tags = tuple(sorted(kept, key=str.encode))
    return replace(record, code=bytes([record.code[0] & 3, 0, 0]), tags=tags, expires_ms=0)


def filters(rng: np.random.Generator, model: Model) -> list[TagFilter]:
    def some() -> tuple[str, ...]:
        known = [*WORDS, "nobody", *(f"only-{i}" for i in list(model.items)[:5])]
        return tuple(rng.choice(known, int(rng.integers(0, 3)), replace=False).tolist())

    return [TagFilter(any=some(), all=some(), none=some()) for _ in range(12)]


def assert_filters(snapshot: Snapshot, model: Model, rng: np.random.Generator) -> None:
    """Every search through a filter is what the definition says of the model's items."""
    assert contents(snapshot) == model.items
    order = sorted(model.items, key=lambda i: snapshot.row_of(i))
    items = [model.items[i] for i in order]
    table = slow.Table(
        [item.code for item in items],
        snapshot.n_bits,
        order,
        np.array([np.frombuffer(item.feature, np.float32) for item in items]),
    )
    for wanted in filters(rng, model):
        dead = [not slow.passes(i.tags, wanted.any, wanted.all, wanted.none) for i in items]
        query = Embedding(
            code=bytes([int(rng.integers(4)), 0, 0]),
            n_bits=snapshot.n_bits,
            model_id=snapshot.model_id,
            feature=rng.standard_normal(3).astype(np.float32),
        )
        for k, radius_bits, min_pool, max_pool in (
            (5, None, 0, None),
            (3, 1, 0, 4),
            (100, None, 20, 200),
        ):
            chosen = SearchOptions(
                k=k,
                max_hamming_bits=radius_bits,
                min_pool=min_pool,
                max_pool=max_pool,
                filter=wanted,
            )
            want = slow.search(
                replace(table, dead=dead),
                query.code,
                query.feature,
                k=k,
                radius_bits=radius_bits,
                min_pool=min_pool,
                max_pool=max_pool,
                by_feature=True,
            )
            result = Engine().search(snapshot, query, chosen)
            assert [(h.id, h.hamming_bits, h.distance) for h in result.hits] == want.hits
            receipt = result.receipt
            assert list(receipt.pool_histogram) == want.histogram
            assert (receipt.threshold_bits, receipt.pool_size) == (
                want.threshold_bits,
                want.pool_size,
            )
            assert receipt.rows_scanned == dead.count(False)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(find_server()) as running:
        yield running


def write(collection: Collection, model: Model, records: list[Record]) -> None:
    collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
    model.upsert(records)
    collection.wait_for(model.version, DEADLINE_S)


def test_filters_through_updates_deletes_and_restarts(server: RedisServer, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    config = StoreConfig(data_dir=tmp_path / "data", redis_url=server.url)
    model = Model()
    for round_number in range(3):
        with Store.open(config) as store:
            collection = store.create(SPEC)
            snapshot = collection.wait_for(model.version, DEADLINE_S)
            if model.items:
                assert_filters(snapshot, model, rng)
            for step in range(3):
                fresh = [f"{round_number}-{step}-{i}" for i in range(40)]
                again = rng.choice(list(model.items), 10).tolist() if model.items else []
                write(collection, model, [tagged(SPEC, i, rng) for i in fresh + again])
                gone = rng.choice(list(model.items), 8, replace=False).tolist()
                collection.delete(gone, request_id="", deadline_s=DEADLINE_S)
                model.delete(gone)
                assert_filters(collection.wait_for(model.version, DEADLINE_S), model, rng)


def test_filters_through_compaction(server: RedisServer, tmp_path: Path) -> None:
    """The new table has its tags before it counts, and what filters left keeps no old file."""
    rng = np.random.default_rng(4)
    spec = replace(SPEC, name="compacted")
    config = StoreConfig(data_dir=tmp_path / "data", redis_url=server.url, expire_interval_s=0.05)
    model = Model()
    with Store.open(config) as store:
        collection = store.create(spec)
        write(collection, model, [tagged(spec, str(i), rng) for i in range(100)])
        gone = [str(i) for i in range(0, 60, 2)]
        collection.delete(gone, request_id="", deadline_s=DEADLINE_S)
        model.delete(gone)
        assert_filters(collection.wait_for(model.version, DEADLINE_S), model, rng)
        compacted = collection.compact()
        assert compacted.n_rows_erased == len(gone)
        snapshot: Any = collection.snapshot()
        assert snapshot.rows == 70
        tags = snapshot.ids.table.tags
        assert tags.n_tags == len({tag for item in model.items.values() for tag in item.tags})
        cats = sum("cat" in item.tags for item in model.items.values())
        assert len(tags.passing(TagFilter(any=("cat",)), 70)) == cats > 0
        assert_filters(snapshot, model, rng)
        wait_until(lambda: all(file.is_gone for file in compacted.files), "old files are gone")
        soon = replace(tagged(spec, "soon", rng), expires_ms=int(time.time() * 1000) + 50)
        collection.upsert([soon], request_id="", deadline_s=DEADLINE_S)
        model.version += 2
        assert_filters(collection.wait_for(model.version, DEADLINE_S), model, rng)


def test_a_table_without_tags_has_no_index(server: RedisServer, tmp_path: Path) -> None:
    config = StoreConfig(data_dir=tmp_path / "data", redis_url=server.url)
    rng = np.random.default_rng(0)
    spec = replace(SPEC, name="plain")
    with Store.open(config) as store:
        collection, model = store.create(spec), Model()
        write(collection, model, [replace(tagged(spec, str(i), rng), tags=()) for i in range(50)])
        rows_at: Any = collection.snapshot().ids
        assert rows_at.index_tags()
        assert rows_at.table.tags.n_tags == 0


def test_one_view_for_all_who_ask_for_a_version_and_a_filter(
    server: RedisServer, tmp_path: Path
) -> None:
    config = StoreConfig(data_dir=tmp_path / "data", redis_url=server.url)
    rng = np.random.default_rng(0)
    spec = replace(SPEC, name="views")
    with Store.open(config) as store:
        collection, model = store.create(spec), Model()
        write(collection, model, [tagged(spec, str(i), rng) for i in range(50)])
        snapshot = collection.snapshot()
        wanted = TagFilter(any=("cat",))

        async def ask(asked: TagFilter | None) -> Snapshot:
            return await filtered.reached(snapshot, asked, time.monotonic() + 30)

        async def many() -> list[Snapshot]:
            return await asyncio.gather(*(ask(TagFilter(any=("cat",))) for _ in range(8)))

        first, *others = asyncio.run(many())
        assert all(other is first for other in others)
        assert asyncio.run(ask(None)) is snapshot
        assert asyncio.run(ask(TagFilter(none=("cat",)))) is not first
        write(collection, model, [tagged(spec, "more", rng)])
        assert snapshot.views.get(wanted) is first
        assert collection.snapshot().views.get(wanted) is None


def test_reading_through_filters_while_rows_arrive(server: RedisServer, tmp_path: Path) -> None:
    """Each version shows exactly its own rows, whoever indexes them, and on a start, too."""
    spec = replace(SPEC, name="busy")
    config = StoreConfig(data_dir=tmp_path / "data", redis_url=server.url)
    rng = np.random.default_rng(1)
    n_rounds, per_round = 40, 25
    wrong: list[str] = []
    done = threading.Event()

    def read(collection: Collection, min_checks: int) -> None:
        engine = Engine()
        query = Embedding(bytes(3), spec.n_bits, "m", np.zeros(3, np.float32))
        checks = 0
        while checks < min_checks or not done.is_set():
            snapshot = collection.snapshot()
            even = engine.search(
                snapshot, query, SearchOptions(k=5000, filter=TagFilter(all=("even",)))
            )
            # Item i is row i and version i + 1: a version says which items it has.
            expected = {str(i) for i in range(0, snapshot.version, 2)}
            if {hit.id for hit in even.hits} != expected:
                wrong.append(f"version {snapshot.version}")
            checks += 1

    def records(numbers: range) -> list[Record]:
        return [
            replace(tagged(spec, str(i), rng), tags=(("even",) if i % 2 == 0 else ()) + (f"x{i}",))
            for i in numbers
        ]

    with Store.open(config) as store:
        collection, model = store.create(spec), Model()
        readers = [threading.Thread(target=read, args=(collection, 5)) for _ in range(2)]
        for reader in readers:
            reader.start()
        for number in range(n_rounds):
            write(collection, model, records(range(number * per_round, (number + 1) * per_round)))
        done.set()
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
    with Store.open(config) as store:
        collection = store.get("busy")
        readers = [threading.Thread(target=read, args=(collection, 3)) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
    assert not wrong


# -- over the wire -------------------------------------------------------------------------------

N = 400
RADIUS = 20


@pytest.fixture(scope="module")
def stored(encoder: ServiceProcess, search: SearchProcess) -> dict[str, Item]:
    """Items of the collection "tags", by id, in the order of writing."""
    rng = np.random.default_rng(0)
    items = {}
    for i in range(N):
        tags = tuple(word for word in WORDS[:4] if rng.random() < 0.4)
        code = bytes([*rng.integers(0, 256, 2).tolist(), int(rng.integers(0, 16))])
        embedding = Embedding(code, 20, "m", rng.standard_normal(4).astype(np.float32))
        items[f"{i:03}"] = Item(id=f"{i:03}", embedding=embedding, tags=tags)
    spec = CollectionSpec("tags", "m", 20, 4, FeatureDtype.F32)
    with Client(search.target, encoder.target) as client:
        client.create_collection("tags", spec=spec)
        client.upsert("tags", list(items.values())).raise_for_failures()
        # This client reads its own writes; from here on, so does every other.
        client.collection("tags")
    return items


def expected(
    stored: dict[str, Item], asked: str, wanted: TagFilter, k: int
) -> list[tuple[str, int, float | None]]:
    """The exhaustive answer over those that pass, which is the search's where all fit the pool."""
    items = list(stored.values())
    known = [item.embedding for item in items]
    dead = [not slow.passes(i.tags, wanted.any, wanted.all, wanted.none) for i in items]
    table = slow.Table(
        [one.code for one in known], 20, list(stored), np.stack([o.feature for o in known]), dead
    )
    query = stored[asked].embedding
    return slow.exhaustive(table, query.code, query.feature, k)


FILTERS = [
    TagFilter(any=("cat", "dog")),
    TagFilter(all=("\U0001f600", "cat", "cat")),
    TagFilter(none=("Ünïcode",)),
    TagFilter(any=("dog", "nobody"), all=("cat",), none=("\U0001f600",)),
    TagFilter(any=("nobody",)),
]


def seen(result: SearchResult) -> list[tuple[str, int, float | None]]:
    return [(hit.id, hit.hamming_bits, hit.distance) for hit in result.hits]


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_every_kind_of_search_sees_those_that_pass(
    client: Client, stored: dict[str, Item], wanted: TagFilter
) -> None:
    options = SearchOptions(k=30, filter=wanted)
    passing = {
        i
        for i, item in stored.items()
        if slow.passes(item.tags, wanted.any, wanted.all, wanted.none)
    }
    want = expected(stored, "007", wanted, 30)
    result = client.search("tags", id="007", options=options)
    assert seen(result) == want
    assert result.receipt.rows_scanned == result.receipt.pool_size == len(passing)
    assert result.receipt.exact
    packed = client.search("tags", id="007", options=replace(options, packed=True))
    assert seen(packed) == want
    embedding = stored["011"].embedding
    batch = client.search_batch("tags", [Query(embedding=embedding)], options=options)
    assert seen(batch[0]) == expected(stored, "011", wanted, 30)
    audit = client.audit("tags", id="007", options=options)
    assert seen(audit.answer) == want
    assert [(h.id, h.hamming_bits, h.distance) for h in audit.exhaustive_hits] == want
    assert audit.recall == 1
    code = stored["007"].embedding.code
    ball = {
        i: bits for i in sorted(passing) if (bits := hamming(stored[i].embedding.code, code)) <= 9
    }
    parts = list(client.stream_ball("tags", id="007", radius_bits=9, filter=wanted))
    assert {hit.id: hit.hamming_bits for part in parts for hit in part.hits} == ball
    assert parts[-1].receipt.rows_scanned == len(passing)


def test_an_audit_says_what_the_pool_missed_of_those_that_pass(
    client: Client, stored: dict[str, Item]
) -> None:
    wanted = TagFilter(any=("dog",))
    options = SearchOptions(k=20, max_hamming_bits=8, filter=wanted)
    audit = client.audit("tags", id="007", options=options)
    want = expected(stored, "007", wanted, 20)
    assert [(h.id, h.hamming_bits, h.distance) for h in audit.exhaustive_hits] == want
    answered = {hit.id for hit in audit.answer.hits}
    assert all("dog" in stored[i].tags for i in answered)
    assert audit.recall == sum(i in answered for i, _, _ in want) / len(want)
    assert audit.recall < 1


def test_an_empty_filter_is_none(client: Client, stored: dict[str, Item]) -> None:
    plain = client.search("tags", id="007", options=SearchOptions(k=30))
    empty = client.search("tags", id="007", options=SearchOptions(k=30, filter=TagFilter()))
    assert seen(empty) == seen(plain)
    assert empty.receipt.rows_scanned == N


def test_the_asynchronous_client_filters(
    stored: dict[str, Item], search: SearchProcess, encoder: ServiceProcess
) -> None:
    wanted = TagFilter(all=("cat",))

    async def ask() -> tuple[SearchResult, list[str]]:
        async with AsyncClient(search.target, encoder.target) as client:
            result = await client.search("tags", id="007", options=SearchOptions(filter=wanted))
            ids = []
            async for part in client.stream_ball("tags", id="007", radius_bits=20, filter=wanted):
                ids += [hit.id for hit in part.hits]
            return result, ids

    result, ids = asyncio.run(ask())
    assert seen(result) == expected(stored, "007", wanted, 10)
    assert ids == [i for i, item in stored.items() if "cat" in item.tags]


def test_a_replaced_item_has_its_new_tags_alone(client: Client, stored: dict[str, Item]) -> None:
    spec = CollectionSpec("retag", "m", 20, 4, FeatureDtype.F32)
    client.create_collection("retag", spec=spec)
    item = replace(stored["000"], tags=("old", "both"))
    client.upsert("retag", [item])

    def found(**wanted: Any) -> int:
        options = SearchOptions(rank=Rank.HAMMING, filter=TagFilter(**wanted))
        return len(client.search("retag", embedding=item.embedding, options=options).hits)

    assert (found(all=("old",)), found(none=("new",))) == (1, 1)
    client.upsert("retag", [replace(item, tags=("new", "both"))])
    assert (found(any=("old",)), found(any=("new",)), found(all=("both", "new"))) == (0, 1, 1)
    client.upsert("retag", [replace(item, tags=())])
    assert (found(any=("new", "both")), found(none=("new",))) == (0, 1)
    client.delete("retag", [item.id])
    assert found(none=("new",)) == 0


@pytest.mark.parametrize(
    ("condition", "tags", "field"),
    [
        ("any", [""], "filter.any[0]"),
        ("all", ["ok", "x" * 256], "filter.all[1]"),
        ("none", ["line\nbreak"], "filter.none[0]"),
        ("any", [str(i) for i in range(65)], "filter.any"),
        ("none", ["same"] * 65, "filter.none"),
    ],
)
def test_hostile_filters_are_refused(
    client: Client,
    search: SearchProcess,
    stored: dict[str, Item],
    condition: str,
    tags: list[str],
    field: str,
) -> None:
    wanted = TagFilter(**{condition: tuple(tags)})
    options = SearchOptions(filter=wanted)
    for refused, path in (
        (lambda: client.search("tags", id="007", options=options), f"options.{field}"),
        (
            lambda: client.search_batch("tags", [Query(id="007")], options=options),
            f"options.{field}",
        ),
        (lambda: client.audit("tags", id="007", options=options), f"search.options.{field}"),
        (
            lambda: list(client.stream_ball("tags", id="007", radius_bits=1, filter=wanted)),
            field,
        ),
    ):
        with pytest.raises(InvalidInputError) as caught:
            refused()
        assert caught.value.field == path


def test_what_is_no_text_is_refused_by_the_client(
    client: Client, search: SearchProcess, stored: dict[str, Item]
) -> None:
    wanted = TagFilter(any=("\ud800",))
    with pytest.raises(InvalidInputError):
        client.search("tags", id="007", options=SearchOptions(filter=wanted))
    with pytest.raises(InvalidInputError):
        list(client.stream_ball("tags", id="007", radius_bits=1, filter=wanted))
    with grpc.insecure_channel(search.target) as channel:
        call = channel.unary_unary(
            "/hashlens.v1.SearchService/Search",
            request_serializer=lambda data: data,
            response_deserializer=spb.SearchResponse.FromString,
        )
        sound = spb.SearchRequest(collection="tags", query=spb.Query(id="007"))
        sound.options.k = 1
        sound.options.filter.any.append("abc")
        with pytest.raises(grpc.RpcError):
            call(sound.SerializeToString().replace(b"abc", b"a\xff\xfe"), timeout=10)
        assert spb_grpc.SearchServiceStub(channel).Search(sound, timeout=10).hits == []


def test_a_filter_at_the_limits_is_answered(client: Client, stored: dict[str, Item]) -> None:
    many = tuple(f"{i:03}" + "x" * 252 for i in range(64))
    wanted = TagFilter(any=("cat", *many[1:]), none=many)
    spec = CollectionSpec("limits", "m", 20, 4, FeatureDtype.F32)
    client.create_collection("limits", spec=spec)
    client.upsert("limits", [replace(stored["007"], tags=many)]).raise_for_failures()
    (item,) = client.get_items("limits", ["007"])
    assert item.tags == many
    every = SearchOptions(filter=TagFilter(all=many))
    assert [hit.id for hit in client.search("limits", id="007", options=every).hits] == ["007"]
    with pytest.raises(InvalidInputError):
        client.upsert("limits", [replace(stored["007"], tags=(*many, "one more"))])
    result = client.search("tags", id="007", options=SearchOptions(k=1000, filter=wanted))
    assert {h.id for h in result.hits} == {i for i, item in stored.items() if "cat" in item.tags}


def test_a_restarted_service_filters_as_before(
    encoder: ServiceProcess, tmp_path: Path, stored: dict[str, Item]
) -> None:
    wanted = TagFilter(any=("cat",), none=("dog",))
    options = SearchOptions(k=1000, filter=wanted)
    answers = []
    for start in range(2):
        with (
            SearchProcess(tmp_path, encoder.target) as process,
            Client(process.target, encoder.target) as client,
        ):
            if start == 0:
                spec = CollectionSpec("tags", "m", 20, 4, FeatureDtype.F32)
                client.create_collection("tags", spec=spec)
                client.upsert("tags", list(stored.values()))
            answers.append(seen(client.search("tags", id="007", options=options)))
    assert answers == [expected(stored, "007", wanted, 1000)] * 2


def test_expired_items_go_by_themselves(client: Client, stored: dict[str, Item]) -> None:
    spec = CollectionSpec("short", "m", 20, 4, FeatureDtype.F32)
    client.create_collection("short", spec=spec)
    soon = int(time.time() * 1000) + 300
    items = [
        replace(stored["000"], expires_unix_ms=soon),
        stored["001"],
        replace(stored["002"], expires_unix_ms=soon + 3_600_000),
    ]
    version = client.upsert("short", items).version
    wait_until(lambda: client.collection("short").n_items == 2, "the item has expired")
    assert client.collection("short").version == version + 1
    assert [item.id for item in client.get_items("short", ["000", "001", "002"])] == ["001", "002"]
    assert {h.id for h in client.search("short", id="001").hits} == {"001", "002"}
