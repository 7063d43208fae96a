"""Text for a terminal: nothing from a file name or a server may steer it."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

PIPE_WIDTH = 160
"""Columns of a table that is not shown on a terminal."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that takes text as it is: no markup, no colouring of what looks like code.

    Parameters
    ----------
    stderr
        Write to standard error, as progress and logs do, instead of standard output.
    """
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPE_WIDTH
    return made


def printable(text: str) -> str:
    """Return `text` with line breaks, escape codes and unpaired surrogates made visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short_path(path: str) -> str:
    """Return an absolute path relative to the working directory if it is inside, printable."""
    try:
        return printable(str(Path(path).relative_to(Path.cwd())))
    except (OSError, ValueError):
        return printable(path)


def duration(seconds: float) -> str:
    """Return a duration for people: ``0.42 s``, ``12.3 s``, ``3 min 5 s``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def counted(n: int, noun: str) -> str:
    """Return ``1 image``, ``1,200 images``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def reason_of(error: OSError) -> str:
    """Return why a file could not be read, without its name."""
    return error.strerror or os.strerror(error.errno or 0)
