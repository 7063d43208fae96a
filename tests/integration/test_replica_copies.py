"""Stores that copy each other's files over gRPC: in one process, so that a test can look inside."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hashlens.errors import (
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from hashlens.rpc.channel import ChannelSecurity
from hashlens.types import CollectionSpec, FeatureDtype
from hashlens.v1 import replica_service_pb2 as rpb
from search_service.replication import servicer
from search_service.replication.client import GrpcPeers
from search_service.storage import Collection, Store, StoreConfig, failpoints
from search_service.storage.leases import Lease
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.replicas import MAX_MESSAGE_BYTES, replica
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    contents,
    make_records,
    on_disk,
    wait_until,
)

SPEC = CollectionSpec("c", "m", 100, 64, FeatureDtype.F16, 1000)
WITHIN_S = 40.0
ConfigFor = Callable[..., StoreConfig]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One kind is enough: the scripts are tested on all."""
    with RedisServer(server_binaries()[0]) as running:
        yield running


@pytest.fixture
def config_for(server: RedisServer, tmp_path: Path) -> ConfigFor:
    """Configurations of replicas by name, on one Redis that is empty at the beginning."""
    with server.client() as client:
        client.flushall()

    def make(name: str, **changes: object) -> StoreConfig:
        config = StoreConfig(
            data_dir=tmp_path / name,
            redis_url=server.url,
            segment_bytes=8192,
            discovery_interval_s=0.1,
            hello_interval_s=0.1,
        )
        return replace(config, **changes)  # type: ignore[arg-type]

    return make


def fill(collection: Collection, model: Model, n: int, seed: int, prefix: str = "i") -> None:
    """Write some items, and remove a few of them."""
    records = make_records(SPEC, n, seed, prefix)
    collection.upsert(records, request_id=f"{prefix}{seed}", deadline_s=DEADLINE_S)
    model.upsert(records)
    doomed = [f"{prefix}{i}" for i in range(0, n, 7)]
    collection.delete(doomed, request_id=f"d{prefix}{seed}", deadline_s=DEADLINE_S)
    model.delete(doomed)


def trimmed(store: Store, model: Model) -> Collection:
    """Have the log begin at the newest write, so that nobody can begin from nothing."""
    collection = store.get("c")
    collection.wait_for(model.version, DEADLINE_S)
    collection.checkpoint()
    return collection


def assert_follows(store: Store, model: Model) -> Collection:
    """The replica has caught up, by whatever way, and takes writes."""
    wait_until(
        lambda: (
            (found := store.find("c")) is not None
            and found.info().writable
            and found.info().version >= model.version
        ),
        "the replica follows",
        WITHIN_S,
    )
    collection = store.get("c")
    assert_holds(collection, model)
    return collection


def test_a_newcomer_copies_and_then_follows(config_for: ConfigFor) -> None:
    model = Model()
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 300, seed=1)
        trimmed(a, model)
        fill(a.get("c"), model, 50, seed=2, prefix="after")
        with replica(config_for("b")) as b:
            copied = assert_follows(b, model)
            fill(copied, model, 50, seed=3, prefix="by-b")
            assert_holds(a.get("c"), model)
            assert_holds(b.get("c"), model)
            assert copied.info().n_missing_features == 0
            assert (b.counters.n_copied, b.counters.n_rebuilt) == (1, 0)
            assert len({info.id for info in a.replicas("c")}) == 2
            wait_until(
                lambda: all(info.live and info.address for info in a.replicas("c")),
                "both have said where they are",
                WITHIN_S,
            )
            assert copied.checkpoint() == model.version
            directory = config_for("b").data_dir / "collections"
            assert on_disk(directory / "c") == (model.version, model.items)
            assert not list(directory.glob(".copy-*"))
    assert not list((config_for("a").data_dir / "collections").glob(".*"))


