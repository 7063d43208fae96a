from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from io import StringIO

import pytest
from rich.console import Console

from hashlens import codes
from hashlens.cli.explained import N_UNSURE, Words, differing
from hashlens.cli.gallery import search_page
from hashlens.cli.search import as_dict, as_table, explanation_lines
from hashlens.types import (
    ExplainedBit,
    Explanation,
    Hit,
    Prediction,
    Receipt,
    ReplyExplanation,
    SearchResult,
)

EVIL = '<script>alert("1")</script>&\x1b[2J'

RECEIPT = Receipt(
    rows_scanned=9,
    threshold_bits=2,
    pool_size=3,
    pool_histogram=(1, 1, 1),
    pool_truncated=False,
    rows_without_feature=0,
    exact=True,
    version=1,
)


def bits_of(text: str) -> bytes:
    return codes.pack([bit == "1" for bit in text]).tobytes()  # type: ignore[arg-type]


KNOWN = ReplyExplanation(
    code=bits_of("1010"),
    certainty=(0.4, 0.03, 0.2, 0.5),
    prediction=Prediction(1, 0.876),
    bits=(
        ExplainedBit(0, (1, 0), ()),
        ExplainedBit(1, (2,), (1,)),
        ExplainedBit(2, (0, 1, 2, 3), (2,)),
        ExplainedBit(3, (), ()),
    ),
    classes=("cat", "dog", "Ähre", "emu"),
)
NEAR = Explanation((1, 2), (0.03, 0.2), Prediction(0, 0.999))
WORDS = Words(KNOWN)


def hit_of(explanation: Explanation | None, **fields: bytes) -> Hit:
    bits = 0 if explanation is None else len(explanation.differing_bits)
    return Hit("the id", bits, 1.5, explanation=explanation, **fields)


def result_of(*explanations: Explanation, known: ReplyExplanation = KNOWN) -> SearchResult:
    return SearchResult(tuple(map(hit_of, explanations)), RECEIPT, known)


def test_a_bit_in_words() -> None:
    assert WORDS.bit(1, 0.03) == (
        "bit 1: clear in the query; fires for Ähre; silent for dog; query margin 0.03"
    )
    assert WORDS.bit(0, None) == "bit 0: set in the query; fires for dog, cat"
    assert WORDS.bit(2, 0.2) == (
        "bit 2: set in the query; fires for cat, dog, Ähre, ...; silent for Ähre; query margin 0.20"
    )
    assert WORDS.bit(3, 0.5) == (
        "bit 3: clear in the query; the same for all classes; query margin 0.50"
    )


def test_predictions_in_words() -> None:
    assert WORDS.query == "dog 88%"
    assert WORDS.hit(hit_of(NEAR)) == "cat 99%", "a softmax is never sure"
    assert WORDS.hit(hit_of(replace(NEAR, prediction=None))) == ""
    assert WORDS.hit(hit_of(None)) == ""


def test_the_surest_differing_bit_separates_most() -> None:
    assert differing(NEAR) == [(2, 0.2), (1, 0.03)]
    assert WORDS.separation(NEAR) == (
        "in bit 2 the query is like cat, dog, Ähre, ..., the hit like Ähre"
    )
    # Clear in the query, set in the hit: the sides change.
    assert WORDS.separation(Explanation((1,), (0.03,))) == (
        "in bit 1 the query is like dog, the hit like Ähre"
    )
    assert WORDS.separation(Explanation((), ())) == ""
    assert WORDS.separation(Explanation((1, 2), ())) == "", "who is unsure of what is not known"


def test_the_least_sure_bits_come_first() -> None:
    assert WORDS.unsure() == [(1, 0.03), (2, 0.2), (0, 0.4), (3, 0.5)]
    many = replace(KNOWN, certainty=(0.5,) * 30)
    assert len(Words(many).unsure()) == N_UNSURE


