"""What Redis takes for an id, and how fast files are made of it alone."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import redis

from hashlens.errors import DeadlineError, UnavailableError
from search_service.bench.report import Measured, WrongAnswerError
from search_service.storage.catalog import Catalog
from search_service.storage.connection import connect
from search_service.storage.data_dir import replica_id
from search_service.storage.digest import digest_of
from search_service.storage.embedded import EmbeddedRedis
from search_service.storage.keys import Keys, Meta
from search_service.storage.local import LocalCollection
from search_service.storage.rebuild import rebuild

if TYPE_CHECKING:
    from search_service.bench.restart import RestartConfig

_TIMEOUT_S: Final = 5.0
_TRIMMED_S: Final = 120.0
_LOADED_S: Final = 600.0


def used_bytes(data_dir: Path) -> int:
    """Return the memory that the server of a search service counts as used, in bytes."""
    with server_of(data_dir) as client:
        return int(client.info("memory")["used_memory"])


def wait_trimmed(data_dir: Path, name: str) -> None:
    """Wait until a checkpoint has trimmed the log to its last entry.

    Raises
    ------
    DeadlineError
        It takes too long.
    """
    give_up_s = time.monotonic() + _TRIMMED_S
    with server_of(data_dir) as client:
        while client.xlen(Keys(name).log) > 1:
            if time.monotonic() > give_up_s:
                raise DeadlineError(f"the log was not trimmed within {_TRIMMED_S:g} s")
            time.sleep(0.1)


def rebuilt(
    data_dir: Path, name: str, config: RestartConfig, rows: int, id_bytes: float
) -> Measured:
    """Make a stopped service's files anew from its Redis, and time it.

    Raises
    ------
    WrongAnswerError
        They do not hold what the service's files do.
    """
    with (
        tempfile.TemporaryDirectory(dir=data_dir) as folder,
        EmbeddedRedis(data_dir / "redis") as server,
    ):
        meta = _meta(server.url, name)
        began_s = time.monotonic()
        made = rebuild(
            Path(folder),
            meta,
            url=server.url,
            # Another's would have the log kept for somebody who never comes back.
            replica_id=replica_id(data_dir),
            timeout_s=_TIMEOUT_S,
            segment_bytes=1,
        )
        took_s = time.monotonic() - began_s
        beside = made.directory.with_name(name)
        made.directory.rename(beside)
        if _digest(beside, config.bits) != _digest(data_dir / "collections" / name, config.bits):
            raise WrongAnswerError(f"{rows} rows made anew are not those that were written")
    return Measured(
        case="files from Redis",
        rows=rows,
        bits=config.bits,
        k=0,
        ours_ms=took_s * 1e3,
        extra={
            "ids_per_s": round(rows / took_s),
            "redis_bytes_per_id": id_bytes,
            "n_buckets": meta.n_buckets,
        },
    )


@contextlib.contextmanager
def server_of(data_dir: Path) -> Iterator[redis.Redis]:
    """Give a client of the server that a search service runs on its data."""
    note = json.loads((data_dir / "redis" / "server.json").read_bytes())
    with connect(f"unix://{note['socket']}", _TIMEOUT_S) as client:
        yield client


def _meta(url: str, name: str) -> Meta:
    """Return what a server says of a collection, once it has read its own file."""
    give_up_s = time.monotonic() + _LOADED_S
    with contextlib.closing(Catalog(url, _TIMEOUT_S)) as catalog:
        while True:
            try:
                meta = catalog.meta(name, _TIMEOUT_S)
            except UnavailableError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.1)
            else:
                assert meta is not None
                return meta


def _digest(directory: Path, n_bits: int) -> bytes:
    with contextlib.closing(LocalCollection.load(directory)) as local:
        return digest_of(local.frozen(), local.seq, n_bits, threading.Event())
