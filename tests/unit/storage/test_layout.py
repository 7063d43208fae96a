from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens.errors import DataLossError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import layout

ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


tag_sets = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), max_size=5, unique=True
)
PLAIN = layout.pack_extras(b"PAY", b"", 0)


@given(
    item_id=ids,
    code=st.binary(min_size=1, max_size=64),
    payload=st.binary(),
    tags=tag_sets,
    expires_ms=st.integers(0, (1 << 63) - 1),
    feature=st.binary(),
)
def test_a_put_record_reads_back(
    item_id: str, code: bytes, payload: bytes, tags: list[str], expires_ms: int, feature: bytes
) -> None:
    packed = layout.pack_tags(tags)
    extras = layout.pack_extras(payload, packed, expires_ms)
    raw = layout.pack_put(item_id.encode(), code, extras, feature)
    record = layout.unpack_record(7, raw, 8 * len(code), len(feature))
    assert record == (7, layout.PUT, item_id, code, payload, packed, expires_ms, feature, raw)
    assert layout.unpack_tags(packed) == tuple(sorted(tags, key=str.encode))


@given(item_id=ids)
def test_a_delete_record_reads_back(item_id: str) -> None:
    raw = layout.pack_delete(item_id.encode())
    record = layout.unpack_record(9, raw, 64, 4096)
    assert record == (9, layout.DELETE, item_id, b"", b"", b"", 0, b"", raw)


def test_a_record_has_the_documented_bytes() -> None:
    raw = layout.pack_put("é".encode(), b"CODE", b"", b"FEATUR")
    assert raw == bytes.fromhex("01 0200 00000000 06000000") + b"\xc3\xa9CODEFEATUR"
    extras = layout.pack_extras(b"PAY", layout.pack_tags(["c", "ab", "c"]), 258)
    assert extras == bytes.fromhex("0201000000000000 0500") + b"\x02ab\x01cPAY"
    raw = layout.pack_put(b"x", b"CODE", extras, b"")
    assert raw == bytes.fromhex("01 0100 12000000 00000000") + b"xCODE" + extras
    assert layout.pack_delete(b"x") == bytes.fromhex("02 0100 00000000 00000000") + b"x"


@given(cut=st.integers(0, 35))
def test_a_cut_record_is_refused(cut: int) -> None:
    raw = layout.pack_put(b"id", b"CODE", PLAIN, b"FEATUR")
    assert len(raw) == 36
    with pytest.raises(DataLossError):
        layout.unpack_record(1, raw[:cut], 32, 6)


@pytest.mark.parametrize(
    ("raw", "n_bits", "feature_bytes"),
    [
        (layout.pack_put(b"id", b"CODE", b"", b"FEATUR"), 32, 8),
        (layout.pack_put(b"id", b"CODE", b"", b"FEATUR"), 40, 6),
        (layout.pack_put(b"id", b"CODE", b"", b""), 32, 6),
        (layout.pack_put(b"id", b"CODE", b"", b""), 30, 0),
        (layout.pack_put(b"", b"CODE", b"", b""), 32, 0),
        (layout.pack_put(b"\xff", b"CODE", b"", b""), 32, 0),
        (layout.pack_put(b"id", b"CODE", b"short", b""), 32, 0),
        (layout.pack_put(b"id", b"CODE", layout.pack_extras(b"", b"\x05ab", 0), b""), 32, 0),
        (layout.pack_put(b"id", b"CODE", layout.pack_extras(b"", b"\x00", 0), b""), 32, 0),
        (layout.pack_put(b"id", b"CODE", layout.pack_extras(b"", b"\x01b\x01a", 0), b""), 32, 0),
        (layout.pack_put(b"id", b"CODE", layout.pack_extras(b"", b"\x01\xff", 0), b""), 32, 0),
        (b"\x03" + layout.pack_put(b"id", b"CODE", b"", b"")[1:], 32, 0),
        (layout.pack_put(b"id", b"CODE", b"", b"") + b"x", 32, 0),
        (b"", 32, 0),
    ],
)
def test_a_record_of_something_else_is_refused(raw: bytes, n_bits: int, feature_bytes: int) -> None:
    with pytest.raises(DataLossError, match="Log entry 5"):
        layout.unpack_record(5, raw, n_bits, feature_bytes)


def test_buckets_never_move() -> None:
    # CRC-32 of the id: stored collections depend on it.
    assert layout.bucket_of(b"123456789", 1 << 32) == 0xCBF43926
    assert layout.bucket_of(b"123456789", 1024) == 0x126
    assert layout.bucket_of("é".encode(), 1) == 0


@given(expected_rows=st.integers(1, 1 << 30))
def test_buckets_get_64_to_128_of_the_expected_rows(expected_rows: int) -> None:
    n = layout.n_buckets_for(expected_rows)
    assert n.bit_count() == 1
    assert expected_rows / n <= 128
    assert n == 1 or expected_rows / n > 64


@given(
    dim=st.integers(0, 65_536),
    dtype=st.sampled_from(FeatureDtype),
    segment_bytes=st.integers(1, 1 << 30),
)
def test_a_segment_has_a_power_of_two_of_rows(
    dim: int, dtype: FeatureDtype, segment_bytes: int
) -> None:
    spec = CollectionSpec("c", "m", 48, dim, dtype)
    rows = layout.rows_per_segment(spec, segment_bytes)
    assert rows.bit_count() == 1
    assert rows == 1 or rows * layout.feature_bytes(spec) <= segment_bytes


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "a-b_c9"])
def test_safe_names(name: str) -> None:
    assert layout.is_safe_name(name)


@pytest.mark.parametrize(
    "name", ["", "a" * 65, "A", "-a", "_a", ".", "..", "a/b", "a b", "a\n", "é"]
)
def test_unsafe_names(name: str) -> None:
    assert not layout.is_safe_name(name)


def test_record_dtypes_have_no_padding() -> None:
    assert layout.ROW.itemsize == struct.calcsize("<QQQQQII") == 48
    assert layout.DEATH.itemsize == 16