def test_a_replica_that_was_silent_for_too_long_copies_again(config_for: ConfigFor) -> None:
    model, config = Model(), config_for("b", replica_silence_s=0.5)
    with replica(config_for("a", replica_silence_s=0.5)) as a:
        fill(a.create(SPEC), model, 100, seed=1)
        with replica(config) as b:
            assert_holds(b.get("c"), model)
            (b_id,) = [i.id for i in a.replicas("c") if i.id == b.get("c").info().replica_id]
        before = model.version
        fill(a.get("c"), model, 100, seed=2)

        def dropped() -> bool:
            trimmed(a, model)
            return not {info.id: info for info in a.replicas("c")}[b_id].live

        wait_until(dropped, "the log is not kept for it any more", WITHIN_S)
        with replica(config) as b:
            # What it has is served until the rest is there.
            assert b.get("c").snapshot().version >= before
            assert_follows(b, model)


def test_a_quarantined_collection_is_copied(config_for: ConfigFor) -> None:
    model = Model()
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 100, seed=1)
        with replica(config_for("b")) as b:
            assert_follows(b, model)
            b.get("c").checkpoint()
        trimmed(a, model)
        ids = config_for("b").data_dir / "collections" / "c" / "ids-0.bin"
        data = ids.read_bytes()
        ids.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with replica(config_for("b")) as b:
            assert_follows(b, model)
            assert b.get("c").info().n_missing_features == 0
        assert len(list((config_for("b").data_dir / "quarantine").iterdir())) == 1


def test_without_a_peer_the_files_are_made_anew_from_redis(config_for: ConfigFor) -> None:
    model = Model()
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 100, seed=1)
        trimmed(a, model)
    with replica(config_for("b", replica_silence_s=0.001, resync_patience_s=0.1)) as b:
        wait_until(lambda: b.get("c").info().writable, "the replica follows", WITHIN_S)
        info = b.get("c").info()
        assert (info.version, info.n_items) == (model.version, len(model.items))
        assert (b.counters.n_copied, b.counters.n_rebuilt) == (0, 1)
        # Nobody has their features any more.
        assert info.n_missing_features == len(model.items)


def test_a_peer_that_was_silent_is_waited_for(config_for: ConfigFor) -> None:
    # As after an outage of all: whoever is back first is not to lose what the next one brings.
    model = Model()
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 100, seed=1)
        trimmed(a, model)
    config = config_for("b", replica_silence_s=0.5, resync_patience_s=3600.0)
    with replica(config) as b:
        wait_until(lambda: "silent for" in b.get("c").info().detail, "it is missed", WITHIN_S)
        with replica(config_for("a")):
            assert assert_follows(b, model).info().n_missing_features == 0
        assert (b.counters.n_copied, b.counters.n_rebuilt) == (1, 0)


def test_a_source_with_a_flipped_byte_is_not_believed(config_for: ConfigFor) -> None:
    model = Model()
    config = config_for("b", resync_patience_s=3600.0)
    # It would find the byte itself, when it reads all its files after a second.
    with replica(config_for("a", scrub_mb_per_s=0.0)) as a:
        fill(a.create(SPEC), model, 300, seed=1)
        trimmed(a, model)
        files = config_for("a").data_dir / "collections" / "c"
        for name in ("features-0.s00001.f16", "ids-0.bin"):
            with flipped(files / name, 11), replica(config) as b:
                # Between two attempts; meanwhile it says that it is being copied.
                wait_until(
                    lambda b=b, name=name: f"{name} did not match" in b.get("c").info().detail,
                    "the difference is found",
                    WITHIN_S,
                )
                assert b.get("c").snapshot().rows == 0
                wait_until(
                    lambda b=b: "did not match" in refusal(b.get("c")), "a write is told", WITHIN_S
                )
            if name != "ids-0.bin":
                shutil.rmtree(config.data_dir)
        # Mended, it is copied: what had come whole has stayed.
        with replica(config) as b:
            assert_follows(b, model)


