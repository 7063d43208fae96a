"""What a check found wrong: the first lines, and how many there are."""

from __future__ import annotations

from typing import Final

MAX_LINES: Final = 1000
"""Differences that are named; all are counted."""


class Differences:
    """Collects differences. Not thread-safe."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.n = 0

    def add(self, line: str) -> None:
        """Count a difference, and keep its line if there is room."""
        self.n += 1
        if len(self.lines) < MAX_LINES:
            self.lines.append(line)

    def about(self, item_id: bytes, line: str) -> None:
        """Add what differs about an item."""
        self.add(f"{item_id.decode(errors='replace')}: {line}")
