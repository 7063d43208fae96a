"""What the search service can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hashlens.config import setting
from hashlens.errors import InvalidInputError
from hashlens.rpc.server import ServerConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ServerConfig):
    """Options of ``python -m search_service``."""

    listen: str = setting("127.0.0.1:50052", "Address and port to serve on; port 0 takes any.")
    data_dir: Path = setting(Path("hashlens-data"), "Directory of the arrays; made if missing.")
    redis_url: str | None = setting(
        None, "Redis or Valkey, redis://... or unix://...; without, one is started beside the data."
    )
    encoder: str | None = setting(
        "127.0.0.1:50051", "host:port of the encoder service, for queries and items by image."
    )
    n_threads: int = setting(0, "Threads of the kernels; 0: as many as the process may use.")
    max_queue: int = setting(1024, "Most searches waiting for the kernels; one more is refused.")
    max_batch_queries: int = setting(256, "Most queries of one SearchBatch.")
    max_audits: int = setting(
        1, "Most audits at a time; one more is refused. Each reads every feature."
    )
    n_store_threads: int = setting(16, "Threads that wait for Redis.")
    sketch_memory_mb: int = setting(
        0,
        "Memory for sketches of features, in MiB: exact answers from large pools that read few "
        "features. A row takes its width in bytes and 32 more. 0: none.",
    )
    index_memory_mb: int = setting(
        2048,
        "Memory for indexes of codes, in MiB: small radii in tables of a million rows and more "
        "without reading all codes. A row takes 12 to 16 bytes at 64 bits. 0: none.",
    )
    checkpoint_interval_s: float = setting(30.0, "Longest between checkpoints, in seconds.")
    scrub_mb_per_s: float = setting(
        16.0,
        "How fast all files are read and compared with their checksums in the background, in "
        "millions of bytes per second; 0: never.",
    )
    scrub_interval_s: float = setting(
        86_400.0, "How long after one such reading the next begins, in seconds."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_threads < 0:
            raise InvalidInputError("n_threads is 0 or more", field="n_threads")
        for name in ("max_queue", "max_batch_queries", "max_audits", "n_store_threads"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        for name in ("sketch_memory_mb", "index_memory_mb"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is 0 or more", field=name)
        if self.scrub_mb_per_s < 0 or self.scrub_interval_s <= 0:
            raise InvalidInputError("scrub_mb_per_s is 0 or more, scrub_interval_s above 0")
        if self.checkpoint_interval_s <= 0:
            raise InvalidInputError("checkpoint_interval_s is above 0")
