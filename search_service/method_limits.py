"""How many calls of each method may be in the works at a time, unless one is told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

METHOD_LIMITS: Final[Mapping[str, int]] = {
    # One pass over the codes answers up to 64 of these.
    "Search": 256,
    # As many queries as the executor's queue holds, beside single ones.
    "SearchBatch": 4,
    # Holds a block's row numbers and a message for as long as its reader likes.
    "StreamBall": 32,
    # Each has a bound of its own, below this one, that says more.
    "Audit": 8,
    "Verify": 8,
    "Compact": 16,
    # Memory for the items, and a thread that waits for Redis.
    "Upsert": 64,
    "UpsertStream": 32,
    "Delete": 64,
    "GetItems": 32,
    # Seldom, and cheap or serialised by the store.
    "CreateCollection": 16,
    "GetCollection": 64,
    "ListCollections": 16,
    "DropCollection": 16,
    # `max_copies` bounds what is read.
    "ListFiles": 32,
    "ReadFile": 32,
}
