from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_service.storage import id_index, layout
from search_service.storage.id_index import IdIndex, StoredIds

IDS = st.one_of(
    st.sampled_from([f"i{n}" for n in range(10)]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.sampled_from(["x" * 1024, "\U0001f600" * 256, "x" * 1023 + "y", "\0", "\0\0"]),
)


def stored(ids: list[str]) -> StoredIds:
    encoded = [item_id.encode() for item_id in ids]
    records = np.zeros(len(ids), dtype=layout.ROW)
    records["id_end"] = np.cumsum([len(data) for data in encoded]) if ids else []
    return StoredIds(np.frombuffer(b"".join(encoded) + b"beyond", dtype=np.uint8), records)


def expected(ids: list[str], item_id: str, limit: int) -> int | None:
    return next((row for row in reversed(range(limit)) if ids[row] == item_id), None)


@given(at_start=st.lists(IDS, max_size=40), batches=st.lists(st.lists(IDS, max_size=9), max_size=8))
@settings(deadline=None, max_examples=150)
def test_it_finds_the_last_row_below_any_limit(
    at_start: list[str], batches: list[list[str]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_index, "_MIN_RECENT_ROWS", 12)
        patch.setattr(id_index, "_BLOCK_BYTES", 64)
        index, ids = IdIndex(), list(at_start)
        index.build(stored(ids), len(ids))
        for batch in batches:
            ids += batch
            index.extend(batch, stored(ids))
    wanted = [*dict.fromkeys(ids), "absent", "", "y" * 1025, "\ud800"]
    for limit in range(len(ids) + 1):
        found = index.last_rows(wanted, stored(ids[:limit]), limit)
        assert found == [expected(ids, item_id, limit) for item_id in wanted]


def test_ids_of_one_hash_are_told_apart() -> None:
    index, ids = IdIndex(), ["a", "b", "a", "c"]
    index._multipliers = np.zeros(1024, dtype=np.uint64)  # Everything collides.
    index.build(stored(ids), 4)
    assert index.last_rows(["a", "b", "c", "d"], stored(ids), 4) == [2, 1, 3, None]
    assert index.last_rows(["a", "b", "c"], stored(ids[:2]), 2) == [0, 1, None]


def test_ids_come_back_as_they_were_written() -> None:
    ids = ["a", "\u00e9\u00e9", "x" * 1024, "\U0001f600"]
    rows = np.array([3, 0, 0, 1, 2])
    assert stored(ids).of(rows) == [ids[row] for row in rows]


def test_one_thread_looks_up_while_another_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_index, "_MIN_RECENT_ROWS", 50)
    monkeypatch.setattr(id_index, "_RECENT_SHARE", 1 << 30)
    index = IdIndex()
    ids = [f"i{n % 500}" for n in range(3000)]
    whole = stored(ids)
    reached = 0
    wrong: list[str] = []

    def look_up() -> None:
        rng = np.random.default_rng(0)
        while reached < len(ids) and not wrong:
            limit = reached
            for n in rng.integers(0, 500, 5):
                at = StoredIds(whole.data, whole.records[:limit])
                found = index.last_rows([f"i{n}"], at, limit)[0]
                if found != (n + (limit - 1 - n) // 500 * 500 if n < limit else None):
                    wrong.append(f"i{n} below {limit}: {found}")

    readers = [threading.Thread(target=look_up) for _ in range(2)]
    for reader in readers:
        reader.start()
    for lo in range(0, len(ids), 10):
        index.extend(ids[lo : lo + 10], StoredIds(whole.data, whole.records[: lo + 10]))
        reached = lo + 10
    for reader in readers:
        reader.join()
    assert not wrong
