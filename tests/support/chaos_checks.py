"""What must hold of replicas when all is quiet, for `tests.faults.chaos`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable

import numpy as np
import redis

from hashlens import Client
from hashlens.types import Rank, SearchOptions, TagFilter
from search_service.storage import Record
from tests.support.chaos_cluster import NAME, SPEC, Cluster
from tests.support.chaos_writer import query, record_of
from tests.support.services import wait_until
from tests.support.stores import extras, in_redis

TIDY_S = 60.0
MORE_DESCRIPTORS, MORE_THREADS = 60, 30
"""What a process may have more than when it was first looked at: pools fill up."""
FILTERS = (None, TagFilter(any=("t0", "t1")), TagFilter(all=("t2",), none=("t3",)))


def assert_alike(
    cluster: Cluster, server: redis.Redis, items: dict[str, Record], numbers: Iterable[int]
) -> None:
    """Redis and all replicas hold the items, and all give the same, right, answers."""
    expected = {
        i: (record.code, extras(record.payload, record.tags, record.expires_ms))
        for i, record in items.items()
    }
    found = {i: (code, more) for i, (_, code, more) in in_redis(server, NAME).items()}
    differ = [i for i in found.keys() | expected.keys() if found.get(i) != expected.get(i)]
    assert not differ, f"Redis: {[(i, found.get(i), expected.get(i)) for i in sorted(differ)[:3]]}"
    version = int(server.hget(f"hl:{{{NAME}}}:meta", "seq") or 0)
    answers = {}
    for number in numbers:
        with cluster.client(number) as client:
            _assert_holds(client, number, items, version)
            answers[number] = _answers(client, items, version)
    first = answers[min(answers)]
    for number, said in answers.items():
        for mine, theirs in zip(first, said, strict=True):
            assert mine == theirs, f"replica {number}: {theirs}, not {mine}"


def _assert_holds(client: Client, number: int, items: dict[str, Record], version: int) -> None:
    info = client.collection(NAME)
    assert info.detail == "", (number, info)
    assert (info.n_items, info.version) == (len(items), version), (number, info)
    assert info.n_missing_features == 0, (number, info)
    found = client.get_items(NAME, sorted(items), with_feature=True, min_version=version)
    held = {item.id: record_of(item) for item in found}
    differ = [i for i in items if held.get(i) != items[i]]
    assert not differ, (number, [(held.get(i), items[i]) for i in differ[:2]])


def _answers(client: Client, items: dict[str, Record], version: int) -> list[object]:
    said: list[object] = []
    for wanted in FILTERS:
        passing = {i: r for i, r in items.items() if wanted is None or _passes(wanted, r)}
        for i in range(3):
            for rank in (Rank.EUCLIDEAN, Rank.HAMMING):
                options = SearchOptions(
                    k=20, rank=rank, filter=wanted, min_version=version, with_code=True
                )
                result = client.search(NAME, embedding=query(i), options=options)
                assert result.receipt.exact
                assert result.receipt.rows_without_feature == 0
                assert result.receipt.version == version
                if rank is Rank.EUCLIDEAN:
                    _assert_nearest(i, [(h.id, h.distance) for h in result.hits], passing)
                said.append((result.hits, result.receipt.pool_histogram))
            ball = client.stream_ball(NAME, embedding=query(i), radius_bits=30, filter=wanted)
            said.append([part.hits for part in ball])
    return said


def _assert_nearest(
    number: int, hits: list[tuple[str, float | None]], passing: dict[str, Record]
) -> None:
    """The hits are at their distances, and nobody who is missing is nearer."""
    feature = query(number).feature
    assert feature is not None
    asked = feature.astype(np.float64)
    distances = {
        i: float(np.linalg.norm(np.frombuffer(r.feature, SPEC.feature_dtype.numpy) - asked))
        for i, r in passing.items()
    }
    assert len(hits) == min(20, len(passing))
    for item_id, distance in hits:
        assert distance is not None
        assert abs(distances[item_id] - distance) < 1e-3
    nearest = sorted(distances.values())[: len(hits)]
    assert np.allclose([d for _, d in hits if d is not None], nearest, atol=1e-3)


def _passes(wanted: TagFilter, record: Record) -> bool:
    tags = set(record.tags)
    return (
        (not wanted.any or bool(tags & set(wanted.any)))
        and tags >= set(wanted.all)
        and not tags & set(wanted.none)
    )


def assert_verified(cluster: Cluster, numbers: Iterable[int], items: dict[str, Record]) -> None:
    """`Verify` finds no difference on any replica, and the same digest on all."""
    digests = set()
    for number in numbers:
        with cluster.client(number) as client:
            found = client.verify(NAME, deadline_s=60)
        assert not found.differences, (number, found)
        assert found.n_catalog_items == found.n_array_items == len(items)
        digests.add(found.digest)
    assert len(digests) == 1, digests


def assert_tidy(cluster: Cluster, number: int) -> None:
    """No file, descriptor or thread is left over."""
    data_dir = cluster.data_dir(number)
    directory = data_dir / "collections" / NAME

    def leftovers() -> list[str]:
        names = [path.name for path in (data_dir / "collections").iterdir()]
        # A lease of a copy that was cut off is kept until its time is over.
        found = [name for name in names if name != NAME and not name.startswith(".lease-")]
        listed = set(json.loads((directory / "MANIFEST.json").read_bytes())["files"])
        return found + sorted({p.name for p in directory.iterdir()} ^ (listed | {"MANIFEST.json"}))

    def tidy() -> bool:
        try:
            return not leftovers()
        except FileNotFoundError:  # It is being written.
            return False

    wait_until(tidy, within_s=TIDY_S, what=f"replica {number} is tidy")
    quarantine = data_dir / "quarantine"
    if number == cluster.damaged:
        shutil.rmtree(quarantine, ignore_errors=True)
    assert not quarantine.exists(), list(quarantine.iterdir())
    counts = cluster.counts()[number]
    before = cluster.first_counts.setdefault(cluster.pid(number), counts)
    assert counts[0] - before[0] <= MORE_DESCRIPTORS, (number, before, counts)
    assert counts[1] - before[1] <= MORE_THREADS, (number, before, counts)
