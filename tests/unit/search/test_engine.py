from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest

from hashlens import codes
from hashlens.errors import (
    CancelledError,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
)
from hashlens.types import Embedding, Rank, SearchOptions
from search_service import coarse, fine, narrow, scan
from search_service.cancel import Cancel
from search_service.engine import Engine, is_tiny
from search_service.index_keeper import IndexKeeper
from search_service.one_query import embedding_of
from search_service.snapshot import Snapshot, Texts

N_BITS = 12


def make(n: int = 100, dim: int = 5, n_bits: int = N_BITS, **fields: Any) -> Snapshot:
    rng = np.random.default_rng(1)
    return Snapshot.from_arrays(
        codes.pack(rng.random((n, n_bits)) < 0.5),
        n_bits=n_bits,
        features=rng.standard_normal((n, dim)).astype(np.float16) if dim else None,
        **fields,
    )


def test_a_stored_item_finds_itself_first() -> None:
    snapshot = make()
    result = Engine().search(snapshot, embedding_of(snapshot, "42"), SearchOptions(k=3))
    assert result.hits[0].id == "42"
    assert (result.hits[0].hamming_bits, result.hits[0].distance) == (0, 0.0)
    assert len(result.hits) == 3
    assert result.receipt.exact


def test_defaults_rank_by_feature_where_there_is_one() -> None:
    with_features, codes_only = make(), make(dim=0)
    query = embedding_of(with_features, "0")
    assert Engine().search(with_features, query).hits[0].distance is not None
    assert Engine().search(codes_only, query).hits[0].distance is None
    by_hamming = SearchOptions(rank=Rank.HAMMING)
    assert Engine().search(with_features, query, by_hamming).hits[0].distance is None


def test_order_is_distance_then_hamming_then_utf8_of_the_id() -> None:
    packed = np.array([[1], [0], [0], [0], [0]], dtype=np.uint8)
    features = np.array([[1], [1], [1], [1], [0.5]], dtype=np.float32)
    ids = ["a", "b", "\U0001f600", "\uffee", "z"]
    snapshot = Snapshot.from_arrays(packed, n_bits=1, features=features, ids=ids)
    query = Embedding(b"\0", 1, "", np.zeros(1, dtype=np.float32))
    hits = Engine().search(snapshot, query).hits
    assert [hit.id for hit in hits] == ["z", "b", "\uffee", "\U0001f600", "a"]
    hits = Engine().search(snapshot, query, SearchOptions(k=3, rank=Rank.HAMMING)).hits
    assert [hit.id for hit in hits] == ["b", "z", "\uffee"]


def test_infinite_distances_are_ordered_by_hamming_and_id() -> None:
    packed = np.array([[1], [0], [0], [0]], dtype=np.uint8)
    features = np.array([[3e38], [3e38], [3e38], [1]], dtype=np.float32)
    snapshot = Snapshot.from_arrays(
        packed, n_bits=1, features=features, ids=["a", "c", "b", "near"]
    )
    query = Embedding(b"\0", 1, "", np.array([-1.0], dtype=np.float32))
    hits = Engine().search(snapshot, query).hits
    assert [(hit.id, hit.distance) for hit in hits] == [
        ("near", 2.0),
        ("b", np.inf),
        ("c", np.inf),
        ("a", np.inf),
    ]


def test_an_empty_table_has_an_answer() -> None:
    snapshot = make(n=0, dim=0)
    query = Embedding(bytes(2), N_BITS, "")
    result = Engine().search(snapshot, query)
    assert result.hits == ()
    assert result.receipt.threshold_bits == 0
    assert result.receipt.pool_histogram == (0,)
    assert result.receipt.exact
    fixed = Engine().search(snapshot, query, SearchOptions(max_hamming_bits=3))
    assert (fixed.receipt.threshold_bits, fixed.receipt.pool_histogram) == (3, (0, 0, 0, 0))


def test_all_dead_is_as_empty() -> None:
    snapshot = make(n=70, dead=np.ones(70))
    query = Embedding(bytes(2), N_BITS, "", np.zeros(5, dtype=np.float32))
    result = Engine().search(snapshot, query)
    assert result.hits == ()
    assert result.receipt.rows_scanned == 0
    assert result.receipt.threshold_bits == 0


