"""An evaluation as one self-contained page: numbers, plots, and queries with their answers."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from encoder_service.data.types import Source
from encoder_service.evaluation.plots import drawn
from encoder_service.evaluation.rankings import RANKINGS
from encoder_service.evaluation.results import Evaluation
from encoder_service.evaluation.run import Evaluated
from encoder_service.evaluation.table import COLUMNS, LEGEND, cell, meaning
from hashlens.cli.markup import Html, data_uri, page, tag

SHOWN_PER_CLASS = 4
"""Queries shown of each class."""

MAX_SHOWN = 120
"""Queries shown in all."""

_ANSWERS = 10
_SIDE = 112
"""Of the thumbnails, in pixels."""


def report_page(found: Evaluated) -> str:
    """Return the page.

    Parameters
    ----------
    found
        Numbers, and the images they were made with: those shown are read again.

    Raises
    ------
    InvalidInputError
        An image has become unreadable meanwhile.
    """
    evaluation = found.evaluation
    pictures = drawn(evaluation)
    model = evaluation.checkpoint
    return page(
        f"Hashlens evaluation: {evaluation.protocol}",
        tag(
            "header",
            tag("p", "Hashlens evaluation", class_="overline"),
            tag("h1", f"{evaluation.protocol}: {_title(evaluation)}"),
            tag("p", meaning(evaluation), class_="lead"),
        ),
        _tiles(evaluation),
        _rankings(evaluation),
        [tag("p", note, class_="lead") for note in (LEGEND, *evaluation.notes)],
        tag("h2", "Plots"),
        tag(
            "div",
            [
                tag(
                    "img", src=data_uri(data, "image/png"), alt=name.replace("_", " "), width="100%"
                )
                for name, data in pictures.items()
            ],
            class_="panels",
        ),
        _health(evaluation),
        _gallery(found),
        tag(
            "footer",
            tag(
                "p",
                f"Model {model.get('model_id', '?')}, trained on: "
                f"{model.get('data_licence') or 'unknown data'}. Images shown: "
                f"{found.queries.licence or 'licence unknown'}.",
            ),
        ),
    )


def _title(evaluation: Evaluation) -> str:
    model = evaluation.checkpoint
    return (
        f"{model.get('backbone', '?')}, {model.get('n_bits', '?')} bits, "
        f"{evaluation.n_queries:,} queries among {evaluation.n_database:,} images"
    )


def _tiles(evaluation: Evaluation) -> Html:
    coarse = evaluation.rankings["coarse"]
    shown = evaluation.rankings[evaluation.shown_ranking]
    tiles = [
        (f"{coarse.map_full:.3f}", "coarse: mAP, full list"),
        (_number(coarse.map_at_1000), "coarse: mAP@1000"),
        (_number(shown.precision_at_10), f"{evaluation.shown_ranking}: precision@10"),
        (_number(evaluation.accuracy), "classifier's accuracy"),
        (f"{evaluation.distinct_codes:,}", "different codes"),
        (evaluation.backend, "searched by"),
    ]
    return tag(
        "dl",
        [tag("div", tag("dt", caption), tag("dd", value)) for value, caption in tiles],
        class_="tiles",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rankings(evaluation: Evaluation) -> Html:
    heading = tag("tr", [tag("th", name, scope="col") for name in ("ranking", *COLUMNS)])
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row", title=RANKINGS[name]),
            [tag("td", cell(summary, field), class_="number") for field in COLUMNS.values()],
        )
        for name, summary in evaluation.rankings.items()
    ]
    explained = [tag("li", tag("b", name), f": {RANKINGS[name]}.") for name in evaluation.rankings]
    return tag(
        "section",
        tag("table", tag("caption", "Rankings"), tag("thead", heading), tag("tbody", rows)),
        tag("ul", explained, class_="lead"),
    )


def _health(evaluation: Evaluation) -> Html:
    judged = evaluation.verdict
    if judged is None:
        return Html("")
    lines = [tag("li", sentence) for sentence in (*judged.sentences, *judged.advice)]
    return tag("section", tag("h2", f"The codes are {judged.level}"), tag("ul", lines))


def _gallery(found: Evaluated) -> list[Html]:
    """Return some queries of each class with their first answers."""
    evaluation = found.evaluation
    labels = found.queries.labels[evaluation.query_rows]
    per_class = max(1, min(SHOWN_PER_CLASS, MAX_SHOWN // max(1, len(evaluation.by_class))))
    thumbnail = _thumbnails(found.database)
    asked = thumbnail if found.queries is found.database else _thumbnails(found.queries)
    sections = []
    n_shown = 0
    for position, name in enumerate(evaluation.classes):
        members = np.flatnonzero(labels == position if labels.ndim == 1 else labels[:, position])
        if not len(members) or n_shown >= MAX_SHOWN:
            continue
        # Spread over the split, the same ones each time.
        chosen = members[np.linspace(0, len(members) - 1, per_class).astype(int)]
        chosen = np.unique(chosen)
        n_shown += len(chosen)
        sections.append(
            tag(
                "section",
                tag("h2", name, tag("small", f"{len(members):,} queries")),
                [_query(found, int(i), asked, thumbnail) for i in chosen],
            )
        )
    return sections


def _query(
    found: Evaluated, i: int, asked: Callable[[int], str], thumbnail: Callable[[int], str]
) -> Html:
    evaluation = found.evaluation
    row = int(evaluation.query_rows[i])
    answers = evaluation.nearest[evaluation.shown_ranking][i, :_ANSWERS].tolist()
    right = [_shares_label(found, row, answer) for answer in answers]
    name = _names(found.queries, row)
    return tag(
        "article",
        tag(
            "figure",
            tag("img", src=asked(row), alt=f"query: {name}"),
            tag(
                "figcaption",
                tag("b", name),
                tag("span", f"{sum(right)} of {len(right)} right"),
                tag("span", found.queries.name(row)),
            ),
        ),
        tag(
            "ol",
            [
                tag(
                    "li",
                    tag("img", src=thumbnail(answer), alt=_names(found.database, answer)),
                    tag("b", f"{'✓' if is_right else '✗'} {_names(found.database, answer)}"),
                    class_="right" if is_right else "wrong",
                )
                for answer, is_right in zip(answers, right, strict=True)
            ],
        ),
        class_="query" if all(right) else "query flawed",
    )


def _shares_label(found: Evaluated, query: int, answer: int) -> bool:
    ours, theirs = found.queries.labels[query], found.database.labels[answer]
    return bool(np.any(ours & theirs) if np.ndim(ours) else ours == theirs)


def _names(source: Source, row: int) -> str:
    label = source.labels[row]
    if np.ndim(label):
        return ", ".join(source.classes[i] for i in np.flatnonzero(label)) or "no label"
    return source.classes[int(label)]


def _thumbnails(source: Source) -> Callable[[int], str]:
    made: dict[int, str] = {}

    def thumbnail(row: int) -> str:
        if row not in made:
            image: Image.Image = source.picture(row).copy()
            image.thumbnail((_SIDE, _SIDE))
            out = BytesIO()
            image.save(out, "WEBP", quality=80)
            made[row] = data_uri(out.getvalue(), "image/webp")
        return made[row]

    return thumbnail
