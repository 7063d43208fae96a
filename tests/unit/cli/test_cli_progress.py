from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from hashlens.cli.progress import step


def test_a_few_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 20.0, 21.0, 40.0, 50.0])
    monkeypatch.setattr("hashlens.cli.progress.time.monotonic", lambda: next(clock))
    console = Console(file=(file := StringIO()), width=120)
    with step(console, "Indexing", 100, "images") as advance:
        for _ in range(4):
            advance(25)
    assert file.getvalue().splitlines() == [
        "Indexing ...",
        "Indexing: 50 of 100, 2 images/s, 20.0 s left",
        "Indexing: 100 of 100 in 50.0 s, 2 images/s",
    ]


@pytest.mark.parametrize("total", [3, 0])
def test_a_bar_on_a_terminal(total: int) -> None:
    console = Console(file=(file := StringIO()), width=160, force_terminal=True)
    with step(console, "Searching", total, "queries") as advance:
        for _ in range(total):
            advance(1)
    text = file.getvalue()
    assert "Searching" in text
    assert f"{total} / {total}" in text
    assert "queries/s" in text
