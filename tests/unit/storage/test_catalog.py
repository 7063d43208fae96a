"""The scripts and the catalog against real servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import redis

from hashlens.errors import DeadlineError, InvalidInputError, NotFoundError, PreconditionError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Record, catalog, chunks, layout, scripts
from search_service.storage.catalog import Catalog
from search_service.storage.chunks import Raw
from search_service.storage.connection import run_script
from search_service.storage.keys import Keys, Meta
from search_service.storage.replicas import Identity
from tests.support.redis_server import RedisServer
from tests.support.stores import Model, assert_in_redis, log_record, make_record, make_records

S = 10.0
Names = Callable[[], str]


@pytest.fixture
def truth(server: RedisServer) -> Iterator[Catalog]:
    catalog = Catalog(server.url, attempt_timeout_s=5.0)
    yield catalog
    catalog.close()


def spec_of(name: str, **changes: object) -> CollectionSpec:
    fields = {"n_bits": 20, "dim": 2, "feature_dtype": FeatureDtype.F32, "expected_rows": 2000}
    return CollectionSpec(name=name, model_id="m", **{**fields, **changes})  # type: ignore[arg-type]


def raws(records: list[Record]) -> list[Raw]:
    return [Raw(r.id.encode(), log_record(r)) for r in records]


def doomed(*ids: str) -> list[Raw]:
    return [Raw(i.encode(), layout.pack_delete(i.encode())) for i in ids]


def log_of(client: redis.Redis, meta: Meta) -> list[layout.LogRecord]:
    entries = client.xrange(Keys(meta.spec.name).log)
    return [
        layout.unpack_record(int(entry_id.partition(b"-")[0]), fields[b"r"], 20, 8)
        for entry_id, fields in entries
    ]


def all_keys(client: redis.Redis, name: str) -> dict[bytes, bytes | None]:
    """Everything that a collection has in Redis, but for what expires."""
    keys = client.keys(f"hl:{{{name}}}:*")
    return {key: client.dump(key) for key in keys if b":req:" not in key}


def test_a_write_fills_buckets_and_log(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    meta, model = truth.create(spec_of(new_name()), S), Model()
    records = make_records(meta.spec, 600)
    written = truth.put(meta, raws(records), request_id="a", deadline_s=S)
    model.upsert(records)
    assert written == (600, 600)
    assert_in_redis(client, meta.spec.name, model)
    log = log_of(client, meta)
    assert [entry.seq for entry in log] == list(range(1, 601))
    assert [
        Record(e.id, e.code, e.feature, e.payload, layout.unpack_tags(e.tags), e.expires_ms)
        for e in log
    ] == records


def test_replacing_and_removing(truth: Catalog, client: redis.Redis, new_name: Names) -> None:
    meta, model = truth.create(spec_of(new_name(), expected_rows=1), S), Model()
    rng = np.random.default_rng(5)
    for step in range(30):
        ids = [f"i{n}" for n in rng.integers(0, 25, size=10)]
        records = [make_record(meta.spec, i, rng, b"" if step % 2 else None) for i in ids]
        truth.put(meta, raws(records), request_id=f"p{step}", deadline_s=S)
        model.upsert(records)
        gone = [f"i{n}" for n in rng.integers(0, 40, size=5)]
        before = model.version
        n_deleted = model.delete(gone)
        written = truth.delete(meta, doomed(*gone), request_id=f"d{step}", deadline_s=S)
        assert written == (before + n_deleted, n_deleted)
        assert_in_redis(client, meta.spec.name, model)
    assert len(log_of(client, meta)) == model.version


def test_a_repeated_write_changes_nothing(
    truth: Catalog, client: redis.Redis, new_name: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ITEMS", 3)
    meta = truth.create(spec_of(new_name()), S)
    items = raws(make_records(meta.spec, 10))
    first = truth.put(meta, items, request_id="same", deadline_s=S)
    gone = truth.delete(meta, doomed("i0", "i1", "x"), request_id="gone", deadline_s=S)
    truth.put(meta, items[:1], request_id="other", deadline_s=S)
    before = all_keys(client, meta.spec.name)
    assert truth.put(meta, items, request_id="same", deadline_s=S) == first == (10, 10)
    again = truth.delete(meta, doomed("i0", "i1", "x"), request_id="gone", deadline_s=S)
    assert again == gone == (12, 2)
    assert all_keys(client, meta.spec.name) == before
    ttl_s = client.ttl(Keys(meta.spec.name).request(meta.epoch, "same:0"))
    assert 0 < ttl_s <= 600


def test_a_redis_that_went_back_gets_no_writes(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    meta = truth.create(spec_of(new_name()), S)
    items = raws(make_records(meta.spec, 5))
    truth.put(meta, items, request_id="a", deadline_s=S, known_seq=0)
    before = all_keys(client, meta.spec.name)
    for request_id in ("a", "b"):
        with pytest.raises(PreconditionError, match="went back to version 5"):
            truth.put(meta, items, request_id=request_id, deadline_s=S, known_seq=6)
        with pytest.raises(PreconditionError, match="went back to version 5"):
            truth.delete(meta, doomed("i0"), request_id=request_id, deadline_s=S, known_seq=6)
    assert all_keys(client, meta.spec.name) == before
    assert truth.put(meta, items, request_id="c", deadline_s=S, known_seq=5).seq == 10


def test_a_redis_that_goes_back_between_chunks_gets_no_more(
    truth: Catalog, client: redis.Redis, new_name: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ITEMS", 4)
    meta = truth.create(spec_of(new_name()), S)
    run, calls = truth._script, iter([1, 0])

    def go_back(*arguments: object) -> object:
        if not next(calls):
            client.hset(Keys(meta.spec.name).meta, "seq", 3)
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(truth, "_script", go_back)
    with pytest.raises(PreconditionError, match="went back to version 3"):
        truth.put(meta, raws(make_records(meta.spec, 8)), request_id="a", deadline_s=S)


def test_a_write_that_was_interrupted_between_chunks_is_completed(
    truth: Catalog, client: redis.Redis, new_name: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ITEMS", 4)
    meta, model = truth.create(spec_of(new_name()), S), Model()
    records = make_records(meta.spec, 11)
    run, calls = truth._script, iter([1, 1, 0])

    def crash(*arguments: object) -> object:
        if not next(calls):
            raise KeyboardInterrupt
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(truth, "_script", crash)
    with pytest.raises(KeyboardInterrupt):
        truth.put(meta, raws(records), request_id="r", deadline_s=S)
    monkeypatch.setattr(truth, "_script", run)
    model.upsert(records[:8])
    assert_in_redis(client, meta.spec.name, model)
    assert truth.put(meta, raws(records), request_id="r", deadline_s=S) == (11, 11)
    model.upsert(records[8:])
    assert_in_redis(client, meta.spec.name, model)
    assert [entry.id for entry in log_of(client, meta)] == [r.id for r in records]


@pytest.mark.parametrize("change", ["code", "feature", "payload", "id", "more", "fewer", "delete"])
def test_a_request_id_stands_for_one_write(
    truth: Catalog, client: redis.Redis, new_name: Names, change: str
) -> None:
    meta = truth.create(spec_of(new_name()), S)
    records = make_records(meta.spec, 300)
    truth.put(meta, raws(records), request_id="r", deadline_s=S)
    before = all_keys(client, meta.spec.name)
    last = records[-1]
    changed = {
        "code": Record(last.id, b"\0\0\0", last.feature, last.payload),
        "feature": Record(last.id, last.code, b"01234567", last.payload),
        "payload": Record(last.id, last.code, last.feature, last.payload + b"x"),
        "id": Record("other", last.code, last.feature, last.payload),
    }
    if change == "delete":
        write, items = truth.delete, doomed("i1")
    elif change == "more":
        write, items = truth.put, raws([*records, changed["id"]])
    elif change == "fewer":
        write, items = truth.put, raws(records[:-1])
    else:
        write, items = truth.put, raws([*records[:-1], changed[change]])
    with pytest.raises(InvalidInputError, match="request id") as caught:
        write(meta, items, request_id="r", deadline_s=S)
    assert caught.value.field == "request_id"
    assert all_keys(client, meta.spec.name) == before


def test_buckets_stay_lists(truth: Catalog, client: redis.Redis, new_name: Names) -> None:
    meta = truth.create(spec_of(new_name(), expected_rows=4000), S)
    records = make_records(meta.spec, 4000)
    truth.put(meta, raws(records), request_id="r", deadline_s=S)
    keys = Keys(meta.spec.name)
    encodings = {
        client.object("encoding", key) for b in range(meta.n_buckets) for key in keys.buckets(b)
    }
    assert encodings == {b"listpack"}


def test_an_odd_id_is_any_text(truth: Catalog, client: redis.Redis, new_name: Names) -> None:
    meta, model = truth.create(spec_of(new_name()), S), Model()
    ids = ["a b", "{name}", "0", "'\"\\", "\u00fc", "e\u0301", "\u65e5\u672c", "x" * 1024]
    ids += ["\U0001f469\u200d\U0001f467", "\u202eabc"]
    records = [make_record(meta.spec, i, np.random.default_rng(1)) for i in ids]
    truth.put(meta, raws(records), request_id="\u00fc:0", deadline_s=S)
    model.upsert(records)
    assert_in_redis(client, meta.spec.name, model)


def test_large_items_are_cut_into_calls_of_their_own(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    spec = spec_of(new_name(), dim=32_768)
    meta, model = truth.create(spec, S), Model()
    rng = np.random.default_rng(2)
    records = [make_record(spec, f"i{n}", rng, rng.bytes(65_536)) for n in range(60)]
    items = raws(records)
    assert sum(len(item.record) for item in items) > chunks.CHUNK_BYTES
    assert truth.put(meta, items, request_id="r", deadline_s=S) == (60, 60)
    model.upsert(records)
    assert_in_redis(client, spec.name, model)
    requests = client.keys(f"hl:{{{spec.name}}}:req:*")
    assert len(requests) == 2


def test_creating_again_returns_what_is_there(truth: Catalog, new_name: Names) -> None:
    spec = spec_of(new_name())
    meta = truth.create(spec, S)
    assert truth.create(spec, S) == meta
    assert truth.meta(spec.name, S) == meta
    assert truth.create(spec_of(spec.name, dim=3), S) == meta
    assert spec.name in truth.names(S)


def test_of_many_who_create_at_once_all_get_the_same(server: RedisServer, new_name: Names) -> None:
    name = new_name()
    found: list[Meta] = []
    start = threading.Barrier(8)

    def create(dim: int) -> None:
        catalog = Catalog(server.url, attempt_timeout_s=5.0)
        start.wait()
        found.append(catalog.create(spec_of(name, dim=dim), S))
        catalog.close()

    threads = [threading.Thread(target=create, args=(i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_dropping_removes_everything_but_a_note(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    meta = truth.create(spec_of(new_name(), expected_rows=500_000), S)
    assert meta.n_buckets == 4096
    truth.put(meta, raws(make_records(meta.spec, 2000)), request_id="r", deadline_s=S)
    truth.trim(meta, "replica", 5, 10**6, S)
    assert truth.drop(meta.spec.name, S) == meta.epoch
    assert all_keys(client, meta.spec.name) == {}
    assert meta.spec.name not in truth.names(S)
    assert truth.dropped([meta.epoch, "other"], S) == {meta.epoch}
    assert truth.drop(meta.spec.name, S) is None
    assert truth.meta(meta.spec.name, S) is None
    with pytest.raises(NotFoundError, match="was dropped"):
        truth.put(meta, raws(make_records(meta.spec, 1)), request_id="x", deadline_s=S)


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("then", ["create", "drop"])
def test_a_drop_that_was_interrupted_is_completed(
    truth: Catalog,
    client: redis.Redis,
    new_name: Names,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    then: str,
) -> None:
    spec = spec_of(new_name(), expected_rows=100_000)
    meta = truth.create(spec, S)
    truth.put(meta, raws(make_records(spec, 300)), request_id="r", deadline_s=S)
    run, calls = truth._caller.run, iter(range(100))

    def crash(action: Callable[[redis.Redis], object], deadline_s: float) -> object:
        if next(calls) == step:
            raise KeyboardInterrupt
        return run(action, deadline_s)

    monkeypatch.setattr(truth._caller, "run", crash)
    try:
        truth.drop(spec.name, S)
        completed = True
    except KeyboardInterrupt:
        completed = False
    monkeypatch.setattr(truth._caller, "run", run)
    # meta, begin, note, three sweeps of 500 buckets, end, name.
    assert completed == (step >= 8)
    if then == "drop":
        truth.drop(spec.name, S)
        assert all_keys(client, spec.name) == {}
        assert spec.name not in truth.names(S)
        if step:
            assert truth.dropped([meta.epoch], S) == {meta.epoch}
        return
    again = truth.create(spec, S)
    if step < 2:
        assert (again.epoch, again.seq) == (meta.epoch, 300)
    else:
        assert again.epoch != meta.epoch
        assert set(all_keys(client, spec.name)) == {Keys(spec.name).meta.encode()}
    assert spec.name in truth.names(S)


def test_a_slow_drop_does_not_touch_the_next_collection(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    spec = spec_of(new_name())
    old = truth.create(spec, S)
    truth.drop(spec.name, S)
    new, model = truth.create(spec, S), Model()
    records = make_records(spec, 50)
    truth.put(new, raws(records), request_id="r", deadline_s=S)
    model.upsert(records)
    # Whoever began the first drop wakes up only now.
    truth.finish_drop(old, S)
    assert_in_redis(client, spec.name, model)
    assert spec.name in truth.names(S)
    assert truth.meta(spec.name, S) == Meta(spec, new.epoch, new.n_buckets, 50, False)


def test_a_slow_drop_does_not_touch_what_was_restored(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    spec = spec_of(new_name())
    meta, model = truth.create(spec, S), Model()
    records = make_records(spec, 50)
    truth.put(meta, raws(records), request_id="r", deadline_s=S)
    model.upsert(records)
    # A drop had begun; then a person brought back a Redis from before.
    truth.finish_drop(meta, S)
    assert_in_redis(client, spec.name, model)
    assert spec.name in truth.names(S)


def test_a_write_that_runs_out_of_time_can_be_completed(
    truth: Catalog, client: redis.Redis, new_name: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ITEMS", 4)
    meta, model = truth.create(spec_of(new_name()), S), Model()
    records = make_records(meta.spec, 10)
    run, clock = truth._script, [0.0]

    def slow(*arguments: object) -> object:
        clock[0] += 6.0
        return run(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        patch.setattr(truth, "_script", slow)
        with pytest.raises(DeadlineError, match="after 8 of 10 items"):
            truth.put(meta, raws(records), request_id="r", deadline_s=10.0)
    assert truth.put(meta, raws(records), request_id="r", deadline_s=S) == (10, 10)
    model.upsert(records)
    assert_in_redis(client, meta.spec.name, model)


def test_an_old_request_id_means_nothing_to_a_new_collection(
    truth: Catalog, new_name: Names
) -> None:
    spec = spec_of(new_name())
    meta = truth.create(spec, S)
    truth.put(meta, raws(make_records(spec, 5)), request_id="r", deadline_s=S)
    truth.drop(spec.name, S)
    meta = truth.create(spec, S)
    assert truth.put(meta, raws(make_records(spec, 7)), request_id="r", deadline_s=S) == (7, 7)


def test_writes_of_another_epoch_are_refused(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    spec = spec_of(new_name())
    meta = truth.create(spec, S)
    stranger = Meta(spec, "another-epoch", meta.n_buckets, 0, False)
    for write, items in ((truth.put, raws(make_records(spec, 1))), (truth.delete, doomed("i0"))):
        with pytest.raises(PreconditionError, match="another one of that name"):
            write(stranger, items, request_id="r", deadline_s=S)
    client.delete(Keys(spec.name).meta)
    with pytest.raises(PreconditionError, match="does not have it"):
        truth.put(meta, raws(make_records(spec, 1)), request_id="r", deadline_s=S)
    assert truth.trim(meta, "replica", 1, 10, S) == "missing"
    assert all_keys(client, spec.name) == {}


def test_the_log_is_trimmed_to_the_slowest_replica(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    meta = truth.create(spec_of(new_name()), S)
    truth.put(meta, raws(make_records(meta.spec, 100)), request_id="r", deadline_s=S)

    def first() -> int:
        return log_of(client, meta)[0].seq

    assert truth.trim(meta, "a", 50, 10**6, S) == "ok"
    # The entry at the checkpoint stays, by which a replica knows the log.
    assert first() == 50
    keys = Keys(meta.spec.name)
    register = [keys.meta, keys.log, keys.replicas, keys.seen]
    run_script(client, scripts.REGISTER, register, [meta.epoch, "b", 55, 60])
    assert truth.trim(meta, "a", 90, 10**6, S) == "ok"
    assert first() == 55
    # Within a budget: who is too slow loses its place, and the log goes on.
    assert truth.trim(meta, "a", 100, 20, S) == "ok"
    assert first() == 80
    # A Redis that went back does not lose its log to a replica that is ahead.
    assert truth.trim(meta, "a", 101, 0, S) == "behind"
    assert first() == 80
    assert client.hgetall(keys.replicas) == {b"a": b"100", b"b": b"55"}


def test_the_log_does_not_wait_for_who_is_silent_or_has_lost_its_place(
    truth: Catalog, client: redis.Redis, new_name: Names
) -> None:
    meta = truth.create(spec_of(new_name()), S)
    truth.put(meta, raws(make_records(meta.spec, 100)), request_id="r", deadline_s=S)
    keys, replicas = Keys(meta.spec.name), truth.replicas
    for name, seq in (("a", 10), ("b", 20), ("c", 30)):
        replicas.register(meta, Identity(name), seq, S)
    replicas.hello(meta, Identity("b", "host:1"), 7, S)
    found = replicas.look(meta, S)
    assert (found.seq, found.first) == (100, 1)
    assert [(i.id, i.address, i.checkpoint_version, i.erased_version) for i in found.infos] == [
        ("a", "", 10, 0),
        ("b", "host:1", 20, 7),
        ("c", "", 30, 0),
    ]
    assert all(info.live and info.silent_ms < 60_000 for info in found.infos)
    # Nobody has heard of the slowest for a while.
    (seconds, _) = client.time()
    client.hset(keys.seen, "a", f"{(seconds - 100) * 1000} 0 host:2")
    assert truth.trim(meta, "d", 90, 10**6, S, silence_s=60, forget_s=1000) == "ok"
    found = replicas.look(meta, S, silence_s=60)
    assert found.first == 20
    assert [(i.id, i.live) for i in found.infos] == [
        *(("a", False), ("b", True), ("c", True), ("d", True))
    ]
    # It comes back, but what it needs is gone: nothing is kept for it.
    replicas.hello(meta, Identity("a", "host:2"), 0, S)
    replicas.register(meta, Identity("b", "host:1"), 40, S)
    assert truth.trim(meta, "c", 80, 10**6, S) == "ok"
    assert log_of(client, meta)[0].seq == 40
    assert not replicas.look(meta, S).infos[0].live
    # Silent for a day: forgotten.
    client.hset(keys.seen, "b", f"{(seconds - 90_000) * 1000} 0 host:1")
    assert truth.trim(meta, "c", 80, 10**6, S) == "ok"
    assert [info.id for info in replicas.look(meta, S).infos] == ["a", "c", "d"]
    truth.drop(meta.spec.name, S)
    assert all_keys(client, meta.spec.name) == {}
    with pytest.raises(PreconditionError):
        replicas.hello(meta, Identity("b"), 0, S)


def test_durability_is_what_the_server_is_set_to(truth: Catalog, client: redis.Redis) -> None:
    assert truth.durability(S) == "always"
    client.config_set("appendfsync", "everysec")
    try:
        assert truth.durability(S) == "everysec"
    finally:
        client.config_set("appendfsync", "always")


def test_durability_is_unknown_where_the_question_is_forbidden(
    server: RedisServer, client: redis.Redis
) -> None:
    client.acl_setuser(
        "shy", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-config"]
    )
    catalog = Catalog(f"{server.url}?username=shy&password=secret", attempt_timeout_s=5.0)
    assert catalog.durability(S) == "unknown"
    catalog.close()
    client.acl_deluser("shy")
