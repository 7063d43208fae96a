"""Three search processes on one Redis: whichever is asked, the answer is the same."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hashlens import Client, codes
from hashlens.cli.main import main
from hashlens.errors import DeadlineError, NotFoundError, UnavailableError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, Item, Rank, SearchOptions
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import ServiceProcess, wait_until

SPEC = CollectionSpec("c", "m", 64, 32, FeatureDtype.F16, 10_000)
WITHIN_S = 60.0
SILENCE_S = 5.0
"""Longer than a busy machine keeps a process from saying anything."""

N_ROUNDS = 12
N_ITEMS = 30


def embedding(rng: np.random.Generator) -> Embedding:
    """Few different bits, so that many rows are equally far."""
    packed = codes.pack(rng.random((1, SPEC.n_bits)) < 0.1)[0]
    feature = rng.standard_normal(SPEC.dim).astype(np.float16)
    return Embedding(packed.tobytes(), SPEC.n_bits, SPEC.model_id, feature)


def items(prefix: str, seed: int, n: int = N_ITEMS) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [
        Item(f"{prefix}{i}", embedding(rng), payload=rng.bytes(9), tags=(f"t{i % 3}",))
        for i in range(n)
    ]


QUERIES = [embedding(np.random.default_rng(seed)) for seed in range(4)]
IDS = [f"{prefix}{i}" for prefix in ("shared", "w0-", "w1-", "w2-") for i in range(N_ITEMS)]


@dataclass
class Cluster:
    """Search processes by number, each with its data directory, on one Redis."""

    folder: Path
    redis_url: str
    processes: dict[int, ServiceProcess] = field(default_factory=dict)
    clients: dict[int, Client] = field(default_factory=dict)

    def start(self, number: int) -> Client:
        folder = self.folder / f"r{number}"
        folder.mkdir(exist_ok=True)
        process = ServiceProcess(
            "search_service",
            *("--data-dir", str(folder / "data"), "--redis-url", self.redis_url),
            *("--encoder", "127.0.0.1:1", "--checkpoint-interval-s", "0.3"),
            *("--replica-silence-s", str(SILENCE_S), "--n-threads", "1"),
            log=folder / "log",
        ).start()
        self.processes[number] = process
        self.clients[number] = Client(search=process.target, encoder=process.target)
        return self.clients[number]

    def end(self, number: int, *, kill: bool = False) -> None:
        self.clients.pop(number).close()
        process = self.processes.pop(number)
        if kill:
            process.kill()
        else:
            assert process.stop() == 0

    def id_of(self, number: int) -> str:
        path = self.folder / f"r{number}" / "data" / "replica_id"
        return path.read_text().strip()

    def close(self) -> None:
        for number in list(self.processes):
            self.end(number, kill=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(server_binaries()[0]))
        made = Cluster(tmp_path_factory.mktemp("cluster"), server.url)
        stack.callback(made.close)
        for number in range(3):
            made.start(number)
        yield made


def options(version: int, **changes: object) -> SearchOptions:
    asked = SearchOptions(k=25, min_pool=40, with_payload=True, with_code=True)
    return replace(asked, min_version=version, **changes)  # type: ignore[arg-type]


def digest(client: Client, version: int) -> str:
    """Everything that a replica answers at a version, when nobody writes."""
    found: list[object] = []
    for query in QUERIES:
        for rank in (Rank.EUCLIDEAN, Rank.HAMMING):
            result = client.search("c", embedding=query, options=options(version, rank=rank))
            assert result.receipt.version == version
            found.append(result.hits)
            found.append((result.receipt.pool_size, result.receipt.pool_histogram))
        found += [part.hits for part in client.stream_ball("c", embedding=query, radius_bits=9)]
    found.append(
        [
            (item.id, item.payload, item.tags, item.embedding.code, item.embedding.feature.tolist())
            for item in client.get_items("c", IDS, with_feature=True)
            if item.embedding is not None and item.embedding.feature is not None
        ]
    )
    assert found[-1]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def assert_agree(cluster: Cluster, version: int) -> None:
    digests = {number: digest(client, version) for number, client in cluster.clients.items()}
    assert len(set(digests.values())) == 1, digests


def write(cluster: Cluster, number: int, seed: int, n: int = 4) -> int:
    """Write what the others overwrite, and what only this one writes; delete some."""
    client, version = cluster.clients[number], 0
    for i in range(n):
        client.upsert("c", items("shared", 100 * seed + i))
        client.upsert("c", items(f"w{number}-", 100 * seed + i + 50))
        version = client.delete("c", [f"shared{i}", f"w{number}-{i}"]).version
    return version


def test_replicas_answer_alike_while_all_are_written_to(cluster: Cluster) -> None:
    cluster.clients[0].create_collection("c", spec=SPEC)
    seen: list[dict[int, str]] = [{} for _ in cluster.clients]
    errors: list[BaseException] = []
    done = threading.Event()

    def writes(number: int) -> None:
        try:
            rng = np.random.default_rng(number)
            for turn in range(N_ROUNDS):
                version = write(cluster, number, seed=10 * number + turn, n=1)
                # Another replica has what this one has just acknowledged.
                mine = items(f"w{number}-", 7000 + number, n=2)
                cluster.clients[number].upsert("c", mine)
                version = cluster.clients[number].collection("c").version
                other = cluster.clients[int(rng.choice([i for i in range(3) if i != number]))]
                result = other.search("c", id=mine[1].id, options=options(version))
                assert result.hits[0].id == mine[1].id
                assert result.receipt.version >= version
        except BaseException as error:
            errors.append(error)

    def searches(number: int) -> None:
        try:
            while not done.is_set():
                result = cluster.clients[number].search(
                    "c", embedding=QUERIES[0], options=options(0)
                )
                seen[number][result.receipt.version] = repr(result.hits)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=writes, args=(i,)) for i in range(3)]
    searchers = [threading.Thread(target=searches, args=(i,)) for i in range(3)]
    for thread in writers + searchers:
        thread.start()
    for thread in writers:
        thread.join(120)
    done.set()
    for thread in searchers:
        thread.join(60)
    assert not errors, errors
    for mine, theirs in ((0, 1), (1, 2), (0, 2)):
        for version in seen[mine].keys() & seen[theirs].keys():
            assert seen[mine][version] == seen[theirs][version], version
    version = max(client.collection("c").version for client in cluster.clients.values())
    assert_agree(cluster, version)
    with pytest.raises(DeadlineError):
        cluster.clients[1].search(
            "c", embedding=QUERIES[0], options=options(version + 1), deadline_s=1.0
        )


def test_one_that_was_killed_catches_up(cluster: Cluster) -> None:
    cluster.end(2, kill=True)
    version = write(cluster, 0, seed=300)
    cluster.start(2)
    assert_agree(cluster, version)


def test_one_that_hung_for_too_long_copies_and_so_does_a_newcomer(cluster: Cluster) -> None:
    silent = cluster.id_of(2)
    before = cluster.clients[2].collection("c").version
    hung = cluster.processes[2].process.pid
    os.kill(hung, signal.SIGSTOP)
    version = 0

    def dropped() -> bool:
        # The log is trimmed at checkpoints, and those need something new.
        nonlocal version
        version = cluster.clients[0].upsert("c", items("shared", version, n=1)).version
        return not {info.id: info.live for info in cluster.clients[0].replicas("c")}[silent]

    wait_until(dropped, within_s=WITHIN_S, what="the log is not kept for it any more")
    version = write(cluster, 1, seed=400)

    def trimmed() -> bool:
        version = cluster.clients[1].upsert("c", items("shared", 401, n=1)).version
        found = {info.id: info for info in cluster.clients[1].replicas("c")}
        return found[cluster.id_of(0)].checkpoint_version >= version - 5

    wait_until(trimmed, within_s=WITHIN_S, what="the others have checkpoints")
    os.kill(hung, signal.SIGCONT)
    # It answers with what it has until it has the rest.
    asked = replace(options(before), k=1)
    assert cluster.clients[2].search("c", embedding=QUERIES[0], options=asked).hits
    cluster.start(3)
    for number in (2, 3):
        log = cluster.folder / f"r{number}" / "log"
        wait_until(
            lambda log=log: "c is copied" in log.read_text(), within_s=WITHIN_S, what="the copy"
        )
        wait_until(
            lambda n=number: writable(cluster.clients[n]), within_s=WITHIN_S, what="it follows"
        )
    version = write(cluster, 3, seed=500)
    assert_agree(cluster, version)
    assert all(c.collection("c").n_missing_features == 0 for c in cluster.clients.values())


def writable(client: Client) -> bool:
    try:
        return client.collection("c").writable
    except (UnavailableError, NotFoundError):
        return False


def test_the_replicas_can_be_listed(cluster: Cluster) -> None:
    target = cluster.processes[0].target
    version = cluster.clients[0].upsert("c", items("shared", 600)).version
    arguments = ["replicas", "c", "--search", target, "--encoder", target]
    listed: list[dict[str, Any]] = []

    def are_there() -> bool:
        listed[:] = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
        newest = {entry["checkpoint_version"] + entry["behind"] for entry in listed}
        return newest == {version} and all(entry["live"] for entry in listed)

    wait_until(are_there, within_s=WITHIN_S, what="all are live and the write is applied")
    assert {entry["id"] for entry in listed} == {cluster.id_of(i) for i in range(4)}
    targets = {process.target for process in cluster.processes.values()}
    assert {entry["address"] for entry in listed} == targets
    assert [entry["id"] for entry in listed if entry["answering"]] == [cluster.id_of(0)]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0
    assert all(target in shown.output for target in targets)
    assert CliRunner().invoke(main, ["replicas", "nobody", *arguments[2:]]).exit_code != 0


def test_drops_and_new_collections_reach_all(cluster: Cluster) -> None:
    before = cluster.clients[0].collection("c").epoch
    cluster.clients[1].drop_collection("c")
    made = cluster.clients[2].create_collection("c", spec=replace(SPEC, model_id="other"))
    assert made.epoch != before

    def has_changed(client: Client) -> bool:
        try:
            return client.collection("c").epoch == made.epoch
        except NotFoundError:
            return False

    for number, process in cluster.processes.items():
        # The others' clients wait for what they have written to the old one.
        with Client(search=process.target, encoder=process.target) as client:
            wait_until(
                lambda client=client: has_changed(client),
                within_s=WITHIN_S,
                what=f"replica {number} has the new one",
            )
            assert client.collection("c").n_items == 0
