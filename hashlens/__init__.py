"""Hashlens: image retrieval by learned binary codes.

What both services and their users share. `Client` and `AsyncClient` are the way in::

    from hashlens import Client

    with Client() as client:
        for hit in client.search("photos", image=path.read_bytes(), k=20).hits:
            print(hit.id, hit.hamming_bits, hit.distance)
"""

from __future__ import annotations

from hashlens.client import AsyncClient, Client, ClientConfig
from hashlens.errors import HashlensError
from hashlens.rpc.channel import ChannelSecurity
from hashlens.types import (
    CollectionSpec,
    Embedding,
    FeatureDtype,
    Item,
    Query,
    Rank,
    SearchOptions,
    TagFilter,
)

__all__ = [
    "AsyncClient",
    "ChannelSecurity",
    "Client",
    "ClientConfig",
    "CollectionSpec",
    "Embedding",
    "FeatureDtype",
    "HashlensError",
    "Item",
    "Query",
    "Rank",
    "SearchOptions",
    "TagFilter",
]

__version__ = "0.1.0"
