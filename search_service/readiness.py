"""How the search service is, in words that may be told to anybody."""

from __future__ import annotations

from collections.abc import Sequence

from hashlens.errors import UnavailableError
from hashlens.rpc.health import ServiceState
from search_service.executor import Executor
from search_service.storage.collection import Collection


class Readiness:
    """Knows whether searches should come, and why not.

    A replica is ready as soon as it has all collections once, and stays so: what it loses
    later it still answers from what it has, and the others may have lost it, too.

    Parameters
    ----------
    stuck_s
        How long work that nobody wants may go on, in seconds.
    """

    def __init__(self, stuck_s: float) -> None:
        self._stuck_s = stuck_s
        self._has_had_all = False
        self.stage = "starting"
        """What a start is at."""

    def while_starting(self) -> ServiceState:
        """Return how a service is that has not warmed up."""
        return ServiceState(is_ready=False, reasons=(self.stage,))

    def of(self, executor: Executor, collections: Sequence[Collection]) -> ServiceState:
        """Return how a service is that has."""
        reasons = []
        is_live = executor.overtime_s < self._stuck_s
        if not is_live:
            reasons.append(
                f"a search that nobody waits for has not ended for {executor.overtime_s:.0f} s"
            )
        n_empty = n_behind = n_without_redis = n_read_only = 0
        for collection in collections:
            trouble = collection.trouble
            if collection.needs_files:
                is_empty = collection.snapshot().rows == 0
                n_empty += is_empty
                n_behind += not is_empty
            elif isinstance(trouble, UnavailableError):
                n_without_redis += 1
            elif trouble is not None:
                n_read_only += 1
        self._has_had_all |= n_empty == 0
        for n, what in (
            (n_empty, "has no files here yet: they are being copied or made anew"),
            (n_behind, "has fallen behind: its files are being replaced, and searched meanwhile"),
            (n_without_redis, "takes no writes: Redis is away or refuses. Searching goes on"),
            (n_read_only, "takes no writes: `hashlens collections` says why. Searching goes on"),
        ):
            if n:
                reasons.append(f"of {len(collections)} collections, {n} {what}")
        return ServiceState(
            is_live=is_live, is_ready=self._has_had_all and is_live, reasons=tuple(reasons)
        )
