from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens.cli.text import counted, duration, printable, short_path


@given(st.text())
def test_nothing_steers_the_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_printable_names_what_it_hides() -> None:
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert printable(os.fsdecode(b"caf\xe9.jpg")) == "caf\\udce9.jpg"
    assert printable("Zürich 東京.jpg") == "Zürich 東京.jpg"


def test_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "a" / "b.jpg")) == "a/b.jpg"
    assert short_path("/elsewhere/b.jpg") == "/elsewhere/b.jpg"
    assert short_path("an id") == "an id"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0.40 s"), (12.34, "12.3 s"), (185, "3 min 5 s"), (7260, "2 h 1 min")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_counted() -> None:
    assert [counted(n, "image") for n in (0, 1, 1200)] == ["0 images", "1 image", "1,200 images"]
