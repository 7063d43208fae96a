from __future__ import annotations

import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from hashlens.cli.markup import Html, data_uri, join, page, tag


class Seen(HTMLParser):
    """Notes the elements, their attributes and their text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


# The parser turns NUL and line ends into something else, as browsers do.
texts = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]))


@given(texts, texts)
def test_any_text_stays_text(text: str, value: str) -> None:
    seen = Seen(tag("p", text, title=f"x{value}"))
    assert seen.elements == [("p", {"title": f"x{value}"})]
    assert seen.text == text


def test_markup_is_not_escaped_twice() -> None:
    inner = tag("b", "a < b & c")
    assert tag("p", "<i>", inner) == "<p>&lt;i&gt;<b>a &lt; b &amp; c</b></p>"
    assert isinstance(inner, Html)
    assert join(["<", tag("br")]) == "&lt;<br>"


def test_attributes() -> None:
    assert (
        tag("label", class_="a b", aria_label="it's", hidden="", id=None, for_="x")
        == '<label class="a b" aria-label="it&#x27;s" hidden for="x"></label>'
    )
    assert tag("input", type="checkbox") == '<input type="checkbox">'


def test_a_page_needs_nothing_but_itself() -> None:
    document = page("T<b>", tag("img", src=data_uri(b"\x89PNG", "image/png")))
    assert "<title>T&lt;b&gt;</title>" in document
    assert "data:image/png;base64,iVBORw==" in document
    assert "default-src &#x27;none&#x27;" in document
    assert "<script" not in document
    assert not re.search(r"url\(|@import|https?://", document)
    assert "prefers-color-scheme: dark" in document
