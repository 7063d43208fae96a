"""The engine against brute force: same ids, same order, same bits of every distance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashlens import codes
from hashlens.errors import CancelledError, DeadlineError, InvalidInputError
from hashlens.packed import PackedHits
from hashlens.types import (
    Embedding,
    Rank,
    Receipt,
    SearchOptions,
    SearchResult,
    StageTimings,
)
from search_service import coarse, fine, margins, narrow, scan
from search_service.cancel import Cancel
from search_service.engine import Engine
from search_service.one_query import Ask
from search_service.snapshot import Snapshot
from tests.reference import search as slow

ENGINE = Engine()

ALPHABET = ["a", "b", "Z", "é", "\uffee", "\U0001f600"]  # the last two: UTF-16 has them reversed


@st.composite
def tables(draw: st.DrawFn) -> tuple[slow.Table, Snapshot, Embedding]:
    """Crowded codes and features, so that ties are everywhere; ids in no order."""
    n_bits = draw(st.one_of(st.sampled_from([1, 8, 12, 48, 64, 65, 512]), st.integers(1, 512)))
    n = draw(st.one_of(st.sampled_from([0, 1, 64, 65]), st.integers(0, 150)))
    dim = draw(st.sampled_from([0, 1, 3, 32, 40]))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 1000]))

    n_distinct = draw(st.sampled_from([1, 3, 200]))
    distinct = rng.random((n_distinct, n_bits)) < draw(st.sampled_from([0.5, 0.1]))
    packed = codes.pack(distinct[rng.integers(0, n_distinct, n)])
    features = rng.integers(0, levels, (n, dim)).astype(dtype) if dim else None
    ids = ["".join(rng.choice(ALPHABET, 2)) + str(row) for row in rng.permutation(n)]
    dead = rng.random(n) < 0.3 if draw(st.booleans()) else None
    has_feature = rng.random(n) < 0.7 if dim and draw(st.booleans()) else None
    if n and dim and has_feature is not None:
        features[~has_feature] = np.nan  # never read

    table = slow.Table(
        [code.tobytes() for code in packed], n_bits, ids, features, dead, has_feature
    )
    snapshot = Snapshot.from_arrays(
        packed,
        n_bits=n_bits,
        features=features,
        ids=ids,
        dead=dead,
        has_feature=has_feature,
        version=7,
        rows_per_segment=draw(st.sampled_from([1, 16, 64, 1024])),
    )
    near = distinct[0] ^ (rng.random(n_bits) < draw(st.sampled_from([0.0, 0.1, 0.5])))
    query = Embedding(
        code=codes.pack(near).tobytes(),
        n_bits=n_bits,
        model_id="",
        feature=rng.integers(0, levels, dim).astype(np.float32) if dim else None,
        # They need not agree with the code. Few levels make ties.
        activations={
            "none": None,
            "few": rng.choice([0, 0.25, 0.5, 1], n_bits).astype(np.float32),
            "many": rng.random(n_bits).astype(np.float32),
        }[draw(st.sampled_from(["none", "few", "many"]))],
    )
    return table, snapshot, query


@st.composite
def options(draw: st.DrawFn, n_bits: int) -> SearchOptions:
    k = draw(st.sampled_from([1, 2, 10, 100, 1000]))
    return SearchOptions(
        k=k,
        max_hamming_bits=draw(st.none() | st.integers(0, n_bits) | st.integers(0, min(3, n_bits))),
        min_pool=draw(st.sampled_from([0, 1, 20, 1000])),
        max_pool=draw(st.none() | st.integers(k, 2 * k)),
        rank=draw(st.sampled_from([Rank.AUTO, Rank.HAMMING])),
        ignore_margins=draw(st.sampled_from([False, False, True])),
    )


def assert_same(result: SearchResult, want: slow.Answer) -> None:
    assert [(hit.id, hit.hamming_bits, hit.distance) for hit in result.hits] == want.hits
    receipt = result.receipt
    assert receipt.threshold_bits == want.threshold_bits
    assert list(receipt.pool_histogram) == want.histogram
    assert receipt.pool_size == want.pool_size
    assert receipt.pool_truncated == want.truncated
    assert receipt.rows_without_feature == want.rows_without_feature
    assert receipt.exact == (not want.truncated and want.rows_without_feature == 0)


def compare(made: tuple[slow.Table, Snapshot, Embedding], chosen: SearchOptions) -> None:
    table, snapshot, query = made
    by_feature = chosen.rank is Rank.AUTO and snapshot.dim > 0
    activations = None if chosen.ignore_margins else query.activations
    want = slow.search(
        table,
        query.code,
        query.feature,
        k=chosen.k,
        radius_bits=chosen.max_hamming_bits,
        min_pool=chosen.min_pool,
        max_pool=chosen.max_pool,
        by_feature=by_feature,
        activations=activations,
    )
    result = ENGINE.search(snapshot, query, chosen)
    assert_same(result, want)
    packed = ENGINE.search(snapshot, query, replace(chosen, packed=True)).hits
    assert isinstance(packed, PackedHits)
    assert packed.unpacked() == result.hits
    assert result.receipt.rows_scanned == snapshot.n_alive
    assert result.receipt.version == 7
    has_a_say = not by_feature or want.truncated
    assert result.receipt.margins_used == (activations is not None and has_a_say)


@settings(max_examples=60)
@given(st.data(), tables())
def test_a_batch_answers_each_query_as_if_it_were_alone(data: st.DataObject, made: Any) -> None:
    """Whatever the neighbours ask, and whichever of them cannot be answered."""
    _, snapshot, query = made
    asks, want = [], []
    for _ in range(data.draw(st.integers(1, 6))):
        chosen = replace(
            data.draw(options(snapshot.n_bits)),
            packed=data.draw(st.booleans()),
            with_code=data.draw(st.booleans()),
        )
        kind = data.draw(st.sampled_from(["good", "good", "good", "wrong", "late", "left"]))
        cancel = Cancel(0 if kind == "late" else None)
        if kind == "left":
            cancel.set()
        asked = replace(query, code=query.code + b"\0") if kind == "wrong" else query
        asks.append(Ask(query=asked, options=chosen, cancel=cancel))
        refused = {"wrong": InvalidInputError, "late": DeadlineError, "left": CancelledError}
        want.append(refused.get(kind) or ENGINE.search(snapshot, query, chosen))
    got: dict[int, SearchResult | Exception] = {}

    def deliver(number: int, answer: SearchResult | Exception) -> None:
        assert number not in got
        got[number] = answer

    ENGINE.search_batch(snapshot, asks, deliver)
    assert sorted(got) == list(range(len(asks)))
    n_good = sum(isinstance(answer, SearchResult) for answer in want)
    for number, wanted in enumerate(want):
        answer = got[number]
        if isinstance(wanted, type):
            assert isinstance(answer, wanted)
            continue
        assert isinstance(answer, SearchResult)
        assert tuple(answer.hits) == tuple(wanted.hits)
        assert answer.receipt.timings.batch_queries >= n_good
        assert without_timings(answer.receipt) == without_timings(wanted.receipt)


def without_timings(receipt: Receipt) -> Receipt:
    return replace(receipt, timings=StageTimings())


@settings(max_examples=120)
@given(st.data(), tables())
def test_same_answer(data: st.DataObject, made: Any) -> None:
    compare(made, data.draw(options(made[1].n_bits)))


@settings(max_examples=40)
@given(st.data(), tables())
def test_same_answer_in_many_small_blocks(data: st.DataObject, made: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "_SERIAL_BYTES", 0)
        patch.setattr(scan, "_SCAN_ROWS", 64)
        patch.setattr(scan, "_GATHERED_ROWS", 7)
        patch.setattr(narrow, "BLOCK_ROWS", 7)
        patch.setattr(narrow, "_CHOSEN_ROWS", 5)
        patch.setattr(fine, "_BLOCK_BYTES", 100)
        patch.setattr(margins, "_BLOCK_ROWS", 7)
        compare(made, data.draw(options(made[1].n_bits)))


@settings(max_examples=20)
@given(st.data(), tables())
def test_same_answer_from_memory_maps(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, made: Any
) -> None:
    table, snapshot, query = made
    directory = tmp_path_factory.mktemp("snapshot")

    def mapped(name: str, array: np.ndarray | None) -> np.ndarray | None:
        if array is None or array.size == 0:
            return array
        path: Path = directory / name
        array.tofile(path)
        return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)

    on_disk = Snapshot(
        n_bits=snapshot.n_bits,
        dim=snapshot.dim,
        feature_dtype=snapshot.feature_dtype,
        version=snapshot.version,
        rows=snapshot.rows,
        n_alive=snapshot.n_alive,
        words=tuple(mapped(f"w{i}", words) for i, words in enumerate(snapshot.words)),
        ids=snapshot.ids,
        features=tuple(mapped(f"f{i}", part) for i, part in enumerate(snapshot.features)),
        rows_per_segment=snapshot.rows_per_segment,
        dead=mapped("dead", snapshot.dead),
        has_feature=mapped("has", snapshot.has_feature),
    )
    compare((table, on_disk, query), data.draw(options(snapshot.n_bits)))
