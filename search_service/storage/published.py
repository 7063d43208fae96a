"""The newest snapshot, and who waits for it."""

from __future__ import annotations

import threading

from hashlens.errors import DeadlineError
from search_service.snapshot import Snapshot


class Published:
    """Holds the newest snapshot; one thread publishes, any may read and wait.

    Parameters
    ----------
    name
        The collection's, for messages.
    snapshot
        The first.
    """

    def __init__(self, name: str, snapshot: Snapshot) -> None:
        self._name = name
        self._changed = threading.Condition()
        self.newest = snapshot
        """Cheap to read, takes no lock."""

    def publish(self, snapshot: Snapshot) -> None:
        """Put a newer one in its place."""
        with self._changed:
            self.newest = snapshot
            self._changed.notify_all()

    def wait_for(self, version: int, deadline_s: float) -> Snapshot:
        """Return the newest snapshot as soon as it has a version; else DeadlineError."""
        snapshot = self.newest
        if snapshot.version >= version:
            return snapshot
        with self._changed:
            if not self._changed.wait_for(
                lambda: self.newest.version >= version, timeout=max(deadline_s, 0)
            ):
                raise DeadlineError(
                    f"Version {version} of {self._name} has not come within {deadline_s:g} s; "
                    f"this replica has {self.newest.version}."
                )
            return self.newest
