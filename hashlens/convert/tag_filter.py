"""Filters by tags of `search_service.proto`."""

from __future__ import annotations

from hashlens.convert.collection import tags_from_proto
from hashlens.types import TagFilter
from hashlens.v1 import search_service_pb2 as spb


def filter_to_proto(wanted: TagFilter | None) -> spb.TagFilter | None:
    """Return the wire form; of a filter that all pass, none."""
    if wanted is None or wanted.is_empty:
        return None
    return spb.TagFilter(any=wanted.any, all=wanted.all, none=wanted.none)


def filter_from_proto(message: spb.TagFilter) -> TagFilter | None:
    """Return the value, its tags sorted and each once; None if all pass.

    Raises
    ------
    InvalidInputError
        Too many tags in a condition, or one that cannot be a tag.
    """
    found = TagFilter(
        any=tags_from_proto(message.any, field="any"),
        all=tags_from_proto(message.all, field="all"),
        none=tags_from_proto(message.none, field="none"),
    )
    return None if found.is_empty else found