def test_automatic_threshold_holds_enough_and_one_less_would_not() -> None:
    snapshot = make(n=5000, dim=0, n_bits=64)
    query = Embedding(bytes(8), 64, "")
    # 20 is found by way of groups of rows, 1000 only by counting every row.
    for wanted in (20, 1000):
        receipt = Engine().search(snapshot, query, SearchOptions(k=1, min_pool=wanted)).receipt
        assert sum(receipt.pool_histogram) == receipt.pool_size >= wanted
        assert sum(receipt.pool_histogram[:-1]) < wanted
        assert len(receipt.pool_histogram) == receipt.threshold_bits + 1


def test_a_cut_pool_says_so() -> None:
    snapshot = make(n=300)
    query = embedding_of(snapshot, "7")
    options = SearchOptions(k=5, max_hamming_bits=N_BITS, max_pool=20)
    receipt = Engine().search(snapshot, query, options).receipt
    assert (receipt.pool_truncated, receipt.exact, receipt.pool_size) == (True, False, 20)
    assert sum(receipt.pool_histogram) == 300
    enough = replace(options, max_pool=300)
    receipt = Engine().search(snapshot, query, enough).receipt
    assert (receipt.pool_truncated, receipt.exact, receipt.pool_size) == (False, True, 300)
    # Without a fine stage there is no work to cap.
    coarse_only = replace(options, rank=Rank.HAMMING)
    receipt = Engine().search(snapshot, query, coarse_only).receipt
    assert (receipt.pool_truncated, receipt.exact, receipt.pool_size) == (False, True, 300)


def soft(bits: str, activations: list[float], **fields: Any) -> Embedding:
    """A query of a few bits, bit 0 first, and how sure it is of them."""
    packed = codes.pack(np.array([bit == "1" for bit in bits]))
    return Embedding(
        packed.tobytes(),
        len(bits),
        "",
        activations=np.array(activations, dtype=np.float32),
        **fields,
    )


def table_of(*rows: str, **fields: Any) -> Snapshot:
    packed = codes.pack(np.array([[bit == "1" for bit in row] for row in rows]))
    return Snapshot.from_arrays(packed, n_bits=len(rows[0]), **fields)


def test_of_equal_distances_those_come_first_that_differ_where_the_query_was_unsure() -> None:
    #                     id: 0      1       2       3       4       5
    snapshot = table_of("1000", "0100", "0010", "0001", "0000", "1100")
    query = soft("0000", [0.1, 0.45, 0.3, 0.45])  # Bits 1 and 3 weigh the same.
    by_hamming = SearchOptions(rank=Rank.HAMMING)
    result = Engine().search(snapshot, query, by_hamming)
    assert [hit.id for hit in result.hits] == ["4", "1", "3", "2", "0", "5"]
    assert [hit.hamming_bits for hit in result.hits] == [0, 1, 1, 1, 1, 2]
    assert (result.receipt.margins_used, result.receipt.exact) == (True, True)
    for k in range(1, 6):
        first = Engine().search(snapshot, query, replace(by_hamming, k=k, min_pool=0))
        assert first.hits == result.hits[:k]

    ignored = Engine().search(snapshot, query, replace(by_hamming, ignore_margins=True))
    without_h = Engine().search(snapshot, replace(query, activations=None), by_hamming)
    assert [hit.id for hit in ignored.hits] == ["4", "0", "1", "2", "3", "5"]
    assert ignored.hits == without_h.hits
    assert not ignored.receipt.margins_used
    assert not without_h.receipt.margins_used


def test_an_over_full_pool_keeps_whom_the_query_was_unsure_about() -> None:
    features = np.arange(5, dtype=np.float32)[:, None]
    snapshot = table_of("1000", "0100", "0010", "0001", "1100", features=features)
    query = soft("0000", [0.1, 0.45, 0.3, 0.45], feature=np.zeros(1, dtype=np.float32))
    options = SearchOptions(k=1, max_hamming_bits=1, max_pool=1)
    kept = {}
    for max_pool in (1, 2, 3, 4):
        # In the pool, features alone give the order.
        asked = replace(options, k=max_pool, max_pool=max_pool)
        result = Engine().search(snapshot, query, asked)
        kept[max_pool] = [hit.id for hit in result.hits]
        assert result.receipt.margins_used == result.receipt.pool_truncated == (max_pool < 4)
    assert kept == {1: ["1"], 2: ["1", "3"], 3: ["1", "2", "3"], 4: ["0", "1", "2", "3"]}
    oldest = Engine().search(snapshot, query, replace(options, ignore_margins=True))
    assert [hit.id for hit in oldest.hits] == ["0"]
    assert oldest.receipt.pool_truncated
    assert not oldest.receipt.margins_used


