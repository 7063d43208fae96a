"""`hashlens backup` and `hashlens restore` beside a real search service that is being written."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path

import numpy as np

from hashlens import Client, CollectionSpec, Embedding, FeatureDtype, Item, SearchOptions, codes
from hashlens.types import SearchResult
from search_service.backup import archive, commands
from search_service.storage import Store, StoreConfig
from tests.support.backups import hashlens
from tests.support.services import ServiceProcess
from tests.support.stores import contents, wait_until

NOBODY = "127.0.0.1:1"
SPEC = CollectionSpec("photos", "m", 48, 8, FeatureDtype.F32, 1000)


def service(folder: Path, name: str) -> ServiceProcess:
    arguments = ("--data-dir", str(folder / name), "--encoder", NOBODY)
    return ServiceProcess(
        "search_service", *arguments, "--checkpoint-interval-s", "0.2", log=folder / f"{name}.log"
    )


def make_item(rng: np.random.Generator, number: int) -> Item:
    """Codes and features from few values, so that distances tie."""
    embedding = Embedding(
        code=codes.pack(rng.random(SPEC.n_bits) < 0.1).tobytes(),
        n_bits=SPEC.n_bits,
        model_id=SPEC.model_id,
        feature=rng.integers(0, 2, SPEC.dim).astype(np.float32),
    )
    return Item(id=f"\u00e9{number}", embedding=embedding, payload=rng.bytes(number % 7))


def content(item: Item) -> tuple[str, bytes, bytes, bytes]:
    """What must come back, byte for byte."""
    assert item.embedding is not None
    assert item.embedding.feature is not None
    return item.id, item.embedding.code, item.embedding.feature.tobytes(), item.payload


def alive(steps: list[tuple[int, Item | None]]) -> list[Item]:
    """What is there after some steps."""
    return [item for item in dict(steps).values() if item is not None]


def answers(client: Client) -> list[SearchResult]:
    """To the same questions; what took how long is left out by the comparison."""
    rng = np.random.default_rng(7)
    queries = [make_item(rng, 0).embedding for _ in range(10)]
    options = SearchOptions(k=50, min_pool=100)
    return [client.search(SPEC.name, embedding=query, options=options) for query in queries]


def test_what_is_restored_answers_as_what_was_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps: list[tuple[int, Item | None]] = []
    """Item number and what it became, for each version."""
    stop = threading.Event()
    with service(tmp_path, "live") as live, Client(live.target, NOBODY) as client:
        client.create_collection(SPEC.name, spec=SPEC)

        def write() -> None:
            present: set[int] = set()
            while not stop.is_set():
                numbers = [int(i) for i in rng.integers(0, 400, size=20)]
                if rng.random() < 0.3:
                    gone = [number for number in dict.fromkeys(numbers) if number in present]
                    client.delete(SPEC.name, [f"\u00e9{number}" for number in gone])
                    steps.extend((number, None) for number in gone)
                    present.difference_update(gone)
                else:
                    items = [make_item(rng, number) for number in numbers]
                    client.upsert(SPEC.name, items).raise_for_failures()
                    steps.extend(zip(numbers, items, strict=True))
                    present.update(numbers)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            wait_until(
                lambda: client.collection(SPEC.name).checkpoint_version > 500, "a checkpoint"
            )
            done = hashlens("backup", "--data-dir", tmp_path / "live", "--output", tmp_path / "b")
        finally:
            stop.set()
            writer.join()
        assert done.returncode == 0, done.stderr
        version = archive.read(tmp_path / "b").collections[SPEC.name].seq
        assert f"version {version}" in done.stderr
        assert 500 < version < len(steps)
        # With the writer gone, the last checkpoint has everything, and so has the next backup.
        wait_until(
            lambda: client.collection(SPEC.name).checkpoint_version == len(steps), "the last one"
        )
        done = hashlens("backup", "--data-dir", tmp_path / "live", "--output", tmp_path / "c")
        assert done.returncode == 0, done.stderr
        expected = answers(client)

    for source, until in (("b", version), ("c", len(steps))):
        arguments = ("restore", tmp_path / source, "--data-dir", tmp_path / f"from-{source}")
        done = hashlens(*arguments)
        assert done.returncode == 0, done.stderr
        assert f"version {until}" in done.stderr
        done = hashlens(*arguments)
        assert done.returncode == 1
        assert "Drop it" in done.stderr
    earlier = {item.id: content(item) for item in alive(steps[:version])}
    with Store.open(StoreConfig(data_dir=tmp_path / "from-b")) as store:
        snapshot = store.get(SPEC.name).snapshot()
        assert snapshot.version == version
        assert earlier == {
            record.id: (record.id, record.code, record.feature, record.payload)
            for record in contents(snapshot).values()
        }
    with service(tmp_path, "from-c") as restored, Client(restored.target, NOBODY) as client:
        info = client.collection(SPEC.name)
        assert (info.version, info.n_items) == (len(steps), len(alive(steps)))
        ids = [item.id for item in alive(steps)]
        found = client.get_items(SPEC.name, ids, with_feature=True)
        assert [content(item) for item in found] == [content(item) for item in alive(steps)]
        for actual, wanted in zip(answers(client), expected, strict=True):
            assert actual.hits == wanted.hits
        more = [make_item(rng, number) for number in range(900, 910)]
        assert client.upsert(SPEC.name, more).version == len(steps) + 10


def test_the_package_has_both_commands() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
    entries = project["project"]["entry-points"]["hashlens.commands"]
    for name in ("backup", "restore"):
        assert entries[name] == f"{commands.__name__}:{getattr(commands, name).name}"
