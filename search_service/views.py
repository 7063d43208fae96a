"""What filters leave of one snapshot, kept as long as the snapshot is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from hashlens.types import TagFilter

if TYPE_CHECKING:
    from search_service.snapshot import Snapshot

_MAX_BYTES: Final = 64 << 20


class Views:
    """The views of one snapshot that were asked for last. Thread-safe.

    They are the snapshot's own, so a version that nobody reads any more takes its views along, and
    the mapped files of a dropped or compacted collection are not kept by them.
    """

    def __init__(self) -> None:
        self.making = threading.Lock()
        """Held while a view is made, so that all who ask get the same one."""
        self._views: OrderedDict[TagFilter, tuple[Snapshot, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._n_bytes = 0

    def get(self, wanted: TagFilter) -> Snapshot | None:
        """Return the view of a filter, if it is there; never waits."""
        with self._lock:
            found = self._views.get(wanted)
            if found is None:
                return None
            self._views.move_to_end(wanted)
            return found[0]

    def put(self, wanted: TagFilter, view: Snapshot, n_bytes: int) -> None:
        """Keep a view that takes so many bytes; those asked for least lately make room."""
        with self._lock:
            self._views[wanted] = view, n_bytes
            self._n_bytes += n_bytes
            while self._n_bytes > _MAX_BYTES and len(self._views) > 1:
                _, (_, freed_bytes) = self._views.popitem(last=False)
                self._n_bytes -= freed_bytes
