"""The sum of a write that went in chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

from hashlens.rpc.status import error_of
from hashlens.types import ItemFailure, WriteResult
from hashlens.v1 import search_service_pb2 as spb


@dataclass(slots=True)
class WriteTally:
    """Adds up the replies of one chunked write."""

    version: int = 0
    n_written: int = 0
    n_sent: int = 0
    failures: list[ItemFailure] = field(default_factory=list)

    def add(self, request: spb.UpsertRequest, reply: spb.UpsertResponse) -> None:
        """Count one chunk."""
        self.version = max(self.version, reply.version)
        self.n_written += reply.n_written
        self.failures += [
            ItemFailure(
                index=self.n_sent + failure.index, id=failure.id, error=error_of(failure.error)
            )
            for failure in reply.failures
        ]
        self.n_sent += len(request.items) + len(request.packed.id_ends) // 4

    def result(self) -> WriteResult:
        """Return the sum."""
        return WriteResult(
            version=self.version, n_written=self.n_written, failures=tuple(self.failures)
        )
