"""`hashlens export` and `import` against real services: what comes back is what was there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from hashlens import Client, CollectionSpec, Embedding, FeatureDtype, Item, codes
from hashlens.cli.main import main
from hashlens.cli.transfer import export_command
from hashlens.cli.transfer.columns import PART_ROWS
from hashlens.errors import OverloadedError, UnavailableError
from hashlens.types import WriteResult
from tests.integration.conftest import SearchProcess
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import ServiceProcess, wait_until

Hashlens = Callable[..., Result]
SUFFIXES = ["npz", "parquet", "arrow"]
N = 1500
"""More than one call reads."""


@pytest.fixture
def hashlens(encoder: ServiceProcess, search: SearchProcess) -> Hashlens:
    """Run a command against the services."""

    def run(*arguments: str | Path, status: int = 0) -> Result:
        flags = ["--encoder", encoder.target, "--search", search.target]
        result = CliRunner().invoke(main, [*map(str, arguments), *flags])
        assert result.exit_code == status, result.output
        return result

    return run


def items_for(spec: CollectionSpec, n: int, *, extras: bool) -> list[Item]:
    rng = np.random.default_rng(spec.n_bits)
    soon = int(time.time() * 1000) + 86_400_000
    found = []
    for i in range(n):
        feature = None
        if spec.dim:
            feature = rng.standard_normal(spec.dim).astype(spec.feature_dtype.numpy)
        embedding = Embedding(
            code=codes.pack(rng.random(spec.n_bits) < 0.5).tobytes(),
            n_bits=spec.n_bits,
            model_id=spec.model_id,
            feature=feature,
        )
        more: dict[str, Any] = {}
        if extras:
            more = {
                "payload": rng.bytes(i % 40),
                "tags": tuple(f"\u00e4{t}" for t in range(i % 4)),
                "expires_unix_ms": soon + i if i % 3 == 0 else 0,
            }
        found.append(
            Item(id=f"{i}/\u00fc\U0001f40d" if i % 2 else f"{i}", embedding=embedding, **more)
        )
    return found


def contents(items: list[Item]) -> dict[str, tuple[Any, ...]]:
    """All that an item is, byte for byte, by id."""
    found = {}
    for item in items:
        one = item.embedding
        assert one is not None
        feature = None if one.feature is None else (one.feature.dtype.str, one.feature.tobytes())
        identity = one.code, one.n_bits, one.model_id
        found[item.id] = (*identity, feature, item.payload, item.tags, item.expires_unix_ms)
    assert len(found) == len(items)
    return found


def stored(client: Client, name: str, ids: list[str]) -> dict[str, tuple[Any, ...]]:
    spec = client.collection(name).spec
    return contents(client.get_items(name, ids, with_feature=bool(spec.dim)))


SPECS = {
    "full": CollectionSpec("full", "a-model", 20, 7, FeatureDtype.F16),
    "wide": CollectionSpec("wide", "a-model", 64, 33, FeatureDtype.F32),
    "codes": CollectionSpec("codes", "a-model", 13, 0),
    "empty": CollectionSpec("empty", "a-model", 48, 3, FeatureDtype.F32),
}
SIZES = {"full": N, "wide": 300, "codes": 300, "empty": 0}


@pytest.fixture(scope="module")
def written(encoder: ServiceProcess, search: SearchProcess) -> dict[str, list[Item]]:
    """The collections that are exported, and what is in them."""
    found = {}
    with Client(search.target, encoder.target) as client:
        for name, spec in SPECS.items():
            client.create_collection(name, spec=spec)
            found[name] = items_for(spec, SIZES[name], extras=name != "codes")
            client.upsert(name, found[name])
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", list(SPECS))
def test_what_is_imported_is_what_was_exported(
    hashlens: Hashlens,
    client: Client,
    written: dict[str, list[Item]],
    tmp_path: Path,
    name: str,
    suffix: str,
) -> None:
    file, copy = tmp_path / f"items.{suffix}", f"{name}-{suffix}"
    summary = json.loads(hashlens("export", name, file, "--json").stdout)
    n = len(written[name])
    assert (summary["items"], summary["vanished"], summary["without_feature"]) == (n, 0, [])
    assert summary["version"] == client.collection(name).version
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    summary = json.loads(hashlens("import", file, copy, "--json").stdout)
    assert (summary["created"], summary["written"], summary["items"]) == (True, n, n)
    spec, made = SPECS[name], client.collection(copy).spec
    assert (made.model_id, made.n_bits, made.dim) == (spec.model_id, spec.n_bits, spec.dim)
    assert made.feature_dtype == spec.feature_dtype or not spec.dim
    ids = [item.id for item in written[name]]
    assert stored(client, copy, ids) == contents(written[name])

    # The same items make the same file, and the file alone says all of it.
    again = tmp_path / f"again.{suffix}"
    hashlens("export", copy, again)
    assert again.read_bytes() == file.read_bytes()
    assert f"{n:,} item" in hashlens("import", file, copy).stdout
    assert client.collection(copy).n_items == n


def test_codes_of_ones_own_made_with_numpy(
    hashlens: Hashlens, client: Client, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    bits = rng.random((50, 12)) < 0.5
    features = rng.standard_normal((50, 6)).astype(np.float32)
    file = tmp_path / "mine.npz"
    np.savez_compressed(
        file,
        ids=[f"picture {i}" for i in range(50)],
        codes=np.packbits(bits, axis=1, bitorder="little"),
        features=features,
        tags=["red\nround" if i % 2 else "" for i in range(50)],
    )
    result = hashlens("import", file, "mine", status=1)
    assert "--model-id" in result.output
    result = hashlens(
        "import", file, "mine", "--model-id", "my-net", "--n-bits", "12", "--dtype", "f16"
    )
    assert "(new): 50 items" in result.stdout
    [item] = client.get_items("mine", ["picture 7"], with_feature=True)
    assert item.embedding is not None
    assert item.embedding.feature is not None
    assert item.embedding.code == codes.pack(bits[7]).tobytes()
    np.testing.assert_array_equal(item.embedding.feature, features[7].astype(np.float16))
    assert item.tags == ("red", "round")
    # Into a collection that is there: nothing is rounded unasked, no other width is taken.
    result = hashlens("import", file, "mine", "--n-bits", "12", status=1)
    assert "--dtype f16 rounds" in result.output
    result = hashlens("import", file, "mine", "--n-bits", "11", status=1)
    assert "another collection" in result.output
    result = hashlens("import", file, "mine", "--model-id", "other", status=1)
    assert "another collection" in result.output


def test_a_table_of_ones_own(hashlens: Hashlens, client: Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    packed = rng.integers(0, 256, (30, 2), dtype=np.uint8)
    table = pa.table(
        {
            "ids": [str(i) for i in range(30)],
            "codes": [row.tobytes() for row in packed],
            "features": pa.array([[0.5 * i, 1.0] for i in range(30)], pa.large_list(pa.float32())),
            "payloads": pa.array([None, b"x"] * 15, pa.binary()),
            "caption": ["not ours"] * 30,
        }
    )
    file = tmp_path / "mine.parquet"
    pq.write_table(table, file, row_group_size=7)
    hashlens("import", file, "table", "--model-id", "my-net")
    [item] = client.get_items("table", ["17"], with_feature=True)
    assert item.embedding is not None
    assert item.embedding.feature is not None
    assert (item.embedding.code, item.payload) == (packed[17].tobytes(), b"x")
    assert item.embedding.feature.tolist() == [8.5, 1.0]


def test_nothing_is_written_of_a_file_with_a_wrong_row(
    hashlens: Hashlens, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "bad.npz"
    ids = [f"{i}" for i in range(9000)]
    ids[8999] = "17"
    np.savez(file, ids=ids, codes=np.zeros((9000, 1), np.uint8), model_id="m", n_bits=5)
    result = hashlens("import", file, "bad", status=1)
    assert "bad.npz: ids[8999]: '17' is the id of row 17, too" in result.output
    assert "bad" not in [info.spec.name for info in client.collections()]


def test_an_import_is_repeated_by_its_name(
    hashlens: Hashlens, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "items.npz"
    np.savez(file, ids=["a", "b"], codes=np.zeros((2, 1), np.uint8), model_id="m")
    first = hashlens("import", file, "named", "--request-id", "night", "--json").stdout
    again = hashlens("import", file, "named", "--request-id", "night", "--json").stdout
    assert json.loads(again)["version"] == json.loads(first)["version"] == 2
    assert json.loads(hashlens("import", file, "named", "--json").stdout)["version"] == 4


@pytest.fixture
def moving(client: Client, request: pytest.FixtureRequest) -> list[Item]:
    """Ten items in the collection of the test's own name."""
    name = str(request.node.name).replace("_", "-")[:64]
    spec = CollectionSpec(name, "m", 8, 2, FeatureDtype.F32)
    client.create_collection(name, spec=spec)
    items = items_for(spec, 10, extras=False)
    client.upsert(name, items)
    return items


