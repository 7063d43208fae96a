"""Random histories of one collection against a dictionary, with the truth read past the store."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hashlens.codes import n_bytes
from hashlens.errors import InvalidInputError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, SearchOptions
from search_service.engine import Engine
from search_service.snapshot import Snapshot
from search_service.storage import Record, Store, StoreConfig
from tests.reference import search as reference
from tests.support.redis_server import RedisServer
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    contents,
    make_record,
    on_disk,
)

IDS = st.sampled_from([f"i{n}" for n in range(12)] + ["\u00e9", "\U0001f600", " ", "x" * 300])
BATCHES = st.lists(IDS, min_size=1, max_size=8)
NAMES = itertools.count()
ENGINE = Engine()
EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "8"))
"""Histories; ``make faults`` asks for more."""


class StoreMachine(RuleBasedStateMachine):
    """One replica that is written, checkpointed, closed, crashed and reopened."""

    server: RedisServer

    @initialize(
        n_bits=st.sampled_from([1, 48, 64, 65, 512]),
        dim=st.sampled_from([0, 5]),
        dtype=st.sampled_from(FeatureDtype),
        expected_rows=st.sampled_from([1, 1000]),
    )
    def begin(self, n_bits: int, dim: int, dtype: FeatureDtype, expected_rows: int) -> None:
        self.spec = CollectionSpec(f"s{next(NAMES)}", "m", n_bits, dim, dtype, expected_rows)
        self.model = Model()
        self.rng = np.random.default_rng(0)
        self.requests = itertools.count()
        self.last: tuple[str, list[Record], int] | None = None
        self.old: list[tuple[Snapshot, dict[str, Record]]] = []
        self.directory = Path(tempfile.mkdtemp(prefix="hl-state-"))
        self.open()
        self.collection = self.store.create(self.spec)

    def open(self) -> None:
        config = StoreConfig(
            data_dir=self.directory,
            redis_url=self.server.url,
            # Four rows of the wider dtype: a few writes need a file of features more.
            segment_bytes=80,
        )
        self.store = Store.open(config)

    @rule(ids=BATCHES, payload=st.sampled_from([None, b"", b"p" * 500]))
    def upsert(self, ids: list[str], payload: bytes | None) -> None:
        records = [make_record(self.spec, item_id, self.rng, payload) for item_id in ids]
        request_id = f"r{next(self.requests)}"
        version = self.collection.upsert(records, request_id=request_id, deadline_s=DEADLINE_S)
        self.model.upsert(records)
        assert version == self.model.version
        self.last = (request_id, records, version)

    @rule(ids=BATCHES)
    def delete(self, ids: list[str]) -> None:
        request_id = f"r{next(self.requests)}"
        result = self.collection.delete(ids, request_id=request_id, deadline_s=DEADLINE_S)
        assert result.n_deleted == self.model.delete(ids)
        assert result.version == self.model.version

    @precondition(lambda self: self.last is not None)
    @rule()
    def repeat(self) -> None:
        assert self.last is not None
        request_id, records, version = self.last
        deadline_s = DEADLINE_S
        again = self.collection.upsert(records, request_id=request_id, deadline_s=deadline_s)
        assert again == version
        with pytest.raises(InvalidInputError):
            self.collection.delete(["i0"], request_id=request_id, deadline_s=deadline_s)

    @rule()
    def check(self) -> None:
        assert_holds(self.collection, self.model)
        self.old.append((self.collection.snapshot(), dict(self.model.items)))
        with self.server.client() as client:
            assert_in_redis(client, self.spec.name, self.model)

    @rule(
        code=st.binary(min_size=64, max_size=64),
        k=st.integers(1, 5),
        min_pool=st.integers(0, 9),
        max_pool=st.sampled_from([None, 5]),
    )
    def search(self, code: bytes, k: int, min_pool: int, max_pool: int | None) -> None:
        spec, items = self.spec, list(self.model.items.values())
        snapshot = self.collection.wait_for(self.model.version, DEADLINE_S)
        wanted = bytearray(code[: n_bytes(spec.n_bits)])
        if spec.n_bits % 8:
            wanted[-1] &= (1 << spec.n_bits % 8) - 1
        numbers = None
        features = None
        if spec.dim:
            dtype = spec.feature_dtype.numpy
            numbers = np.frombuffer(code[: spec.dim], dtype=np.uint8).astype(dtype) / 100
            features = np.array([np.frombuffer(r.feature, dtype) for r in items]).reshape(
                -1, spec.dim
            )
        # Age, which decides whom a cap keeps, is the order of the writes that count.
        table = reference.Table(
            [r.code for r in items], spec.n_bits, [r.id for r in items], features
        )
        expected = reference.search(
            table,
            bytes(wanted),
            numbers,
            k=k,
            radius_bits=None,
            min_pool=min_pool,
            max_pool=max_pool,
            by_feature=spec.dim > 0,
        )
        options = SearchOptions(k=k, min_pool=min_pool, max_pool=max_pool)
        query = Embedding(bytes(wanted), spec.n_bits, "m", numbers)
        found = ENGINE.search(snapshot, query, options)
        assert [(hit.id, hit.hamming_bits, hit.distance) for hit in found.hits] == expected.hits
        assert found.receipt.pool_size == expected.pool_size

    @rule()
    def checkpoint(self) -> None:
        self.collection.wait_for(self.model.version, DEADLINE_S)
        assert self.collection.checkpoint() == self.model.version
        self.check_disk()

    @rule()
    def compact(self) -> None:
        self.collection.wait_for(self.model.version, DEADLINE_S)
        done = self.collection.compact()
        assert done.erased_seq == self.model.version
        assert self.collection.snapshot().rows == len(self.model.items)
        assert_holds(self.collection, self.model)
        self.check_disk()

    @rule()
    def reopen(self) -> None:
        self.collection.wait_for(self.model.version, DEADLINE_S)
        self.store.close()
        self.check_disk()
        self.open()
        self.collection = self.store.get(self.spec.name)
        assert contents(self.collection.snapshot()) == self.model.items

    @rule()
    def crash(self) -> None:
        # What a killed process leaves: no last checkpoint, the log as it is.
        self.collection.checkpoint = lambda: 0  # type: ignore[method-assign]
        self.store.close()
        self.open()
        self.collection = self.store.get(self.spec.name)
        assert_holds(self.collection, self.model)

    def check_disk(self) -> None:
        directory = self.directory / "collections" / self.spec.name
        assert on_disk(directory) == (self.model.version, self.model.items)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            assert_holds(self.collection, self.model)
            for snapshot, items in self.old:
                assert contents(snapshot) == items
        finally:
            self.store.drop(self.spec.name)
            self.store.close()
            shutil.rmtree(self.directory)


def test_random_histories(server: RedisServer) -> None:
    machine = type("Machine", (StoreMachine,), {"server": server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