def test_without_a_classifier_only_bits_are_shown() -> None:
    words = Words(ReplyExplanation(bits_of("1010"), detail="No encoder.\n"))
    assert words.query == ""
    assert words.bit(2, None) == "bit 2: set in the query"
    assert words.separation(NEAR) == ""
    assert words.detail == "No encoder.\\n"


def test_an_answer_that_does_not_add_up_is_shown_as_far_as_it_does() -> None:
    # Another server's, or another version's.
    words = Words(ReplyExplanation(b"", prediction=Prediction(7, 0.5)))
    assert words.query == "7 50%"
    assert words.bit(9, 0.1) == "bit 9: clear in the query; query margin 0.10"
    assert differing(Explanation((3, 4), (0.1,))) == [(3, None), (4, None)]


def test_json_carries_the_explanation() -> None:
    found = as_dict({"id": "x"}, "photos", result_of(NEAR), 1.0)
    assert json.loads(json.dumps(found)) == found
    assert found["explanation"]["predicted"] == {"class": "dog", "probability": 0.876}
    assert found["explanation"]["certainty"] == [0.4, 0.03, 0.2, 0.5]
    assert found["explanation"]["bits"][1] == {
        "bit": 1,
        "fires_for": ["Ähre"],
        "silent_for": ["dog"],
    }
    assert found["hits"][0]["explanation"] == {
        "predicted": {"class": "cat", "probability": 0.999},
        "differing_bits": [1, 2],
        "certainty": [0.03, 0.2],
    }


def test_the_table_shows_the_explanation() -> None:
    result = result_of(NEAR, Explanation(tuple(range(4)) * 5, ()))
    out = Console(width=120, markup=False, file=(file := StringIO()))
    out.print(as_table(result))
    _, first, second = (line.split() for line in file.getvalue().splitlines())
    assert first == ["1", "1.500", "2", "cat", "99%", "2", "1", "the", "id"]
    assert "..." in second
    lines = explanation_lines(result)
    assert lines[0] == "query seen as dog 88%"
    assert lines[2].strip() == WORDS.bit(1, 0.03)
    assert explanation_lines(SearchResult((), RECEIPT)) == []


def test_the_gallery_shows_the_explanation() -> None:
    page = search_page("/q.png", b"", "photos", result_of(NEAR), 1.0)
    assert "The model sees: <strong>dog 88%</strong>" in page
    assert "seen as <b>cat 99%</b>" in page
    titles = [unescape(title) for title in re.findall(r'class="bit" title="([^"]*)"', page)]
    unsure = [WORDS.bit(bit, margin) for bit, margin in WORDS.unsure()]
    assert titles == [*unsure, WORDS.bit(2, 0.2), WORDS.bit(1, 0.03)]
    assert WORDS.separation(NEAR) in page


def test_of_many_differing_bits_the_gallery_shows_some_and_names_the_rest() -> None:
    wide = replace(KNOWN, code=bytes(8), certainty=tuple(i / 128 for i in range(64)))
    far = Explanation(tuple(range(64)), wide.certainty)
    page = search_page("/q.png", b"", "photos", result_of(far, known=wide), 1.0)
    (rest,) = re.findall(r'title="([^"]*)">\+52<', page)
    assert len(unescape(rest).splitlines()) == 52


def test_the_explanation_cannot_inject() -> None:
    evil = replace(KNOWN, classes=(EVIL,) * 4, detail=EVIL)
    page = search_page("/q.png", b"", "photos", result_of(NEAR, known=evil), 1.0)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert not any("\x1b" in line for line in explanation_lines(result_of(NEAR, known=evil)))


@pytest.mark.parametrize("explanation", [Explanation((), ()), NEAR])
def test_an_unexplained_query_still_has_a_page(explanation: Explanation) -> None:
    bare = ReplyExplanation(bits_of("1010"), detail="No encoder.")
    page = search_page("x", None, "photos", result_of(explanation, known=bare), 1.0)
    assert "No encoder." in page
    assert "The model sees" not in page
