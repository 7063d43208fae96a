from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hashlens.errors import LimitError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, SearchOptions, SearchResult
from search_service.bench import claim_build
from search_service.bench.claim_ask import make_queries
from search_service.bench.claim_check import check
from search_service.bench.data import make_codes, make_features
from search_service.bench.load import Rows
from search_service.bench.report import WrongAnswerError
from search_service.engine import Engine
from search_service.snapshot import Snapshot

N, BITS, DIM, K = 600, 48, 12, 20
SPEC = CollectionSpec("c", "m", BITS, DIM, FeatureDtype.F16, N)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows(make_codes("trained", N, BITS, n_queries=3, seed=5), SPEC, 5)


@pytest.fixture(scope="module")
def snapshot(rows: Rows) -> Snapshot:
    return Snapshot.from_arrays(
        rows.codes.packed,
        n_bits=BITS,
        features=rows.features(np.arange(N)),
        ids=[rows.id_of(row) for row in range(N)],
        model_id="m",
    )


OPTIONS = [
    SearchOptions(k=K, min_pool=50, with_payload=False),
    SearchOptions(k=K, min_pool=50, max_pool=30, with_payload=False),
    SearchOptions(k=K, max_hamming_bits=BITS, with_payload=False),
    SearchOptions(k=K, max_hamming_bits=0, with_payload=False),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_right_answers_pass(rows: Rows, snapshot: Snapshot, options: SearchOptions) -> None:
    for query in make_queries(rows):
        check(rows, query, options, Engine().search(snapshot, query, options))


def swapped(result: SearchResult) -> SearchResult:
    first, *rest = result.hits
    return replace(result, hits=(*rest, first))


def nudged(result: SearchResult) -> SearchResult:
    first, *rest = result.hits
    return replace(result, hits=(replace(first, distance=first.distance * 0.999), *rest))


def one_missing(result: SearchResult) -> SearchResult:
    return replace(result, hits=result.hits[1:])


def one_twice(result: SearchResult) -> SearchResult:
    return replace(result, hits=(result.hits[0], *result.hits[:-1]))


def bits_off(result: SearchResult) -> SearchResult:
    first, *rest = result.hits
    return replace(result, hits=(replace(first, hamming_bits=first.hamming_bits + 1), *rest))


def threshold_off(result: SearchResult) -> SearchResult:
    threshold_bits = result.receipt.threshold_bits + 1
    return replace(result, receipt=replace(result.receipt, threshold_bits=threshold_bits))


@pytest.mark.parametrize(
    "spoil", [swapped, nudged, one_missing, one_twice, bits_off, threshold_off]
)
def test_wrong_answers_fail(
    rows: Rows, snapshot: Snapshot, spoil: Callable[[SearchResult], SearchResult]
) -> None:
    query = make_queries(rows)[0]
    result = Engine().search(snapshot, query, OPTIONS[0])
    with pytest.raises(WrongAnswerError):
        check(rows, query, OPTIONS[0], spoil(result))


def test_a_nearer_row_that_is_left_out_fails(rows: Rows, snapshot: Snapshot) -> None:
    query = make_queries(rows)[0]
    wider = replace(OPTIONS[0], k=K + 1)
    result = Engine().search(snapshot, query, wider)
    check(rows, query, wider, result)
    with pytest.raises(WrongAnswerError, match="nearer"):
        check(rows, query, OPTIONS[0], replace(result, hits=result.hits[1:]))


def test_rows_have_the_features_that_were_written(rows: Rows) -> None:
    dtype = np.dtype("<f2")
    whole = make_features(rows.codes.classes, DIM, dtype, seed=5)
    chosen = np.array([7, 3, 599, 3])
    assert np.array_equal(rows.features(chosen), whole[chosen])
    written: list[Embedding] = rows.embeddings(100, 103)
    for row, embedding in enumerate(written, 100):
        assert embedding.code == rows.codes.packed[row].tobytes()
        assert np.array_equal(embedding.feature, whole[row])


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    claim_build.check_room(tmp_path, SPEC)
    with pytest.raises(LimitError, match="fewer --rows"):
        claim_build.check_room(tmp_path, replace(SPEC, expected_rows=10**13))
    # The claim itself: 20 GB of features take less than 32 GB.
    claim = CollectionSpec("c", "m", 64, 4096, FeatureDtype.F16, 2_500_000)
    assert 20e9 < claim_build.needed_bytes(claim) < 32e9


def test_pictures_are_png_of_the_bundled_images() -> None:
    import io

    from PIL import Image

    from hashlens.cli.demo_data import load_demo_images

    found = claim_build.pictures(2)
    pixels, _, _ = load_demo_images()
    with Image.open(io.BytesIO(found[1])) as picture:
        assert picture.size == (224, 224)
        assert np.array_equal(np.asarray(picture)[::8, ::8], pixels[-1])
