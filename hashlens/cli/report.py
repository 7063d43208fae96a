"""The page that `hashlens demo` writes: each query beside its answers, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hashlens.cli.markup import Html, data_uri, page, tag
from hashlens.cli.text import counted
from hashlens.types import ModelInfo

SHOWN_ANSWERS = 10

STAGES = {
    "decode": "bytes to pixels to tensor",
    "queue": "waiting for a batch",
    "inference": "pixels to code and feature",
    "coarse": "Hamming distance to every code",
    "fine": "Euclidean distance in the pool",
    "whole_call": "as the caller sees it",
}
"""Stage -> what happens in it, in the order they run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One hit of the demo."""

    row: int
    label: int
    distance: float
    hamming_bits: int
    seen_as: str = ""
    """What its code looks like to the model; empty if that is not known."""
    why: str = ""
    """The differing bits, on a line each."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One query of the demo, and its first answers."""

    row: int
    label: int
    answers: tuple[Answer, ...]
    seen_as: str = ""
    """What it looks like to the model; empty if that is not known."""
    unsure: str = ""
    """Its least sure bits, on a line each."""

    @property
    def n_right(self) -> int:
        """How many of the answers have the query's label."""
        return sum(answer.label == self.label for answer in self.answers)


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How well the queries of one label, or of all, did."""

    name: str
    queries: int
    precision_at_10: float
    precision_at_100: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that the demo has measured."""

    model: ModelInfo
    images: int
    overall: LabelScore
    by_label: tuple[LabelScore, ...]
    """In the order of the label numbers; labels without a query are left out."""
    median_ms: Mapping[str, float]
    """Keys of `STAGES` -> milliseconds."""
    seconds: float
    """The whole demo, up to the report."""


def demo_page(
    report: Report,
    classes: Sequence[str],
    asked: Sequence[Asked],
    picture: Callable[[int], bytes],
    credit: str,
) -> str:
    """Return the page.

    Parameters
    ----------
    report
        The numbers.
    classes
        Names of the labels.
    asked
        The queries, in any order; the page groups them by label.
    picture
        Gives the PNG of a row.
    credit
        Where the pictures are from, and their licence.
    """
    cache: dict[int, str] = {}

    def source(row: int) -> str:
        if row not in cache:
            cache[row] = data_uri(picture(row), "image/png")
        return cache[row]

    sections = []
    links = []
    for label, name in enumerate(classes):
        of_label = [query for query in asked if query.label == label]
        if not of_label:
            continue
        links.append(tag("a", name, href=f"#label-{label}"))
        sections.append(_section(label, classes, of_label, source))
    flawed = sum(query.n_right < len(query.answers) for query in asked)
    return page(
        "Hashlens demo",
        _header(report),
        _tiles(report),
        tag("div", _label_table(report), _stage_table(report), class_="panels"),
        tag(
            "div",
            tag("nav", links, aria_label="Labels"),
            tag(
                "label",
                tag("input", type="checkbox", id="only-flawed"),
                f" only the {flawed} queries with a wrong answer",
            ),
            class_="toolbar",
        ),
        sections,
        tag("footer", tag("p", credit)),
    )


def _header(report: Report) -> Html:
    model = report.model
    return tag(
        "header",
        tag("p", "Hashlens demo", class_="overline"),
        tag("h1", "Similar images, found by learned binary codes"),
        tag(
            "p",
            f"Each of {report.overall.queries:,} pictures that the collection does not hold was "
            "sent as PNG or JPEG bytes to the search service. It asked the encoder service for the "
            f"picture's {model.n_bits}-bit code and {model.dim:,}-d feature, gathered a pool by "
            f"Hamming distance among {report.images:,} images, and ranked the pool by Euclidean "
            "distance. An answer is right if it has the query's label. Below each answer stand its "
            "Euclidean and its Hamming distance, and the class that the model's classifier reads "
            "off its code; point at a picture to see which bits differ, or of which bits the query "
            "was least sure, and what they mean.",
            class_="lead",
        ),
    )


