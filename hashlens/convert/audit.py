"""Audits of `search_service.proto`."""

from __future__ import annotations

from hashlens.convert.search import hit_from_proto, hit_to_proto, result_from_proto, result_to_proto
from hashlens.errors import InvalidInputError
from hashlens.types import AuditResult
from hashlens.v1 import search_service_pb2 as spb


def audit_to_proto(result: AuditResult, n_bits: int) -> spb.AuditResponse:
    """Return the wire form; `n_bits` is the width of the collection's codes."""
    return spb.AuditResponse(
        answer=result_to_proto(result.answer, n_bits),
        exhaustive_hits=[hit_to_proto(hit, n_bits) for hit in result.exhaustive_hits],
        recall=result.recall,
        first_miss=result.first_miss,
    )


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