def test_the_code_says_what_a_bit_is_and_activations_only_how_sure() -> None:
    snapshot = table_of("1000", "0100", "0010", "0001")
    by_hamming = SearchOptions(rank=Rank.HAMMING)
    agreeing = soft("0000", [0.1, 0.45, 0.3, 0.4])
    contradicting = soft("0000", [0.9, 0.55, 0.7, 0.6])
    hits = Engine().search(snapshot, agreeing, by_hamming).hits
    assert Engine().search(snapshot, contradicting, by_hamming).hits == hits


def test_an_empty_table_and_a_sure_query() -> None:
    snapshot = make(n=0, dim=0)
    query = Embedding(bytes(2), N_BITS, "", activations=np.zeros(N_BITS, dtype=np.float32))
    result = Engine().search(snapshot, query)
    assert (result.hits, result.receipt.margins_used) == ((), True)


@pytest.mark.parametrize(
    "activations",
    [
        np.zeros(11, dtype=np.float32),
        np.zeros((1, 12), dtype=np.float32),
        np.full(12, np.nan, dtype=np.float32),
        np.full(12, 1.1, dtype=np.float32),
    ],
)
def test_activations_that_do_not_fit(activations: np.ndarray) -> None:
    snapshot = make()
    query = replace(embedding_of(snapshot, "0"), activations=activations)
    with pytest.raises(InvalidInputError) as caught:
        Engine().search(snapshot, query)
    assert caught.value.field == "query.embedding.activations"


def test_rows_without_feature_are_counted_and_still_answer_coarse_queries() -> None:
    has = np.ones(100)
    has[42] = 0
    snapshot = make(has_feature=has)
    stored = embedding_of(snapshot, "42")
    assert stored.feature is None
    query = replace(stored, feature=np.zeros(5, dtype=np.float32))
    everything = SearchOptions(k=100)
    result = Engine().search(snapshot, query, everything)
    assert "42" not in {hit.id for hit in result.hits}
    assert (result.receipt.rows_without_feature, result.receipt.exact) == (1, False)
    assert result.receipt.pool_size == 100
    result = Engine().search(snapshot, stored, replace(everything, rank=Rank.HAMMING))
    assert result.hits[0].hamming_bits == 0
    assert "42" in {hit.id for hit in result.hits}
    assert (result.receipt.rows_without_feature, result.receipt.exact) == (0, True)


