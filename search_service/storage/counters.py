"""What a store counts, for who watches it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What has happened since the store was opened."""

    n_quarantined: int = 0
    """Collections whose files were put aside."""
    n_failed_checkpoints: int = 0
    n_damaged_features: int = 0
    """Features that did not match their checksums."""
    n_rows_scrubbed: int = 0
    """Features that the scrubber has read."""
    n_copied: int = 0
    """Collections whose files were copied from another replica."""
    n_rebuilt: int = 0
    """Collections whose files were made anew from Redis."""
