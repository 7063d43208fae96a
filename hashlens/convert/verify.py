"""Checks of `search_service.proto`."""

from __future__ import annotations

from hashlens.types import VerifyResult
from hashlens.v1 import search_service_pb2 as spb


def verify_to_proto(result: VerifyResult) -> spb.VerifyResponse:
    """Return the wire form."""
    return spb.VerifyResponse(
        version=result.version,
        n_catalog_items=result.n_catalog_items,
        n_array_items=result.n_array_items,
        differences=result.differences,
        n_differences=result.n_differences,
        n_repaired=result.n_repaired,
        digest=result.digest,
    )


def verify_from_proto(message: spb.VerifyResponse) -> VerifyResult:
    """Return the value."""
    return VerifyResult(
        version=message.version,
        n_catalog_items=message.n_catalog_items,
        n_array_items=message.n_array_items,
        differences=tuple(message.differences),
        n_differences=message.n_differences,
        n_repaired=message.n_repaired,
        digest=message.digest,
    )
