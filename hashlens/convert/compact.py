"""Erasures of `search_service.proto`."""

from __future__ import annotations

from hashlens.convert.collection import replica_from_proto, replica_to_proto
from hashlens.types import CompactResult, ErasedFile
from hashlens.v1 import search_service_pb2 as spb


def compact_to_proto(result: CompactResult) -> spb.CompactResponse:
    """Return the wire form."""
    return spb.CompactResponse(
        version=result.version,
        n_rows_erased=result.n_rows_erased,
        files=[
            spb.ErasedFile(path=file.path, length_bytes=file.length_bytes, gone=file.gone)
            for file in result.files
        ],
        log_begins_after=result.log_begins_after,
        redis_rewritten=result.redis_rewritten,
        replicas=map(replica_to_proto, result.replicas),
        complete=result.complete,
    )


def compact_from_proto(message: spb.CompactResponse) -> CompactResult:
    """Return the value."""
    return CompactResult(
        version=message.version,
        n_rows_erased=message.n_rows_erased,
        files=tuple(
            [ErasedFile(file.path, file.length_bytes, file.gone) for file in message.files]
        ),
        log_begins_after=message.log_begins_after,
        redis_rewritten=message.redis_rewritten,
        replicas=tuple(map(replica_from_proto, message.replicas)),
        complete=message.complete,
    )
