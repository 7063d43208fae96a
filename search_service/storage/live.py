"""What a collection works with now: its files, what keeps them up to date, and its Redis."""

from __future__ import annotations

from dataclasses import dataclass

from hashlens.errors import HashlensError
from search_service.storage.catalog import Catalog
from search_service.storage.follower import Follower
from search_service.storage.keys import Meta
from search_service.storage.local import LocalCollection


@dataclass
class Live:
    """Shared by all that work on one collection; a rebuild replaces its files and its follower."""

    local: LocalCollection
    follower: Follower
    catalog: Catalog
    meta: Meta
    note: str = ""
    """What is done about files that are lost."""

    checkpoint_trouble: str = ""
    """Why there was no checkpoint the last time."""

    log_entries: int = 0
    """Of the log in Redis, when it was last looked at."""

    @property
    def trouble(self) -> HashlensError | None:
        """Why it takes no writes, if so."""
        return self.follower.trouble or self.follower.refusal or self.local.disk_trouble()

    def explained(self, trouble: HashlensError | None) -> str:
        """Return what is wrong, and what is done about it; without, what else there is to say."""
        if trouble is None:
            return self.checkpoint_trouble
        note = self.note if self.follower.needs_files else ""
        return f"{trouble.message} {note}".rstrip()
