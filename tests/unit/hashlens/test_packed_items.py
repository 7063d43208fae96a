"""Items by column: they come back as they went in, and what is wrong is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import Embedding, Item, codes, convert
from hashlens.errors import InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.v1 import embedding_pb2 as epb
from hashlens.v1 import search_service_pb2 as spb

ids = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9)


def items_of(names: list[str], n_bits: int, dtype: str | None, payload: bool) -> list[Item]:
    rng = np.random.default_rng(len(names))
    return [
        Item(
            name,
            Embedding(
                codes.pack(rng.random(n_bits) < 0.5).tobytes(),
                n_bits,
                "m",
                None if dtype is None else rng.standard_normal(3).astype(dtype),
            ),
            payload=rng.bytes(i % 3) if payload else b"",
        )
        for i, name in enumerate(names)
    ]


def unpacked(packed: PackedItems) -> list[tuple[str, bytes, bytes, bytes]]:
    """Ids, codes, features, payloads, read the slow way."""
    found = []
    start = payload_start = 0
    for i, end in enumerate(packed.id_ends.tolist()):
        stop = 0 if packed.payload_ends is None else int(packed.payload_ends[i])
        feature = b"" if packed.features is None else packed.features[i].tobytes()
        payload = packed.payload_bytes[payload_start:stop]
        name = packed.id_bytes[start:end].decode()
        found.append((name, packed.codes[i].tobytes(), feature, payload))
        start, payload_start = end, stop
    return found


@given(
    names=st.lists(ids, min_size=1, max_size=20),
    n_bits=st.sampled_from([1, 8, 20, 512]),
    dtype=st.sampled_from([None, "<f2", "<f4"]),
    payload=st.booleans(),
)
def test_items_come_back(names: list[str], n_bits: int, dtype: str | None, payload: bool) -> None:
    items = items_of(names, n_bits, dtype, payload)
    packed = PackedItems.of(items)
    assert packed is not None
    sent = convert.packed_items_to_proto(packed)
    back = convert.packed_items_from_proto(spb.PackedItems.FromString(sent.SerializeToString()))
    assert (back.model_id, back.n_bits, len(back)) == ("m", n_bits, len(items))
    expected = []
    for item in items:
        assert item.embedding is not None
        feature = item.embedding.feature
        content = b"" if feature is None else feature.tobytes()
        expected.append((item.id, item.embedding.code, content, item.payload))
    assert unpacked(back) == expected


def test_what_has_no_columns_is_not_packed() -> None:
    a, b = items_of(["a", "b"], 8, "<f2", False)
    assert a.embedding is not None
    assert PackedItems.of([]) is None
    for other in (
        Item("b", image=b"picture"),
        replace(b, tags=("t",)),
        replace(b, expires_unix_ms=1),
        replace(b, id="\ud800"),
        replace(b, embedding=replace(a.embedding, model_id="n")),
        replace(b, embedding=replace(a.embedding, n_bits=7)),
        replace(b, embedding=replace(a.embedding, code=b"xx")),
        replace(b, embedding=replace(a.embedding, feature=None)),
        replace(b, embedding=replace(a.embedding, feature=np.zeros(4, np.float16))),
        replace(b, embedding=replace(a.embedding, feature=np.zeros(3, np.float32))),
    ):
        assert PackedItems.of([a, other]) is None
        assert PackedItems.of([other, a]) is None


def ends(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


def good() -> spb.PackedItems:
    """Three items: a, é, ccc; 6 bits; two numbers each; payloads of 0, 2 and 1 bytes."""
    return spb.PackedItems(
        model_id="m",
        n_bits=6,
        ids="aéccc".encode(),
        id_ends=ends(1, 3, 6),
        codes=b"\x01\x3f\x00",
        dim=2,
        feature_dtype=epb.FEATURE_DTYPE_F16,
        features=np.arange(6, dtype="<f2").tobytes(),
        payloads=b"xyz",
        payload_ends=ends(0, 2, 3),
    )


NAN = np.array([0, 0, 0, np.nan, 0, 0], "<f2").tobytes()


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"id_ends": ends(1, 3, 5)}, "id_ends", "not at the end"),
        ({"id_ends": ends(1, 3, 7)}, "id_ends", "not at the end"),
        ({"id_ends": ends(1, 1, 6)}, "id_ends", "item 1"),
        ({"id_ends": ends(1, 0, 6)}, "id_ends", "item 1"),
        ({"id_ends": ends(1, 2, 6)}, "ids", "item 1 ends inside|item 2 ends inside"),
        ({"id_ends": ends(1, 3, 6)[:-1]}, "id_ends", "four bytes"),
        ({"id_ends": b""}, "id_ends", "not at the end"),
        ({"ids": b"a\xc3\x28ccc"}, "ids", "item 1 is not UTF-8"),
        ({"ids": b"a\xc3\xa9c\nc"}, "ids", "item 2 holds control"),
        ({"n_bits": 0}, "n_bits", "1 to 512"),
        ({"n_bits": 513}, "n_bits", "1 to 512"),
        ({"n_bits": 9}, "codes", "3 times 2"),
        ({"codes": b"\x01\x40\x00"}, "codes", "item 1"),
        ({"codes": b"\x01"}, "codes", "3 times 1"),
        ({"dim": 0}, "dim", "dim is 0"),
        ({"dim": 3}, "features", "3 times 3"),
        ({"dim": 65_537}, "dim", "65537"),
        ({"feature_dtype": 0}, "feature_dtype", "F32 or F16"),
        ({"feature_dtype": 9}, "feature_dtype", "9"),
        ({"features": NAN}, "features", "item 1"),
        ({"payload_ends": ends(0, 3)}, "payload_ends", "each"),
        ({"payload_ends": ends(2, 0, 3)}, "payload_ends", "item 1"),
        ({"payload_ends": b""}, "payload_ends", "not at the end"),
        ({"payloads": b"xy"}, "payload_ends", "not at the end"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], field: str, says: str) -> None:
    message = good()
    assert len(convert.packed_items_from_proto(message)) == 3
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(InvalidInputError, match=says) as caught:
        convert.packed_items_from_proto(message)
    assert caught.value.field == field


def test_a_long_id_or_payload_is_refused() -> None:
    for field, longest in (("ids", 1024), ("payloads", 65_536)):
        message = good()
        setattr(message, field, b"x" * (longest + 3))
        setattr(message, {"ids": "id_ends"}.get(field, "payload_ends"), ends(1, 2, longest + 3))
        with pytest.raises(InvalidInputError, match="item 2"):
            convert.packed_items_from_proto(message)


@given(st.binary(max_size=200))
def test_noise_is_refused_or_read(noise: bytes) -> None:
    message = good()
    message.ids, message.id_ends = noise[:100], noise[100:]
    try:
        packed = convert.packed_items_from_proto(message)
    except InvalidInputError:
        return
    assert "".join(name for name, *_ in unpacked(packed)) == noise[:100].decode()
