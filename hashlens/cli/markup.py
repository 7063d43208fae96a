"""HTML that cannot be injected into: every string becomes text unless it is `Html` already."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from importlib.resources import files

# The browser itself makes sure that a page loads nothing from anywhere and runs no script.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_VOID = frozenset({"br", "col", "hr", "img", "input", "meta"})


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


Child = str | Iterable[str]
"""Text, HTML, or several of them."""


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Html:
    """Return an element.

    Parameters
    ----------
    name
        Its tag.
    *children
        Strings are escaped, `Html` is not.
    **attributes
        Values are escaped; None leaves one out, and the empty string is a bare one. A trailing
        underscore of the name is dropped, others become hyphens.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            word = key.rstrip("_").replace("_", "-")
            words.append(f'{word}="{escape(str(value))}"' if value != "" else word)
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Return children one after another."""
    parts = (part for child in children for part in ((child,) if isinstance(child, str) else child))
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def data_uri(data: bytes, mime: str) -> str:
    """Return an image's bytes as an address that holds them."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def page(title: str, *body: Child) -> str:
    """Return a whole page that needs nothing but itself."""
    style = files("hashlens.cli").joinpath("page.css").read_text("utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    document = tag("html", head, tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{document}\n"
