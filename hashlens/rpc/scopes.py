"""Who may call what: the one table."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class Scope(enum.IntEnum):
    """What a token allows; each includes those before it."""

    READ = 1
    """Searching, encoding, and looking at what is there."""
    WRITE = 2
    """Making collections; writing and deleting items."""
    ADMIN = 3
    """Dropping, erasing and repairing collections, and copying all of their files."""


_READ, _WRITE, _ADMIN = Scope.READ, Scope.WRITE, Scope.ADMIN

SCOPES: Final[Mapping[str, Mapping[str, Scope]]] = {
    "hashlens.v1.EncoderService": {
        "Encode": _READ,
        "EncodeBatch": _READ,
        "EncodeStream": _READ,
        "GetModel": _READ,
    },
    "hashlens.v1.SearchService": {
        "CreateCollection": _WRITE,
        "GetCollection": _READ,
        "ListCollections": _READ,
        "DropCollection": _ADMIN,
        "Upsert": _WRITE,
        "UpsertStream": _WRITE,
        "Delete": _WRITE,
        "GetItems": _READ,
        "Search": _READ,
        "SearchBatch": _READ,
        "StreamBall": _READ,
        "Audit": _READ,
        "Verify": _ADMIN,
        "Compact": _ADMIN,
    },
    "hashlens.v1.ReplicaService": {"ListFiles": _ADMIN, "ReadFile": _ADMIN},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": _READ},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _READ},
}
"""The scope that each method needs, by the full name of its service."""

_OPEN: Final = "/grpc.health.v1.Health/"


def is_open(method: str) -> bool:
    """Tell whether everybody may call a method, ``/package.Service/Method``: health is for all."""
    return method.startswith(_OPEN)


def scope_of(method: str) -> Scope | None:
    """Return what a method needs; None for one that the table does not know."""
    service, _, name = method.removeprefix("/").rpartition("/")
    return SCOPES.get(service, {}).get(name)
