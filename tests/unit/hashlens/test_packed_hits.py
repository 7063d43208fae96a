from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import convert
from hashlens.errors import InvalidInputError
from hashlens.packed import PackedHits
from hashlens.types import Hit, Receipt, SearchOptions, SearchResult
from hashlens.v1 import search_service_pb2 as spb

RECEIPT = Receipt(
    rows_scanned=9,
    threshold_bits=1,
    pool_size=3,
    pool_histogram=(1, 2),
    pool_truncated=False,
    rows_without_feature=0,
    exact=True,
    version=4,
)


def packed(hits: list[Hit], *, distances: bool, payloads: bool, codes: bool) -> PackedHits:
    ids = [hit.id.encode() for hit in hits]
    return PackedHits(
        id_bytes=b"".join(ids),
        id_ends=np.cumsum([len(item_id) for item_id in ids], dtype=np.uint32),
        hamming_bits=np.array([hit.hamming_bits for hit in hits], dtype=np.uint16),
        distances=(
            np.array([hit.distance for hit in hits], dtype=np.float32) if distances else None
        ),
        payload_bytes=b"".join(hit.payload for hit in hits) if payloads else b"",
        payload_ends=(
            np.cumsum([len(hit.payload) for hit in hits], dtype=np.uint32) if payloads else None
        ),
        codes=(
            np.frombuffer(b"".join(hit.code or b"" for hit in hits), dtype=np.uint8).reshape(-1, 2)
            if codes
            else None
        ),
    )


ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@st.composite
def columns(draw: st.DrawFn) -> tuple[list[Hit], PackedHits]:
    """Hits, and the same by column."""
    distances, payloads, codes = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    hits = [
        Hit(
            id=item_id,
            hamming_bits=draw(st.integers(0, 512)),
            distance=draw(st.floats(0, width=32)) if distances else None,
            payload=draw(st.binary(max_size=3)) if payloads else b"",
            code=draw(st.binary(min_size=2, max_size=2)) if codes else None,
        )
        for item_id in draw(st.lists(ids, max_size=8))
    ]
    return hits, packed(hits, distances=distances, payloads=payloads, codes=codes)


@given(columns())
def test_it_is_a_sequence_of_hits(made: tuple[list[Hit], PackedHits]) -> None:
    hits, view = made
    assert len(view) == len(hits)
    assert list(view) == hits
    assert view.unpacked() == tuple(hits)
    assert [view[i - len(hits)] for i in range(len(hits))] == hits
    assert view[1:3] == tuple(hits[1:3])
    assert view.ids() == [hit.id for hit in hits]
    assert view.payloads() == [hit.payload for hit in hits]
    with pytest.raises(IndexError):
        view[len(hits)]


@given(columns())
def test_what_is_sent_packed_comes_back(made: tuple[list[Hit], PackedHits]) -> None:
    _, view = made
    result = SearchResult(view, RECEIPT)
    message = convert.result_to_proto(result, n_bits=12, packed=True)
    again = spb.SearchResponse.FromString(message.SerializeToString())
    assert not again.hits
    back = convert.result_from_proto(again)
    assert back == result
    assert hash(back.hits) == hash(view)


@given(columns())
def test_what_is_spelled_out_is_what_hits_make(made: tuple[list[Hit], PackedHits]) -> None:
    hits, view = made
    by_column = convert.result_to_proto(SearchResult(view, RECEIPT), n_bits=12)
    one_by_one = convert.result_to_proto(SearchResult(tuple(hits), RECEIPT), n_bits=12)
    assert by_column == one_by_one
    assert convert.result_from_proto(by_column).hits == tuple(hits)


TWO = packed(
    [Hit("\u00e9", 1, 0.5, b"x", b"ab"), Hit("b", 2, 1.5, b"", b"cd")],
    distances=True,
    payloads=True,
    codes=True,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ids", b"\xc3\xa9bb"),  # longer than the ends say
        ("ids", b"\xff\xffb"),  # no text
        ("id_ends", b"\1\0\0\0\3\0\0\0"),  # one ends inside of a letter
        ("id_ends", b"\4\0\0\0\3\0\0\0"),  # backwards
        ("id_ends", b"\3\0\0\0"),
        ("hamming_bits", b"\1\0\2"),
        ("hamming_bits", b"\1\0"),
        ("distances", b""),
        ("payload_ends", b"\1\0\0\0"),
        ("payloads", b"xy"),
        ("codes", b"abc"),
        ("n_bits", 30),
    ],
)
def test_columns_that_do_not_fit_are_refused(field: str, value: Any) -> None:
    message = convert.packed_hits_to_proto(TWO, n_bits=16)
    assert convert.packed_hits_from_proto(message) == TWO
    setattr(message, field, value)
    with pytest.raises(InvalidInputError) as caught:
        convert.packed_hits_from_proto(message)
    assert caught.value.field == "packed"


@pytest.mark.parametrize(
    "change",
    [
        {"id_bytes": b"\xc3\xa9c"},
        {"hamming_bits": np.array([1, 3], dtype=np.uint16)},
        {"distances": None},
        {"payload_ends": None, "payload_bytes": b""},
        {"codes": None},
    ],
)
def test_views_of_other_hits_are_not_equal(change: dict[str, Any]) -> None:
    assert replace(TWO, **change) != TWO
    assert replace(TWO) == TWO
    assert tuple(TWO) != TWO


@pytest.mark.parametrize("other", ["with_feature", "with_explanation"])
def test_what_has_no_column_is_refused(other: str) -> None:
    message = spb.SearchOptions(k=1, packed=True, **{other: True})
    with pytest.raises(InvalidInputError) as caught:
        convert.options_from_proto(message)
    assert caught.value.field == "packed"


def test_the_option_travels() -> None:
    options = SearchOptions(k=3, packed=True)
    assert convert.options_from_proto(convert.options_to_proto(options)) == options
