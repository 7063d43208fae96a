"""The page that `hashlens search --html` writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from hashlens.cli.explained import Words, differing
from hashlens.cli.images import thumbnail, thumbnail_of_file
from hashlens.cli.ingest import pipelined
from hashlens.cli.markup import Html, data_uri, page, tag
from hashlens.cli.progress import step
from hashlens.cli.search import path_of, receipt_line
from hashlens.cli.text import console, counted, printable
from hashlens.types import Hit, SearchResult

MAX_SHOWN = 1000
"""Hits on one page."""

_SIDE = 240
_WORKERS = 4

_SHOWN_BITS = 12
"""Differing bits shown of one hit; the title of the rest names them."""

_QUICK = 50
"""So many thumbnails take less than a second, and no bar."""


def search_page(
    query: str, image: bytes | None, collection: str, result: SearchResult, call_ms: float
) -> str:
    """Return a gallery of an answer, pictures included where their files can be read.

    Parameters
    ----------
    query
        Path of the picture that was searched by, or the id of the item.
    image
        The picture's bytes; None for an item.
    collection
        The collection's name.
    result
        The answer.
    call_ms
        The whole call, in milliseconds.
    """
    hits = result.hits[:MAX_SHOWN]
    asked = thumbnail_of_file(Path(query), _SIDE) if image is None else thumbnail(image, _SIDE)
    words = None if result.explanation is None else Words(result.explanation)
    cards = [_card(n, hit, shown, words) for n, (hit, shown) in enumerate(_thumbnails(hits), 1)]
    cut = "" if len(hits) == len(result.hits) else f", the first {len(hits):,} shown"
    return page(
        f"Similar to {printable(Path(query).name)}",
        tag(
            "header",
            tag("div", _picture(asked, "the query"), class_="asked-for"),
            tag(
                "div",
                tag("p", "Hashlens search", class_="overline"),
                tag("h1", f"Similar to {printable(Path(query).name)}"),
                tag("p", printable(query), class_="path"),
                tag(
                    "p",
                    f"{counted(len(result.hits), 'answer')} from the collection ",
                    tag("strong", collection),
                    f"{cut}, best first.",
                    class_="lead",
                ),
                tag("p", receipt_line(result.receipt, call_ms), class_="receipt"),
                [] if words is None else _query_explained(words),
            ),
            class_="search-header",
        ),
        tag("ol", cards, class_="cards")
        if cards
        else tag("p", "Nothing was found.", class_="lead"),
    )


def _thumbnails(hits: Sequence[Hit]) -> list[tuple[Hit, bytes | None]]:
    shown = []
    progress = (
        step(console(stderr=True), "Making thumbnails", len(hits), "images")
        if len(hits) > _QUICK
        else nullcontext(lambda n: None)
    )
    with progress as advance:
        for made in pipelined(
            lambda hit: thumbnail_of_file(Path(path_of(hit)), _SIDE), hits, _WORKERS
        ):
            shown.append(made)
            advance(1)
    return list(zip(hits, shown, strict=True))


def _query_explained(words: Words) -> list[Html]:
    parts = []
    if words.query:
        parts.append(tag("p", "The model sees: ", tag("strong", words.query), class_="seen"))
    unsure = words.unsure()
    if unsure:
        chips = [_chip(words, bit, margin) for bit, margin in unsure]
        parts.append(tag("p", "Least sure bits: ", chips, class_="bits"))
    if words.detail:
        parts.append(tag("p", words.detail, class_="receipt"))
    return parts


def _hit_explained(hit: Hit, words: Words) -> list[Html]:
    if hit.explanation is None:
        return []
    bits = differing(hit.explanation)
    shown, rest = bits[:_SHOWN_BITS], bits[_SHOWN_BITS:]
    chips = [_chip(words, bit, margin) for bit, margin in shown]
    if rest:
        title = "\n".join(words.bit(bit, margin) for bit, margin in rest)
        chips.append(tag("span", f"+{len(rest)}", class_="bit", title=title))
    parts = []
    if seen := words.hit(hit):
        parts.append(tag("p", "seen as ", tag("b", seen), class_="seen"))
    if chips:
        parts.append(tag("p", "differs in ", chips, class_="bits"))
    if separation := words.separation(hit.explanation):
        parts.append(tag("p", separation, class_="separation"))
    return parts


def _chip(words: Words, bit: int, margin: float | None) -> Html:
    """Return one bit, the fainter the less sure the query was of it."""
    strength = None if margin is None else f"opacity:{0.5 + margin:.2f}"
    return tag("span", str(bit), class_="bit", title=words.bit(bit, margin), style=strength)


def _card(n: int, hit: Hit, shown: bytes | None, words: Words | None) -> Html:
    path = path_of(hit)
    name = Path(path).name or path
    picture = _picture(shown, printable(name))
    if shown is not None and Path(path).is_absolute():
        picture = tag("a", picture, href=Path(path).as_uri())
    bits = counted(hit.hamming_bits, "bit")
    distance = bits if hit.distance is None else f"{hit.distance:.3f} · {bits}"
    return tag(
        "li",
        picture,
        tag("p", tag("b", str(n), class_="rank"), tag("span", distance), class_="distances"),
        [] if words is None else _hit_explained(hit, words),
        tag("p", printable(name), class_="name", title=printable(path)),
    )


def _picture(data: bytes | None, text: str) -> Html:
    if data is None:
        return tag("span", "no preview", class_="no-picture")
    return tag("img", src=data_uri(data, "image/webp"), alt=text, loading="lazy")