def refusal(collection: Collection) -> str:
    """What a write is told."""
    with pytest.raises(UnavailableError) as caught:
        fill(collection, Model(), 1, seed=9)
    return caught.value.message


class Gate:
    """Lets so many bytes of copies pass, and then none until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
        self._left = n_bytes
        self._lock = threading.Lock()
        self._opened = threading.Event()
        self._part = servicer._part
        monkeypatch.setattr(servicer, "_part", self._pass)

    def open(self) -> None:
        self._opened.set()

    def _pass(self, lease: Lease, name: str, offset: int) -> rpb.ReadFileResponse:
        reply = self._part(lease, name, offset)
        with self._lock:
            self._left -= len(reply.data)
            held = self._left < 0
        assert not held or self._opened.wait(2 * WITHIN_S)
        return reply


@contextlib.contextmanager
def flipped(path: Path, at: int) -> Iterator[None]:
    """Flip bits of a file's byte for a while, without a new inode: it stays mapped and linked."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        for value in (byte ^ 0x10, byte):
            file.seek(at)
            file.write(bytes([value]))
            file.flush()
            if value != byte:
                yield


def test_a_part_that_is_damaged_on_the_way_is_read_again(
    config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, damaged = Model(), threading.Event()
    whole = servicer._part

    def once(lease: object, name: str, offset: int) -> rpb.ReadFileResponse:
        reply = whole(lease, name, offset)  # type: ignore[arg-type]
        if not damaged.is_set():
            damaged.set()
            reply.data = bytes([reply.data[0] ^ 1]) + reply.data[1:]
        return reply

    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 100, seed=1)
        trimmed(a, model)
        monkeypatch.setattr(servicer, "_part", once)
        with replica(config_for("b", resync_patience_s=3600.0)) as b:
            assert_follows(b, model)
    assert damaged.is_set()