def test_what_is_deleted_meanwhile_is_said(
    client: Client,
    hashlens: Hashlens,
    moving: list[Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get_items = Client.get_items
    deleted: list[int] = []

    def after_a_delete(
        self: Client, name: str, ids: list[str], *, min_version: int, **options: Any
    ) -> list[Item]:
        if not deleted:
            deleted.append(client.delete(name, [moving[3].id, moving[8].id]).version)
        return get_items(self, name, ids, min_version=max(min_version, deleted[0]), **options)

    monkeypatch.setattr(Client, "get_items", after_a_delete)
    result = hashlens("export", "test-what-is-deleted-meanwhile-is-said", tmp_path / "moving.arrow")
    assert "8 items at version 10" in result.stdout
    assert "2 items went before being read" in result.stdout


def test_a_replica_that_is_behind_is_asked_again(
    client: Client,
    hashlens: Hashlens,
    moving: list[Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has not yet seen all of what another one listed, which had newer writes than asked for."""
    get_items = Client.get_items

    def behind(
        self: Client, name: str, ids: list[str], *, min_version: int, **options: Any
    ) -> list[Item]:
        items = get_items(self, name, ids, min_version=min_version, **options)
        return items if min_version >= 10 else items[:7]

    monkeypatch.setattr(Client, "get_items", behind)
    monkeypatch.setattr(Client, "newest_version", lambda *_, **__: 7)
    name = "test-a-replica-that-is-behind-is-asked-again"
    client.collection(name)  # The ten are there.
    file = tmp_path / "items.npz"
    assert "10 items at version 7" in hashlens("export", name, file).stdout
    monkeypatch.undo()
    hashlens("import", file, "behind-copy")
    ids = [item.id for item in moving]
    assert stored(client, "behind-copy", ids) == contents(moving)


def test_it_waits_for_what_anyone_has_written(
    client: Client, hashlens: Hashlens, moving: list[Item], tmp_path: Path
) -> None:
    """Also where the replica has not applied it when the export begins."""
    name = "test-it-waits-for-what-anyone-has-written"
    for i in range(20):
        version = client.upsert(name, [replace(moving[0], id=f"new-{i}")]).version
        printed = hashlens("export", name, tmp_path / f"{i}.npz").stdout
        assert f"{11 + i} items at version {version}" in printed


def test_the_listing_waits(
    hashlens: Hashlens, moving: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a version that does not come: what is asked of the replica is what Redis has said."""
    monkeypatch.setattr(Client, "newest_version", lambda *_, **__: len(moving) + 1)
    monkeypatch.setattr(export_command, "EXPORT_DEADLINE_S", 0.5)
    result = hashlens("export", "test-the-listing-waits", tmp_path / "items.npz", status=1)
    # Whichever clock runs out first.
    assert re.search("version 11 has not come in time|Deadline Exceeded", result.stderr)
    assert not (tmp_path / "items.npz").exists()


def test_without_redis_it_has_what_the_replica_has(
    client: Client,
    hashlens: Hashlens,
    moving: list[Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(*_: Any, **__: Any) -> int:
        raise UnavailableError("Redis is away")

    name = "test-without-redis-it-has-what-the-replica-has"
    client.collection(name)  # The ten are there.
    monkeypatch.setattr(Client, "newest_version", away)
    result = hashlens("export", name, tmp_path / "items.npz")
    assert f"{len(moving)} items at version 10" in result.stdout
    assert "are missing: Redis is away" in result.stderr


def test_what_redis_has_lost_can_still_be_saved(encoder: ServiceProcess, tmp_path: Path) -> None:
    """The replica may have the only copy there is."""
    with (
        RedisServer(server_binaries()[0]) as redis,
        SearchProcess(tmp_path, encoder.target, "--redis-url", redis.url) as search,
        Client(search.target) as client,
    ):
        spec = CollectionSpec("lost", "m", 8, 2, FeatureDtype.F32)
        client.create_collection("lost", spec=spec)
        client.upsert("lost", items_for(spec, 10, extras=False))
        assert client.collection("lost").version == 10
        with redis.client() as owner:
            owner.flushall()
        wait_until(
            lambda: not client.collection("lost").writable, within_s=60, what="the loss is seen"
        )
        arguments = ["export", "lost", str(tmp_path / "items.npz"), "--search", search.target]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "10 items at version 10" in result.stdout
        assert "that this replica does not have are missing" in result.stderr


def test_items_without_their_feature_are_named(
    hashlens: Hashlens, moving: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items whose feature is missing are left out, named, and make the command fail."""
    get_items = Client.get_items

    def damaged(self: Client, name: str, ids: list[str], **options: Any) -> list[Item]:
        items = get_items(self, name, ids, **options)
        assert items[4].embedding is not None
        items[4] = replace(items[4], embedding=replace(items[4].embedding, feature=None))
        return items

    monkeypatch.setattr(Client, "get_items", damaged)
    result = hashlens(
        "export", "test-items-without-their-feature-are-named", tmp_path / "items.npz", status=1
    )
    assert "9 items at version 10" in result.stdout
    assert f"missing: 1 item\n    {moving[4].id}" in result.stdout


def test_an_import_goes_on_where_it_was_interrupted(
    hashlens: Hashlens, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 2 * PART_ROWS + 100
    file = tmp_path / "items.npz"
    np.savez(file, ids=[f"{i}" for i in range(n)], codes=np.zeros((n, 1), np.uint8), model_id="m")
    upsert = Client.upsert
    calls: list[str] = []

    def in_trouble(self: Client, *arguments: Any, request_id: str, **options: Any) -> WriteResult:
        calls.append(request_id)
        if len(calls) == 1:  # Written, but the answer never comes; it is asked for again.
            upsert(self, *arguments, request_id=request_id, **options)
            raise OverloadedError("busy", retry_after_s=0.001)
        if len(calls) == 3:
            raise UnavailableError("away")
        return upsert(self, *arguments, request_id=request_id, **options)

    monkeypatch.setattr(Client, "upsert", in_trouble)
    said = hashlens("import", file, "interrupted", status=1).output
    assert client.newest_version("interrupted") == PART_ROWS
    assert calls[0] == calls[1] != calls[2]
    name = said.split("--request-id ")[1].split()[0]
    monkeypatch.undo()
    summary = json.loads(
        hashlens("import", file, "interrupted", "--request-id", name, "--json").stdout
    )
    assert (summary["version"], summary["items"], summary["written"]) == (n, n, n)


def test_a_file_that_is_there_is_kept(
    hashlens: Hashlens, written: dict[str, list[Item]], tmp_path: Path
) -> None:
    file = tmp_path / "mine.npz"
    file.write_bytes(b"precious")
    assert "is there already" in hashlens("export", "codes", file, status=1).output
    assert file.read_bytes() == b"precious"
    assert "no format" in hashlens("export", "codes", tmp_path / "mine.csv", status=1).output
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
