"""Audits of `search_service.proto`."""

from __future__ import annotations

from collections.abc import Callable

from hashlens.convert.search import (
    HITS_AT_ONCE,
    hit_from_proto,
    hit_to_proto,
    result_from_proto,
    result_to_proto,
)
from hashlens.errors import InvalidInputError
from hashlens.types import AuditResult
from hashlens.v1 import search_service_pb2 as spb


def audit_to_proto(
    result: AuditResult, n_bits: int, *, check: Callable[[], None] = lambda: None
) -> spb.AuditResponse:
    """Return the wire form.

    Parameters
    ----------
    result
        What to send.
    n_bits
        Width of the collection's codes.
    check
        Called every thousand hits or so, to raise if nobody waits for the reply any more.
    """
    reply = spb.AuditResponse(
        answer=result_to_proto(result.answer, n_bits, check=check),
        recall=result.recall,
        first_miss=result.first_miss,
    )
    for lo in range(0, len(result.exhaustive_hits), HITS_AT_ONCE):
        check()
        part = result.exhaustive_hits[lo : lo + HITS_AT_ONCE]
        reply.exhaustive_hits.extend([hit_to_proto(hit, n_bits) for hit in part])
    return reply


def audit_from_proto(message: spb.AuditResponse) -> AuditResult:
    """Return the value; InvalidInputError for a recall or a position that cannot be."""
    if not 0 <= message.recall <= 1:  # NaN fails, too
        raise InvalidInputError(f"{message.recall} is no recall: one lies in 0..1", field="recall")
    first_miss = message.first_miss if message.HasField("first_miss") else None
    if first_miss is not None and first_miss >= len(message.exhaustive_hits):
        raise InvalidInputError(
            f"first_miss is {first_miss}, but there are {len(message.exhaustive_hits)} hits",
            field="first_miss",
        )
    return AuditResult(
        answer=result_from_proto(message.answer),
        exhaustive_hits=tuple(hit_from_proto(hit) for hit in message.exhaustive_hits),
        recall=message.recall,
        first_miss=first_miss,
    )