def test_only_so_many_copies_at_a_time_and_no_other_files(
    config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_service.storage.leases.PART_BYTES", 512)
    model = Model()
    peers = GrpcPeers(MAX_MESSAGE_BYTES, ChannelSecurity())
    # One part, so that the first is still at it when the second comes.
    gate = Gate(monkeypatch, 512)
    with replica(config_for("a"), max_copies=1) as a, contextlib.closing(peers):
        collection = a.create(SPEC)
        fill(collection, model, 300, seed=1)
        collection.wait_for(model.version, DEADLINE_S)
        wait_until(lambda: a.replicas("c")[0].address != "", "the replica says where it is")
        address = a.replicas("c")[0].address
        listing = peers.list_files(address, "c", collection.epoch, model.version)
        assert collection.info().checkpoint_version == model.version
        name = "features-0.s00000.f16"
        reading = peers.read_file(address, listing.lease, name, 1000)
        first = next(reading)
        path = config_for("a").data_dir / "collections" / "c" / name
        assert first == path.read_bytes()[1000:1512]
        with pytest.raises(OverloadedError) as refused:
            next(peers.read_file(address, listing.lease, name, 0))
        assert refused.value.retry_after_s > 0
        gate.open()
        reading.close()
        wait_until(lambda: readable(peers, address, listing.lease, name), "the place is free")
        for bad in ("../MANIFEST.json", "MANIFEST.json", "/etc/passwd", "", "ids-0.bin\0"):
            with pytest.raises(NotFoundError):
                next(peers.read_file(address, listing.lease, bad, 0))
        with pytest.raises(NotFoundError):
            next(peers.read_file(address, "no-such-lease", name, 0))
        with pytest.raises(InvalidInputError):
            next(peers.read_file(address, listing.lease, name, 1 << 40))
        with pytest.raises(PreconditionError):
            peers.list_files(address, "c", "another epoch", 0)
        with pytest.raises(NotFoundError):
            peers.list_files(address, "d", collection.epoch, 0)
        with pytest.raises(UnavailableError, match="only version"):
            peers.list_files(address, "c", collection.epoch, model.version + 1)
        with pytest.raises(InvalidInputError):
            peers.list_files(address, "../c", collection.epoch, 0)


def readable(peers: GrpcPeers, address: str, lease: str, name: str) -> bool:
    try:
        next(peers.read_file(address, lease, name, 0))
    except OverloadedError:
        return False
    return True


def test_leases_end_by_themselves_and_outlive_the_files(config_for: ConfigFor) -> None:
    model = Model()
    config = config_for("a")
    peers = GrpcPeers(MAX_MESSAGE_BYTES, ChannelSecurity())
    with replica(config) as a, contextlib.closing(peers):
        collection = a.create(SPEC)
        fill(collection, model, 100, seed=1)
        collection.wait_for(model.version, DEADLINE_S)
        wait_until(lambda: a.replicas("c")[0].address != "", "the replica says where it is")
        address = a.replicas("c")[0].address
        listing = peers.list_files(address, "c", collection.epoch, model.version)
        path = config.data_dir / "collections" / "c" / "rows-0.rec"
        whole = path.read_bytes()
        a.compact("c", deadline_s=WITHIN_S)
        assert not path.exists()
        found = b"".join(peers.read_file(address, listing.lease, "rows-0.rec", 0))
        assert found == whole[: len(found)]
        assert found
        a.lease(listing.lease).used_s -= config.lease_s  # Nobody has read since.
        wait_until(
            lambda: not list((config.data_dir / "collections").glob(".lease-*")),
            "the lease has ended",
        )
        with pytest.raises(NotFoundError):
            next(peers.read_file(address, listing.lease, "rows-0.rec", 0))


def test_a_copy_goes_on_where_it_stopped(
    config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_service.storage.leases.PART_BYTES", 512)
    model = Model()
    config = config_for("b", resync_patience_s=3600.0)
    draft = config.data_dir / "collections" / ".copy-c"

    def half_way() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in draft.iterdir()) > 20_000
        return False

    gate = Gate(monkeypatch, 30_000)
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 300, seed=1)
        trimmed(a, model)
        with replica(config) as b:
            wait_until(half_way, "half is copied", WITHIN_S)
            assert b.get("c").snapshot().rows == 0
        gate.open()
    before = {path.name: path.stat().st_size for path in draft.iterdir()}
    asked: dict[str, int] = {}
    read_file = GrpcPeers.read_file

    def spy(self: GrpcPeers, address: str, lease: str, name: str, offset: int) -> Iterator[bytes]:
        asked.setdefault(name, offset)
        return read_file(self, address, lease, name, offset)

    monkeypatch.setattr(GrpcPeers, "read_file", spy)
    with replica(config_for("a")) as a:
        fill(a.get("c"), model, 20, seed=5, prefix="later")
        trimmed(a, model)
        with replica(config) as b:
            assert_follows(b, model)
    before.pop("MANIFEST.json")
    assert {name: asked[name] for name in before if name in asked} == {
        name: size for name, size in before.items() if name in asked
    }
    assert sum(asked.values()) > 10_000


def test_a_source_may_compact_meanwhile(
    config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_service.storage.leases.PART_BYTES", 512)
    model = Model()
    config = config_for("b", resync_patience_s=3600.0)
    draft = config.data_dir / "collections" / ".copy-c"
    gate = Gate(monkeypatch, 10_000)
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 300, seed=1)
        collection = trimmed(a, model)
        with replica(config) as b:
            wait_until(draft.exists, "the copy has begun", WITHIN_S)
            # What is being copied is kept, so it does not count as gone.
            receipt = a.compact("c", deadline_s=DEADLINE_S)
            model.version += 1  # The request is a write of its own.
            assert receipt.n_rows_erased > 0
            assert not any(file.gone for file in receipt.files)
            assert not (collection.local.directory / "rows-0.rec").exists()
            gate.open()
            fill(collection, model, 30, seed=2, prefix="later")
            assert_follows(b, model)
            assert b.get("c").checkpoint() == model.version
            assert on_disk(config.data_dir / "collections" / "c") == (model.version, model.items)


