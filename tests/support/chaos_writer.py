"""A writer that knows what must be there afterwards, for `tests.faults.chaos`."""

from __future__ import annotations

import random
import threading
import time

import numpy as np

from hashlens.errors import DeadlineError, NotFoundError, OverloadedError, UnavailableError
from hashlens.types import Embedding, Item
from search_service.storage import Record
from tests.support.chaos_cluster import NAME, SPEC, Cluster
from tests.support.stores import FAR_MS

N_IDS = 120
ACKNOWLEDGED_S = 80.0
"""Within this time a write is acknowledged, whatever happens."""


def embedding(rng: np.random.Generator) -> Embedding:
    feature = rng.standard_normal(SPEC.dim).astype(np.float16)
    return Embedding(rng.bytes(SPEC.n_bits // 8), SPEC.n_bits, SPEC.model_id, feature)


def query(number: int) -> Embedding:
    return embedding(np.random.default_rng(number))


def record_of(item: Item) -> Record:
    """An item as the files have it."""
    assert item.embedding is not None
    feature = item.embedding.feature
    content = b"" if feature is None else feature.tobytes()
    tags = tuple(sorted(item.tags))
    return Record(item.id, item.embedding.code, content, item.payload, tags, item.expires_unix_ms)


class Writer:
    """Writes ids that nobody else writes, each call again and again until it is acknowledged."""

    def __init__(self, number: int, seed: int, cluster: Cluster, n_replicas: int) -> None:
        self._n_replicas = n_replicas
        self.number = number
        self.items: dict[str, Record] = {}
        """What was acknowledged, but for what expires soon."""
        self.last_expiry_ms = 0
        self._written: set[Record] = set()
        self._cluster = cluster
        self._draw = random.Random(f"{seed}-{number}")
        self._rng = np.random.default_rng([seed, number])
        self._n_calls = 0

    def has_written(self, record: Record) -> bool:
        return record in self._written

    def run(self, stop: threading.Event) -> None:
        """Write until told to stop; what has been begun is finished."""
        while not stop.wait(self._draw.uniform(0, 0.05)):
            self._n_calls += 1
            kind = self._draw.random()
            if kind < 0.25:
                self._delete()
            elif kind < 0.35:
                self._upsert_short_lived()
            else:
                self._upsert(plain=kind < 0.65)

    def _upsert(self, *, plain: bool) -> None:
        """By column if all are plain; else one by one."""
        chosen = self._draw.sample(range(N_IDS), self._draw.randint(1, 30))
        items = [self._item(f"w{self.number}-{i}", plain=plain) for i in chosen]
        self._written |= {record_of(item) for item in items}
        self._until_acknowledged(items, [])
        self.items |= {item.id: record_of(item) for item in items}

    def _upsert_short_lived(self) -> None:
        expires_ms = time.time_ns() // 1_000_000 + self._draw.randint(200, 3000)
        self.last_expiry_ms = max(self.last_expiry_ms, expires_ms)
        item = Item(
            f"w{self.number}-short-{self._n_calls}",
            embedding(self._rng),
            payload=b"short",
            tags=("t0",),
            expires_unix_ms=expires_ms,
        )
        self._written.add(record_of(item))
        self._until_acknowledged([item], [])

    def _item(self, item_id: str, *, plain: bool) -> Item:
        payload = self._rng.bytes(self._draw.choice((0, 5, 3000, 30_000)))
        if plain:
            return Item(item_id, embedding(self._rng), payload=payload)
        tags = tuple(sorted({f"t{self._draw.randrange(4)}" for _ in range(2)}))
        expires_ms = FAR_MS if self._draw.random() < 0.2 else 0
        return Item(
            item_id,
            embedding(self._rng),
            payload=payload,
            tags=tags,
            expires_unix_ms=expires_ms,
        )

    def _delete(self) -> None:
        chosen = self._draw.sample(range(N_IDS), self._draw.randint(1, 12))
        ids = [f"w{self.number}-{i}" for i in chosen]
        self._until_acknowledged([], ids)
        for item_id in ids:
            self.items.pop(item_id, None)

    def _until_acknowledged(self, items: list[Item], ids: list[str]) -> None:
        request_id = f"w{self.number}-{self._n_calls}"
        present = sum(item_id in self.items for item_id in ids)
        ends_s = time.monotonic() + ACKNOWLEDGED_S
        while True:
            try:
                with self._cluster.client(self._draw.randrange(self._n_replicas)) as client:
                    if items:
                        done = client.upsert(NAME, items, request_id=request_id)
                        assert not done.failures, done.failures
                        assert done.n_written == len(items)
                    else:
                        removed = client.delete(NAME, ids, request_id=request_id)
                        assert removed.n_deleted == present, (removed, present, ids)
                return
            except (UnavailableError, DeadlineError, OverloadedError, NotFoundError) as error:
                if time.monotonic() > ends_s:
                    raise AssertionError("never acknowledged") from error
                time.sleep(0.1)
