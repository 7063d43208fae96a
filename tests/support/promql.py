"""Just enough of PromQL to see what a query asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<range>\[[^\]]*\])|(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)|(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
    |(?P<op>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>])""",
    re.VERBOSE,
)
_FUNCTIONS = frozenset(
    (
        *("sum", "min", "max", "avg", "count", "rate", "increase"),
        *("histogram_quantile", "absent", "vector", "label_values"),
    )
)
_GROUPING = frozenset(["by", "without", "on", "ignoring", "group_left", "group_right"])
_BETWEEN = frozenset(["and", "or", "unless", "bool"])


@dataclass
class Asked:
    """What one query asks for."""

    metrics: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)
    """Each with its matchers: label, operator, value."""
    labels: set[str] = field(default_factory=set)
    """By which it groups or joins."""


def parse(query: str) -> Asked:
    """Read a query; AssertionError for what this does not know."""
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(query):
        match = _TOKEN.match(query, position)
        assert match is not None, f"cannot read {query[position:]!r} of {query!r}"
        position = match.end()
        kind = str(match.lastgroup)
        if kind not in ("space", "range"):
            tokens.append((kind, match.group()))
    depth = 0
    for _, text in tokens:
        depth += (text in "({") - (text in ")}") if len(text) == 1 else 0
        assert depth >= 0, query
    assert depth == 0, f"brackets of {query!r}"
    asked, i = Asked(), 0
    while i < len(tokens):
        kind, text = tokens[i]
        after = tokens[i + 1][1] if i + 1 < len(tokens) else ""
        i += 1
        if kind != "name" or text in _BETWEEN:
            continue
        if text in _GROUPING:
            i += 1
            while tokens[i][1] != ")":
                if tokens[i][0] == "name":
                    asked.labels.add(tokens[i][1])
                i += 1
            i += 1
        elif text in _FUNCTIONS:
            assert after == "(" or after in _GROUPING, f"{text} in {query!r}"
        else:
            assert after != "(", f"{text} is no function known here: {query!r}"
            matchers = []
            if after == "{":
                i += 1
                while tokens[i][1] != "}":
                    (_, label), (_, operator), (_, value) = tokens[i : i + 3]
                    matchers.append((label, operator, value[1:-1]))
                    i += 3
                    if tokens[i][1] == ",":
                        i += 1
                i += 1
            asked.metrics.append((text, matchers))
    return asked