def test_hits_carry_what_was_asked_for() -> None:
    snapshot = make()
    stored = embedding_of(snapshot, "3")
    activations = np.linspace(0, 1, N_BITS, dtype=np.float32)
    query = replace(stored, activations=activations)
    bare = Engine().search(snapshot, query).hits[1]
    assert (bare.code, bare.feature, bare.explanation) == (None, None, None)

    options = SearchOptions(k=20, with_code=True, with_feature=True, with_explanation=True)
    for hit in Engine().search(snapshot, query, options).hits:
        item = embedding_of(snapshot, hit.id)
        assert hit.code == item.code
        assert hit.feature is not None
        assert hit.feature.dtype == np.float16
        assert hit.feature.tolist() == item.feature.tolist()
        bits = [
            i for i in range(N_BITS) if (stored.code[i // 8] ^ item.code[i // 8]) >> (i % 8) & 1
        ]
        assert hit.explanation is not None
        assert list(hit.explanation.differing_bits) == bits
        assert len(bits) == hit.hamming_bits
        assert hit.explanation.certainty == pytest.approx(
            [abs(float(activations[i]) - 0.5) for i in bits]
        )
    without_h = Engine().search(snapshot, stored, options).hits[-1].explanation
    assert without_h is not None
    assert without_h.differing_bits
    assert without_h.certainty == ()


def test_timings_add_up() -> None:
    snapshot = make()
    timings = Engine().search(snapshot, embedding_of(snapshot, "1")).receipt.timings
    assert timings.total_ns == timings.coarse_ns + timings.fine_ns + timings.fetch_ns
    assert min(timings.coarse_ns, timings.fine_ns, timings.fetch_ns) > 0
    by_hamming = SearchOptions(rank=Rank.HAMMING)
    timings = Engine().search(snapshot, embedding_of(snapshot, "1"), by_hamming).receipt.timings
    assert timings.fine_ns == 0


def test_a_half_query_is_the_same_as_widened() -> None:
    snapshot = make()
    half = embedding_of(snapshot, "9")
    widened = replace(half, feature=half.feature.astype(np.float32))
    assert Engine().search(snapshot, half).hits == Engine().search(snapshot, widened).hits


def test_one_engine_serves_tables_of_different_sizes() -> None:
    engine = Engine()
    for n in (10, 5000, 10, 70):
        snapshot = make(n=n)
        assert engine.search(snapshot, embedding_of(snapshot, "9")).hits[0].id == "9"


@pytest.mark.parametrize("n_bits", [40, 200])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, n_bits: int) -> None:
    rng = np.random.default_rng(2)
    dead, has_feature = rng.random(1000) < 0.3, rng.random(1000) < 0.8
    snapshot = make(n=1000, n_bits=n_bits, dead=dead, has_feature=has_feature)
    rows = np.flatnonzero(~dead & has_feature)[::50]
    queries = [embedding_of(snapshot, str(row)) for row in rows]
    options = SearchOptions(k=100, min_pool=300, max_pool=250)

    def answers() -> list[Any]:
        results = [Engine().search(snapshot, query, options) for query in queries]
        return [(result.hits, result.receipt.pool_histogram) for result in results]

    whole = answers()
    monkeypatch.setattr(coarse, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(scan, "_SCAN_ROWS", 64)
    monkeypatch.setattr(scan, "_GATHERED_ROWS", 7)
    monkeypatch.setattr(narrow, "BLOCK_ROWS", 7)
    monkeypatch.setattr(narrow, "_CHOSEN_ROWS", 5)
    monkeypatch.setattr(fine, "_BLOCK_BYTES", 100)
    assert answers() == whole


def test_threads_take_turns_with_one_engine() -> None:
    snapshots = [make(n=n, n_bits=64) for n in (30_000, 20_000, 10_000)]
    asked = [(snapshots[i % 3], embedding_of(snapshots[i % 3], str(i))) for i in range(30)]
    want = [Engine().search(*pair).hits for pair in asked]
    engine = Engine()
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda pair: engine.search(*pair).hits, asked))
    assert got == want


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_the_answer_does_not_depend_on_the_number_of_threads() -> None:
    snapshot = make(n=30_000, n_bits=64)
    query = embedding_of(snapshot, "777")
    options = SearchOptions(k=500, with_code=True)
    before = numba.get_num_threads()
    try:
        answers = []
        for n_threads in (1, 2):
            numba.set_num_threads(n_threads)
            answers.append(Engine().search(snapshot, query, options))
    finally:
        numba.set_num_threads(before)
    assert answers[0].hits == answers[1].hits
    assert answers[0].receipt.pool_histogram == answers[1].receipt.pool_histogram


def test_no_such_id() -> None:
    dead = np.zeros(100)
    dead[5] = 1
    snapshot = make(dead=dead)
    for item_id in ("100", "5", ""):
        with pytest.raises(NotFoundError):
            embedding_of(snapshot, item_id)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 100_001}, "k"),
        ({"max_hamming_bits": -1}, "max_hamming_bits"),
        ({"max_hamming_bits": N_BITS + 1}, "max_hamming_bits"),
        ({"min_pool": -1}, "min_pool"),
        ({"max_pool": 9}, "max_pool"),
    ],
)
def test_options_out_of_range(change: dict[str, int], field: str) -> None:
    snapshot = make()
    with pytest.raises(InvalidInputError) as caught:
        Engine().search(snapshot, embedding_of(snapshot, "0"), SearchOptions(**change))
    assert caught.value.field == f"options.{field}"


