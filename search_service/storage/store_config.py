"""What a store can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from search_service.storage.replicas import FORGET_S, SILENCE_S


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a `Store` needs to know."""

    data_dir: Path
    """Where this replica's files are; made if it is not there. One process at a time."""
    redis_url: str | None = field(default=None, repr=False)
    """``redis://``, ``rediss://`` or ``unix://``; Redis 7.0 or newer, or Valkey. None: a server of
    the store's own, whose data are in `data_dir`, too."""
    checkpoint_interval_s: float = 30.0
    """A write is safe in the local files after at most about this long, in seconds."""
    checkpoint_rows: int = 500_000
    """A checkpoint comes earlier after so many writes."""
    checkpoint_bytes: int = 256 << 20
    """A checkpoint comes earlier after so many bytes of the log: Redis holds them in memory."""
    log_budget_bytes: int = 1 << 30
    """How much of the log Redis keeps for slower replicas, in bytes. One that is further behind
    loses its place."""
    segment_bytes: int = 256 << 20
    """About how long a file of features gets, in bytes."""
    redis_timeout_s: float = 5.0
    """The longest wait for one reply of Redis, in seconds."""
    expire_interval_s: float = 1.0
    """How often to look for items that have expired, in seconds."""
    address: str = ""
    """host:port where other replicas reach this one; empty if they cannot."""
    hello_interval_s: float = 5.0
    """How often to tell the other replicas that this one is alive, in seconds."""
    replica_silence_s: float = SILENCE_S
    """The log is not kept for a replica that was silent for longer, in seconds."""
    replica_forget_s: float = FORGET_S
    """A replica that was silent for longer is forgotten, in seconds."""
    resync_patience_s: float = 60.0
    """How long to try peers that do not serve before files are made anew from Redis, which may not
    have all features, in seconds."""
    lease_s: float = 300.0
    """Files that another replica copies are kept for so long after it last read, in seconds."""
    discovery_interval_s: float = 2.0
    """How often to look for collections that other processes made or dropped, in seconds."""
    compaction_share: float = 0.3
    """Compact a collection when this share of its rows is dead; 0: only when asked."""
    compaction_min_rows: int = 100_000
    """And at least so many are."""
    compaction_mb_per_s: float = 64.0
    """How fast compaction copies at most, in millions of bytes per second; 0: no limit."""
    scrub_mb_per_s: float = 16.0
    """How fast all files are read and compared with their checksums in the background, in millions
    of bytes per second; 0: never."""
    scrub_interval_s: float = 86_400.0
    """How long after one such reading the next begins, in seconds."""
