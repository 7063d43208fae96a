"""`Compact` over the wire: two replicas as processes, the clients, the command."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hashlens import AsyncClient, Client, CollectionSpec, Embedding, FeatureDtype, Item
from hashlens.cli.main import main
from hashlens.errors import DeadlineError, NotFoundError
from hashlens.types import CompactResult, SearchOptions
from search_service.storage.embedded import find_server
from tests.support.redis_server import RedisServer
from tests.support.secrets import files_with, nowhere
from tests.support.services import ServiceProcess
from tests.support.stores import wait_until

MODEL = "a-model"
SECRETS = {
    "id": b"secret-id-81f3",
    "payload": b"secret-payload-4be1",
    "tag": b"secret-tag-07aa",
    "feature": b"secret-feature-16bytes__",
}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer(find_server()) as server:
        yield server


@pytest.fixture(scope="module")
def replicas(
    redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[tuple[ServiceProcess, Path]]]:
    """Two search services on one Redis, each with its data directory."""
    with contextlib.ExitStack() as stack:
        started = []
        for name in ("a", "b"):
            folder = tmp_path_factory.mktemp(name)
            process = ServiceProcess(
                "search_service",
                "--data-dir",
                str(folder / "data"),
                "--redis-url",
                redis.url,
                "--compaction-mb-per-s",
                "1",
                log=folder / "log",
            )
            started.append((stack.enter_context(process), folder / "data"))
        yield started


def item(i: int, seed: int = 0) -> Item:
    rng = np.random.default_rng((seed, i))
    feature = rng.standard_normal(12).astype(np.float16)
    return Item(
        id=f"i{i}",
        embedding=Embedding(rng.bytes(8), 64, MODEL, feature),
        payload=rng.bytes(20),
    )


def secret() -> Item:
    feature = np.frombuffer(SECRETS["feature"], np.float16)
    assert np.isfinite(feature).all()
    return Item(
        id=SECRETS["id"].decode(),
        embedding=Embedding(bytes(8), 64, MODEL, feature),
        payload=SECRETS["payload"],
        tags=(SECRETS["tag"].decode(),),
    )


def test_it_is_gone_from_both_replicas_and_from_redis(
    redis: RedisServer, replicas: list[tuple[ServiceProcess, Path]]
) -> None:
    (a, a_dir), (b, b_dir) = replicas
    places = [a_dir, b_dir, redis.directory]
    with Client(a.target, a.target) as client, Client(b.target, b.target) as other:
        spec = CollectionSpec("photos", MODEL, 64, 12, FeatureDtype.F16, 1000)
        client.create_collection("photos", spec=spec)
        client.upsert("photos", [*[item(i) for i in range(200)], secret()])
        client.upsert("photos", [item(i, seed=1) for i in range(50)])
        version = client.delete("photos", [secret().id]).version
        wait_until(lambda: knows(other, version), "the other replica follows")
        client.collection("photos")  # This one has it, too.
        for place in places:
            for name, paths in files_with(place, SECRETS).items():
                assert paths, (place, name)
        query = item(7, seed=2).embedding
        before = [answer(one, query, version) for one in (client, other)]
        result = client.compact("photos", wait_for_replicas=True, deadline_s=60)
        assert result.complete
        assert result.n_rows_erased == 51
        assert result.version > version
        assert result.log_begins_after >= version
        assert len(result.replicas) == 2
        assert all(one.erased_version >= result.version for one in result.replicas)
        assert all(file.gone for file in result.files)
        for place in places:
            wait_until(lambda place=place: nowhere(place, SECRETS), f"gone from {place}")
        assert [answer(one, query, result.version) for one in (client, other)] == before
        info = other.collection("photos")
        assert (info.n_dead_rows, info.n_items) == (0, 200)
        assert info.erased_version >= result.version
        # Writing goes on from here.
        assert client.upsert("photos", [item(0, seed=3)]).version == result.version + 1


def knows(client: Client, version: int) -> bool:
    try:
        return client.collection("photos").version >= version
    except NotFoundError:
        return False


def answer(client: Client, query: Embedding | None, version: int) -> list[tuple[object, ...]]:
    assert query is not None
    client.collection("photos")
    options = SearchOptions(k=30, min_version=version)
    found = client.search("photos", embedding=query, options=options)
    return [(hit.id, hit.hamming_bits, hit.distance) for hit in found.hits]


def test_a_deadline_that_is_over_says_that_it_goes_on(
    replicas: list[tuple[ServiceProcess, Path]],
) -> None:
    (a, _), _ = replicas
    with Client(a.target, a.target) as client:
        spec = CollectionSpec("large", MODEL, 64, 0, expected_rows=1000)
        client.create_collection("large", spec=spec)
        items = [
            Item(id=f"i{i}", embedding=Embedding(bytes(8), 64, MODEL), payload=bytes(40_000))
            for i in range(100)
        ]
        client.upsert("large", items)
        client.delete("large", ["i3"])
        # 4 MB at 1 MB/s; the longer the deadline, the more of it is kept for the answer to travel.
        with pytest.raises(DeadlineError, match="That goes on; ask again"):
            client.compact("large", deadline_s=2.5)
        result = client.compact("large", deadline_s=60)
        assert result.n_rows_erased == 1
        with pytest.raises(NotFoundError):
            client.compact("none")


def test_calls_share_the_work(replicas: list[tuple[ServiceProcess, Path]]) -> None:
    (a, _), _ = replicas

    async def ask() -> list[CompactResult]:
        async with AsyncClient(a.target, a.target) as client:
            spec = CollectionSpec("shared", MODEL, 64, 0, expected_rows=1000)
            await client.create_collection("shared", spec=spec)
            items = [Item(id=f"i{i}", embedding=Embedding(bytes(8), 64, MODEL)) for i in range(9)]
            await client.upsert("shared", items)
            await client.delete("shared", ["i1", "i2"])
            return await asyncio.gather(
                *[client.compact("shared", deadline_s=60) for _ in range(4)]
            )

    results = asyncio.run(ask())
    assert {result.n_rows_erased for result in results} == {2}
    assert {tuple(file.path for file in result.files) for result in results} == {
        tuple(file.path for file in results[0].files)
    }


def test_the_command_prints_a_receipt(replicas: list[tuple[ServiceProcess, Path]]) -> None:
    (a, _), _ = replicas
    with Client(a.target, a.target) as client:
        spec = CollectionSpec("cli", MODEL, 64, 0, expected_rows=1000)
        client.create_collection("cli", spec=spec)
        items = [Item(id=f"i{i}", embedding=Embedding(bytes(8), 64, MODEL)) for i in range(9)]
        client.upsert("cli", items)
        client.delete("cli", ["i1", "i2"])
    arguments = ["compact", "cli", "--wait", "--search", a.target, "--encoder", a.target]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].startswith("cli: 2 rows erased, all that were dead at version 1")
    assert any(line.startswith("  gone: collections/cli/ids-0.bin") for line in lines)
    assert "  file of Redis: written anew" in lines
    assert any(line.startswith("  replica ") for line in lines)
    assert lines[-1] == "complete"
    again = CliRunner().invoke(main, [*arguments, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["complete"] is True
