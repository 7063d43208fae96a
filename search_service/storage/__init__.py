"""The store of the search service: Redis is the truth, memory-mapped arrays are the view.

A write is acknowledged when Redis has it. Every store follows the log that Redis keeps, appends to
files of its own and publishes immutable `search_service.snapshot.Snapshot` objects, so a search
never waits for Redis. `docs/format.md` describes every byte of both.
"""

from search_service.storage.collection import Collection
from search_service.storage.embedded import EmbeddedRedis
from search_service.storage.records import Record
from search_service.storage.store import Store
from search_service.storage.store_config import StoreConfig

__all__ = ["Collection", "EmbeddedRedis", "Record", "Store", "StoreConfig"]