def _tiles(report: Report) -> Html:
    tiles = [
        (f"{report.overall.precision_at_10:.3f}", "precision@10"),
        (f"{report.overall.precision_at_100:.3f}", "precision@100"),
        (f"{report.median_ms['whole_call']:.1f} ms", "median call"),
        (f"{report.images:,}", "images"),
        (f"{report.overall.queries:,}", "queries"),
        (f"{report.model.n_bits} bits", report.model.backbone),
    ]
    return tag(
        "dl",
        [tag("div", tag("dt", caption), tag("dd", value)) for value, caption in tiles],
        class_="tiles",
    )


def _label_table(report: Report) -> Html:
    rows = [_label_row(score) for score in report.by_label]
    return tag(
        "table",
        tag("caption", "Precision by label"),
        tag("thead", _heading("label", "queries", "@10", "", "@100", "")),
        tag("tbody", rows),
        tag("tfoot", _label_row(report.overall)),
    )


def _label_row(score: LabelScore) -> Html:
    return tag(
        "tr",
        tag("th", score.name, scope="row"),
        tag("td", str(score.queries), class_="number"),
        tag("td", f"{score.precision_at_10:.3f}", class_="number"),
        _bar(score.precision_at_10),
        tag("td", f"{score.precision_at_100:.3f}", class_="number"),
        _bar(score.precision_at_100),
    )


def _stage_table(report: Report) -> Html:
    longest = max(report.median_ms.values()) or 1.0
    rows = [
        tag(
            "tr",
            tag("th", stage.replace("_", " "), tag("small", meaning), scope="row"),
            tag("td", f"{report.median_ms[stage]:.2f}", class_="number"),
            _bar(report.median_ms[stage] / longest),
        )
        for stage, meaning in STAGES.items()
    ]
    return tag(
        "table",
        tag("caption", "Median milliseconds per stage"),
        tag("thead", _heading("stage", "ms", "")),
        tag("tbody", rows[:-1]),
        tag("tfoot", rows[-1]),
    )


def _heading(*names: str) -> Html:
    return tag(
        "tr", [tag("th", name, scope="col") if name else tag("td", class_="bar") for name in names]
    )


def _bar(share: float) -> Html:
    return tag("td", tag("span", style=f"width:{share:.1%}"), class_="bar")


def _section(
    label: int, classes: Sequence[str], asked: Sequence[Asked], source: Callable[[int], str]
) -> Html:
    right = sum(query.n_right for query in asked)
    of = sum(len(query.answers) for query in asked)
    return tag(
        "section",
        tag("h2", classes[label], tag("small", f"{right} of {of} answers right")),
        [_query(query, classes, source) for query in asked],
        id=f"label-{label}",
    )


def _query(query: Asked, classes: Sequence[str], source: Callable[[int], str]) -> Html:
    label = classes[query.label]
    n_right, of = query.n_right, len(query.answers)
    return tag(
        "article",
        tag(
            "figure",
            tag("img", src=source(query.row), alt=f"query: {label}"),
            tag(
                "figcaption",
                tag("b", label),
                tag("span", f"{n_right} of {of} right"),
                _seen(query.seen_as),
            ),
            title=query.unsure or None,
        ),
        tag("ol", [_answer(answer, query.label, classes, source) for answer in query.answers]),
        class_="query" if n_right == of else "query flawed",
    )


def _answer(
    answer: Answer, asked: int, classes: Sequence[str], source: Callable[[int], str]
) -> Html:
    right = answer.label == asked
    name = classes[answer.label]
    return tag(
        "li",
        tag("img", src=source(answer.row), alt=name),
        tag("b", f"✓ {name}" if right else f"✗ {name}"),
        tag("span", f"{answer.distance:.2f} · {counted(answer.hamming_bits, 'bit')}"),
        _seen(answer.seen_as),
        class_="right" if right else "wrong",
        title=answer.why or None,
    )


def _seen(seen_as: str) -> list[Html]:
    return [tag("span", f"seen as {seen_as}", class_="seen")] if seen_as else []
