"""The definition of bit order, against golden vectors and a slow twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens import codes

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "data" / "golden" / "codes.json").read_text("utf-8")
)


def slow_pack(bits: list[bool]) -> bytes:
    """Pack one code bit by bit, by the sentence that defines it."""
    packed = bytearray((len(bits) + 7) // 8)
    for i, bit in enumerate(bits):
        packed[i // 8] |= int(bit) << (i % 8)
    return bytes(packed)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['n_bits']} bits")
def test_golden_vectors(case: dict[str, Any]) -> None:
    bits = np.zeros(case["n_bits"], dtype=np.bool_)
    bits[case["set"]] = True
    assert codes.pack(bits).tobytes().hex() == case["hex"]
    packed = np.frombuffer(bytes.fromhex(case["hex"]), dtype=np.uint8)
    assert np.flatnonzero(codes.unpack(packed, case["n_bits"])).tolist() == case["set"]


@given(bits=st.lists(st.booleans(), min_size=1, max_size=codes.MAX_BITS))
def test_pack_equals_the_slow_twin_and_unpack_reverses_it(bits: list[bool]) -> None:
    packed = codes.pack(np.array([bits]))
    assert packed[0].tobytes() == slow_pack(bits)
    assert codes.unpack(packed, len(bits))[0].tolist() == bits
    assert codes.padding_is_zero(packed[0].tobytes(), len(bits))


@given(n=st.integers(0, 5), n_bits=st.integers(1, codes.MAX_BITS), seed=st.integers(0, 2**32 - 1))
def test_words_hold_bit_i_at_i_mod_64_of_word_i_div_64(n: int, n_bits: int, seed: int) -> None:
    bits = np.random.default_rng(seed).random((n, n_bits)) < 0.5
    packed = codes.pack(bits)
    words = codes.as_words(packed)
    assert words.shape == (codes.n_words(n_bits), n)
    for row in range(n):
        for i in range(n_bits):
            assert (int(words[i // 64, row]) >> (i % 64)) & 1 == int(bits[row, i])
    assert np.array_equal(codes.from_words(words, n_bits), packed)


def test_padding_bits_are_noticed() -> None:
    assert codes.padding_is_zero(b"\xff\x0f", 12)
    assert not codes.padding_is_zero(b"\xff\x1f", 12)
    assert codes.padding_is_zero(b"\xff\xff", 16)
