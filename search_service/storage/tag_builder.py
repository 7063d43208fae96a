"""The thread that indexes a collection's tags behind a start."""

from __future__ import annotations

import logging
import threading
import time

from search_service.storage.local import LocalCollection

logger = logging.getLogger(__name__)


class TagBuilder:
    """Indexes the tags that are there, so that the first search through a filter need not.

    Parameters
    ----------
    local
        Whose.
    """

    def __init__(self, local: LocalCollection) -> None:
        self._local = local
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"tags-{local.spec.name}", daemon=True
        )

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; `join` waits for it."""
        self._stopping.set()

    def join(self) -> None:
        """Wait until the thread has ended, a few milliseconds after `stop`."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            took_s = 0.0
            # Searches come first: half of one CPU's time is enough here.
            while not self._stopping.wait(took_s):
                began_s = time.monotonic()
                if self._local.snapshot.ids.index_tags():
                    return
                took_s = time.monotonic() - began_s
        except Exception:  # Whoever needs them tries again, and is told.
            logger.exception("the tags of %s are not indexed", self._local.spec.name)
