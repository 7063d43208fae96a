"""The standard health service, fit for a server that stops."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health


class HealthServicer(health.aio.HealthServicer):
    """The standard health service, whose open watches end when the server stops.

    Without that, ``stop(grace)`` would wait for all of its grace.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[Any]] = set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - the contract's name
        """Stream the status until the caller leaves or the server stops."""
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await super().Watch(request, context)
        finally:
            self._watches.discard(task)

    async def end(self) -> None:
        """Say NOT_SERVING to everybody, for good, and end the watches."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(0)  # Let the watches send it.
        for task in list(self._watches):
            task.cancel()
