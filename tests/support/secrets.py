"""Bytes that can be recognised, and the files that hold them."""

from __future__ import annotations

from pathlib import Path


def files_with(directory: Path, secrets: dict[str, bytes]) -> dict[str, set[str]]:
    """Which files below a directory hold which of the secrets."""
    found: dict[str, set[str]] = {name: set() for name in secrets}
    for path in directory.rglob("*"):
        try:
            data = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:
            continue
        for name, content in secrets.items():
            if content in data:
                found[name].add(str(path.relative_to(directory)))
    return found


def nowhere(directory: Path, secrets: dict[str, bytes]) -> bool:
    """Whether no file below a directory holds any of the secrets."""
    return not any(files_with(directory, secrets).values())
