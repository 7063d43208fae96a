"""What is written: the item as the store takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One item to write."""

    id: str
    code: bytes
    """Packed bits, see `hashlens.codes`."""
    feature: bytes = b""
    """Little-endian numbers of the collection's dtype; empty for a collection of codes only."""
    payload: bytes = b""
    tags: tuple[str, ...] = ()
    """Words to filter by, sorted, each once."""
    expires_ms: int = 0
    """When it removes itself, in milliseconds since 1970; 0: never."""
