"""What the search service can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hashlens.config import setting
from hashlens.errors import InvalidInputError
from hashlens.rpc.channel import ChannelSecurity
from hashlens.rpc.server_config import ServerConfig
from search_service.redis_config import RedisConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig(RedisConfig, ServerConfig):
    """Options of ``python -m search_service``."""

    listen: str = setting("127.0.0.1:50052", "Address and port to serve on; port 0 takes any.")
    data_dir: Path = setting(Path("hashlens-data"), "Directory of the arrays; made if missing.")
    encoder: str | None = setting(
        "127.0.0.1:50051", "host:port of the encoder service, for queries and items by image."
    )
    encoder_tls: bool = setting(False, "Use TLS to the encoder, and trust public authorities.")
    encoder_tls_ca: Path | None = setting(
        None, "PEM file of who signs the encoder's certificate; says --encoder-tls, too."
    )
    encoder_tls_cert: Path | None = setting(
        None, "PEM file of the certificate that the encoder is shown."
    )
    encoder_tls_key: Path | None = setting(None, "PEM file of its private key.")
    encoder_tls_name: str = setting(
        "", "Name in the encoder's certificate, where it is another one than the host's."
    )
    encoder_token_file: Path | None = setting(
        None, "File with the token for the encoder; scope read."
    )
    n_threads: int = setting(0, "Threads of the kernels; 0: as many as the process may use.")
    max_queue: int = setting(1024, "Most searches waiting for the kernels; one more is refused.")
    max_batch_queries: int = setting(256, "Most queries of one SearchBatch.")
    max_stream_window: int = setting(
        1024, "Most items of one UpsertStream that are in the works or answered and not yet read."
    )
    max_stream_bytes: int = setting(
        32 * 2**20, "Most bytes of them; one more item may go beyond it."
    )
    stream_idle_s: float = setting(
        300.0,
        "A stream of items ends when it has nothing to do, or its answers are not read, for this "
        "long, in seconds.",
    )
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
    compaction_share: float = setting(
        0.3, "Compact a collection when this share of its rows is dead; 0: only when asked."
    )
    compaction_min_rows: int = setting(100_000, "And at least so many are.")
    compaction_mb_per_s: float = setting(
        64.0, "How fast compaction copies at most, in MB/s; 0: no limit."
    )

    advertise: str | None = setting(
        None,
        "host:port where other replicas on the same Redis reach this one, to copy files; without, "
        "the address that is listened on, unless that is a wildcard.",
    )
    peer_tls_ca: Path | None = setting(
        None, "PEM file of who signs other replicas' certificates; without, public authorities."
    )
    peer_tls_name: str = setting(
        "", "Name in other replicas' certificates, where it is another one than the host's."
    )
    peer_token_file: Path | None = setting(
        None, "File with the token for other replicas; scope admin."
    )
    replica_silence_s: float = setting(
        300.0,
        "The log in Redis waits for a replica that was silent for at most so long, in seconds; "
        "after that it has to copy files anew.",
    )
    log_budget_mb: int = setting(
        1024, "How much of the log Redis keeps for replicas that are behind, in MiB."
    )
    max_copies: int = setting(2, "Most files that other replicas copy from here at a time.")
    copy_mb_per_s: float = setting(
        0.0,
        "Most that other replicas copy from here, in millions of bytes per second; 0: no limit.",
    )
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
        self._check_links()
        if self.n_threads < 0:
            raise InvalidInputError("n_threads is 0 or more", field="n_threads")
        for name in (
            *("max_queue", "max_batch_queries", "max_audits", "n_store_threads"),
            *("max_copies", "log_budget_mb", "max_stream_window", "max_stream_bytes"),
        ):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        for name in ("sketch_memory_mb", "index_memory_mb"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is 0 or more", field=name)
        if not 0 <= self.compaction_share <= 1:
            raise InvalidInputError("compaction_share is 0 to 1", field="compaction_share")
        for name in ("compaction_min_rows", "compaction_mb_per_s"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is 0 or more", field=name)
        for name in ("checkpoint_interval_s", "replica_silence_s", "stream_idle_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} is above 0", field=name)
        if self.copy_mb_per_s < 0:
            raise InvalidInputError("copy_mb_per_s is 0 or more", field="copy_mb_per_s")
        host, _, port = (self.advertise or "host:1").rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536) or " " in host:
            raise InvalidInputError(
                f"advertise is host:port, not {self.advertise!r}", field="advertise"
            )
        if self.scrub_mb_per_s < 0 or self.scrub_interval_s <= 0:
            raise InvalidInputError("scrub_mb_per_s is 0 or more, scrub_interval_s above 0")

    @property
    def encoder_security(self) -> ChannelSecurity:
        """How the encoder is known, and what it is shown."""
        return ChannelSecurity(
            tls=self.encoder_tls,
            tls_ca=self.encoder_tls_ca,
            tls_cert=self.encoder_tls_cert,
            tls_key=self.encoder_tls_key,
            tls_name=self.encoder_tls_name,
            token_file=self.encoder_token_file,
            insecure=self.insecure,
        )

    @property
    def peer_security(self) -> ChannelSecurity:
        """How other replicas are known: like this one, which shows them what it shows clients."""
        return ChannelSecurity(
            tls_ca=self.peer_tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            tls_name=self.peer_tls_name,
            token_file=self.peer_token_file,
            insecure=self.insecure,
        )

    def _check_links(self) -> None:
        if self.peer_tls_ca is not None and self.tls_cert is None:
            raise InvalidInputError(
                "replicas speak to each other as they serve: peer_tls_ca needs tls_cert",
                field="peer_tls_ca",
            )
        for name, prefix in (("encoder_security", "encoder"), ("peer_security", "peer")):
            try:
                getattr(self, name)
            except InvalidInputError as error:
                raise InvalidInputError(
                    f"{prefix}_{error.field}: {error.message}", field=f"{prefix}_{error.field}"
                ) from None