def test_options_at_their_limits() -> None:
    snapshot = make()
    query = embedding_of(snapshot, "0")
    for change in ({"k": 100_000}, {"max_hamming_bits": N_BITS}, {"min_pool": 0}, {"max_pool": 10}):
        assert Engine().search(snapshot, query, SearchOptions(**change)).hits


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n_bits": 13}, "code.n_bits"),
        ({"code": bytes(1)}, "code.bits"),
        ({"code": b"\0\x10"}, "code.bits"),  # bit 12, padding
        ({"feature": None}, "feature"),
        ({"feature": np.zeros(5)}, "feature.dtype"),
        ({"feature": np.zeros(4, dtype=np.float32)}, "feature.dim"),
        ({"feature": np.zeros((1, 5), dtype=np.float32)}, "feature.dim"),
        ({"feature": np.array([0, 0, 0, 0, np.nan], dtype=np.float32)}, "feature.values"),
        ({"feature": np.array([0, 0, 0, 0, np.inf], dtype=np.float16)}, "feature.values"),
    ],
)
def test_a_query_that_does_not_fit(change: dict[str, Any], field: str) -> None:
    snapshot = make()
    with pytest.raises(InvalidInputError) as caught:
        Engine().search(snapshot, replace(embedding_of(snapshot, "0"), **change))
    assert caught.value.field == f"query.embedding.{field}"


def test_ranking_by_features_that_are_not_there() -> None:
    snapshot = make(dim=0)
    with pytest.raises(InvalidInputError) as caught:
        Engine().search(snapshot, embedding_of(snapshot, "0"), SearchOptions(rank=Rank.EUCLIDEAN))
    assert caught.value.field == "options.rank"


def test_another_models_query() -> None:
    snapshot = make(model_id="this")
    query = embedding_of(snapshot, "0")
    assert Engine().search(snapshot, query).hits
    with pytest.raises(PreconditionError):
        Engine().search(snapshot, replace(query, model_id="that"))


class CancelsItself(Cancel):
    """Raises its own flag at a certain poll."""

    def __init__(self, at_poll: int) -> None:
        super().__init__()
        self.polls_left = at_poll

    def check(self) -> None:
        self.polls_left -= 1
        if self.polls_left == 0:
            self.set()
        super().check()


def test_a_long_search_stops_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(scan, "_SCAN_ROWS", 64)
    snapshot = make(n=1000)
    query = embedding_of(snapshot, "0")
    n_polls = 0
    while True:
        n_polls += 1
        cancel = CancelsItself(at_poll=n_polls)
        try:
            Engine().search(snapshot, query, cancel=cancel)
        except CancelledError:
            continue
        break
    assert n_polls > 1000 / 64


def test_a_late_search_stops() -> None:
    snapshot = make()
    with pytest.raises(DeadlineError):
        Engine().search(snapshot, embedding_of(snapshot, "0"), cancel=Cancel(deadline_s=0))


def test_warm_up_can_be_repeated() -> None:
    engine = Engine()
    engine.warm_up()
    engine.warm_up()


def test_an_index_changes_how_much_is_compared_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coarse, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(coarse, "INDEX_SHARE", float("inf"))  # a table this small is scanned
    snapshot = replace(make(n=3000, n_bits=64), table_id="one")
    query = embedding_of(snapshot, "777")
    options = SearchOptions(k=5, max_hamming_bits=3, with_code=True)
    keeper = IndexKeeper(1 << 30, min_rows=1000)
    try:
        engine = Engine(indexes=keeper)
        scanned = engine.search(snapshot, query, options)
        assert keeper.wait_idle(60)
        indexed = engine.search(snapshot, query, options)
    finally:
        keeper.close()
    assert indexed.hits == scanned.hits
    assert indexed.receipt.pool_histogram == scanned.receipt.pool_histogram
    assert indexed.receipt.exact
    assert scanned.receipt.rows_scanned == snapshot.n_alive
    assert indexed.receipt.rows_scanned < 1000


def test_a_search_with_large_payloads_is_not_tiny() -> None:
    class WithPayloads:
        def __init__(self, length: int) -> None:
            self.length = length

        def payload_texts(self) -> Texts:
            ends = np.arange(1, 1001, dtype=np.uint64) * self.length
            return Texts(np.zeros(1, dtype=np.uint8), ends)

    plain = make(n=1000)
    asked = SearchOptions(k=1000, with_payload=True)
    for length, is_small in ((10, True), (65_536, False)):
        snapshot = replace(plain, ids=WithPayloads(length))
        assert is_tiny(snapshot, asked) == is_small
        assert is_tiny(snapshot, replace(asked, with_payload=False))
        assert is_tiny(snapshot, replace(asked, k=5))
