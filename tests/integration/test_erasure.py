"""Erasing: bytes that were replaced or deleted are found before, and nowhere afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Collection, Record, Store, StoreConfig
from tests.support.secrets import files_with, nowhere
from tests.support.stores import DEADLINE_S, Model, assert_holds, make_records, wait_until

SPEC = CollectionSpec("c", "m", 64, 24, FeatureDtype.F16, 1000)
SECRETS = {
    "id": b"secret-id-5f1c",
    "payload": b"secret-payload-77ab",
    "tag": b"secret-tag-c0de",
    "feature": b"secret-feature-9e3d-is-24-numbers-of-two-bytes!.",
    "code": b"sEcReTc8",
}


def secret(**changes: object) -> Record:
    """An item with bytes that are nowhere else."""
    record = Record(
        SECRETS["id"].decode(),
        SECRETS["code"],
        SECRETS["feature"],
        SECRETS["payload"],
        (SECRETS["tag"].decode(),),
    )
    return replace(record, **changes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """One with a server of its own."""
    with Store.open(StoreConfig(data_dir=tmp_path / "a", discovery_interval_s=0.1)) as store:
        yield store


@pytest.mark.parametrize("how", ["delete", "update"])
def test_bytes_are_gone_from_all_files(store: Store, tmp_path: Path, how: str) -> None:
    collection, model = store.create(SPEC), Model()
    records = make_records(SPEC, 300)
    records[150] = secret()
    upsert(collection, model, records)
    secrets = dict(SECRETS)
    if how == "delete":
        delete(collection, model, [secret().id])
    else:
        upsert(collection, model, [replace(make_records(SPEC, 1, seed=9)[0], id=secret().id)])
        del secrets["id"]
    collection.wait_for(model.version, DEADLINE_S)
    collection.checkpoint()
    before = files_with(tmp_path / "a", secrets)
    for name, paths in before.items():
        assert any(path.startswith("redis/") for path in paths), name
        assert any(path.startswith("collections/") for path in paths), name
    receipt = store.compact(SPEC.name, deadline_s=60)
    assert receipt.complete
    assert receipt.n_rows_erased == 1
    assert receipt.version == model.version + 1
    assert receipt.log_begins_after >= model.version
    assert receipt.redis_rewritten
    assert [(one.erased_version, one.live) for one in receipt.replicas] == [(receipt.version, True)]
    held = {path for paths in before.values() for path in paths if path.startswith("collections/")}
    assert held <= {file.path for file in receipt.files}
    assert all(file.gone for file in receipt.files)
    assert not any((tmp_path / "a" / file.path).exists() for file in receipt.files)
    wait_until(lambda: nowhere(tmp_path / "a", secrets), "the bytes are gone")
    model.version = receipt.version
    assert_holds(collection, model)


def upsert(collection: Collection, model: Model, records: list[Record]) -> None:
    collection.upsert(records, request_id="", deadline_s=DEADLINE_S)
    model.upsert(records)


def delete(collection: Collection, model: Model, ids: list[str]) -> None:
    collection.delete(ids, request_id="", deadline_s=DEADLINE_S)
    model.delete(ids)