def test_a_full_disk_holds_a_copy_up(config_for: ConfigFor) -> None:
    model = Model()
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 300, seed=1)
        trimmed(a, model)
        with failpoints.arm("copy.part", "enospc", 5), replica(config_for("b")) as b:
            wait_until(
                lambda: (found := b.find("c")) is not None and "No space" in found.info().detail,
                "the state says it",
                WITHIN_S,
            )
        with replica(config_for("b")) as b:
            assert_follows(b, model)


def test_a_dropped_collection_is_not_copied_any_more(
    config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_service.storage.leases.PART_BYTES", 512)
    model = Model()
    config = config_for("b")
    with replica(config_for("a"), bytes_per_s=20_000.0) as a:
        fill(a.create(SPEC), model, 300, seed=1)
        trimmed(a, model)
        with replica(config) as b:
            draft = config.data_dir / "collections" / ".copy-c"
            wait_until(draft.exists, "the copy has begun", WITHIN_S)
            a.drop("c")
            wait_until(lambda: b.find("c") is None, "the drop is noticed", WITHIN_S)
            wait_until(lambda: not draft.exists(), "the copy is given up", WITHIN_S)
            again = Model()
            fill(b.create(SPEC), again, 20, seed=3)
            assert_follows(a, again)


def test_a_replica_with_writes_that_redis_lost_waits_for_an_operator(
    config_for: ConfigFor, server: RedisServer, tmp_path: Path
) -> None:
    model = Model()
    with replica(config_for("a")) as a:
        fill(a.create(SPEC), model, 50, seed=1)
        trimmed(a, model)
    saved = tmp_path / "saved"
    shutil.copytree(config_for("a").data_dir, saved / "a")
    server.stop()
    shutil.copytree(server.directory / "appendonlydir", saved / "redis")
    server.start()
    with replica(config_for("b")) as b, replica(config_for("a")):
        assert_follows(b, model)
        lost = Model(dict(model.items), model.version)
        fill(b.get("c"), lost, 50, seed=2, prefix="lost")
        assert_holds(b.get("c"), lost)
        b.get("c").checkpoint()
    # Redis and the other replica are put back to before, and go on.
    server.stop()
    for name, to in (
        ("redis", server.directory / "appendonlydir"),
        ("a", config_for("a").data_dir),
    ):
        shutil.rmtree(to)
        shutil.copytree(saved / name, to)
    server.start()
    with replica(config_for("a")) as a:
        fill(a.get("c"), model, 80, seed=3, prefix="new")
        assert_follows(a, model)
        with replica(config_for("b")) as b:
            wait_until(lambda: "another write" in b.get("c").info().detail, "it is said", WITHIN_S)
            with pytest.raises(PreconditionError):
                fill(b.get("c"), Model(), 1, seed=9)
            assert contents(b.get("c").snapshot()) == lost.items
        # The operator's decision: what Redis has is right.
        shutil.rmtree(config_for("b").data_dir / "collections" / "c")
        with replica(config_for("b")) as b:
            assert_follows(b, model)


def test_a_peer_that_is_away_is_an_error_with_a_bound() -> None:
    peers = GrpcPeers(MAX_MESSAGE_BYTES, ChannelSecurity(), list_s=20.0, read_s=20.0)
    with contextlib.closing(peers):
        with pytest.raises(UnavailableError):
            peers.list_files("127.0.0.1:1", "c", "e", 0)
        with pytest.raises(UnavailableError):
            next(peers.read_file("127.0.0.1:1", "l", "n", 0))
    with pytest.raises(UnavailableError, match="stopping"):
        peers.list_files("127.0.0.1:1", "c", "e", 0)
