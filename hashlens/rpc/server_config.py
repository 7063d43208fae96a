"""What every server can be told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from hashlens.config import setting
from hashlens.errors import InvalidInputError
from hashlens.rpc import method_limits
from hashlens.rpc.addresses import is_loopback
from hashlens.rpc.limits import DEADLINE_S, MAX_MESSAGE_BYTES
from hashlens.rpc.logs import LOG_BURST, LogFormat


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What every server can be told; a service's own configuration extends it."""

    listen: str = setting("127.0.0.1:0", "Address and port to serve on; port 0 takes a free one.")
    max_message_bytes: int = setting(MAX_MESSAGE_BYTES, "Largest request or reply, in bytes.")
    default_deadline_s: float = setting(
        DEADLINE_S, "Time for a call whose client sets none, in seconds."
    )
    method_limits: str = setting(
        "",
        "Calls of a method that may be in the works at a time, such as Search=256,Upsert=16; one "
        "more is refused. Others keep their defaults, see docs/operations.md.",
    )
    max_bytes_in_flight: int = setting(
        2**30, "Most bytes of requests that are being read or in the works."
    )
    max_request_s: float = setting(60.0, "Longest for a request to arrive, in seconds.")
    max_connections: int = setting(
        4_096, "Most connections at a time; one more is closed. Each is a file descriptor."
    )
    handshake_s: float = setting(
        20.0, "Longest for a new connection to say what it speaks, in seconds."
    )
    max_connection_streams: int = setting(
        1_000, "Most calls at a time of one connection; what is more waits at the client."
    )
    max_connection_age_s: float = setting(
        300.0, "A connection is closed after this long, so that clients find new servers."
    )
    grace_s: float = setting(10.0, "Time that running calls get to end on SIGTERM, in seconds.")
    flush_s: float = setting(
        30.0, "Time to write what is held after that, in seconds; then the process ends as it is."
    )
    health_listen: str = setting(
        "",
        "Address and port that answers health checks and nothing else, without TLS, for probes; "
        "empty: none. The main port answers them, too.",
    )
    admin_listen: str = setting(
        "",
        "Loopback address and port of grpc.channelz, which tells who is connected; empty: none.",
    )
    stuck_s: float = setting(
        60.0,
        "Liveness fails when work that nobody waits for any more does not end for this long, in "
        "seconds.",
    )
    stall_s: float = setting(
        2.0, "An event loop that does not turn for this long is logged, in seconds."
    )
    tls_cert: Path | None = setting(
        None, "PEM file of the certificate to serve with; read again when it changes."
    )
    tls_key: Path | None = setting(None, "PEM file of its private key.")
    tls_client_ca: Path | None = setting(
        None, "PEM file of who signs clients' certificates; one without is turned away (mTLS)."
    )
    tokens: Path | None = setting(
        None, "File of the bearer tokens that are accepted, `SCOPE TOKEN [NAME]` a line."
    )
    insecure: bool = setting(
        False, "Listen where others can reach it without TLS, and send tokens without it."
    )
    reflection: bool = setting(False, "Describe the services to tools such as grpcurl.")
    metrics_listen: str = setting(
        "", "Address and port of /metrics over HTTP, for Prometheus; empty: none."
    )
    log_level: str = setting(
        "info", "Lowest level that is logged: debug, info, warning, error or critical."
    )
    log_format: LogFormat = setting("text", "How logs are written.")
    log_burst: int = setting(
        LOG_BURST, "Most like warnings that are logged in ten seconds; 0: all."
    )
    access_log: bool = setting(False, "Log a line for each call, health checks excepted.")
    otlp_endpoint: str = setting(
        "",
        "OpenTelemetry collector that spans are sent to, http://host:port or https://host:port, by "
        "OTLP over gRPC; empty: none.",
    )
    trace_sample_ratio: float = setting(
        1.0, "Share of the traces begun here that are recorded; a caller's own decision holds."
    )

    def __post_init__(self) -> None:
        for name in ("listen", "health_listen", "admin_listen", "metrics_listen"):
            value = getattr(self, name)
            host, _, port = value.rpartition(":")
            fits = bool(host) and port.isdecimal() and int(port) < 65536
            if not fits and (value or name == "listen"):
                raise InvalidInputError(f"{name} is host:port, not {value!r}", field=name)
        if self.admin_listen and not is_loopback(self.admin_listen):
            raise InvalidInputError(
                f"admin_listen is on a loopback address such as 127.0.0.1, not "
                f"{self.admin_listen}: it has no TLS and tells who is connected",
                field="admin_listen",
            )
        method_limits.parse(self.method_limits)
        if self.max_bytes_in_flight < self.max_message_bytes:
            raise InvalidInputError(
                f"max_bytes_in_flight ({self.max_bytes_in_flight}) must hold one message of "
                f"max_message_bytes ({self.max_message_bytes})",
                field="max_bytes_in_flight",
            )
        self._check_security()
        if self.log_level.upper() not in logging.getLevelNamesMapping():
            raise InvalidInputError(
                f"log_level is debug, info, warning, error or critical, not {self.log_level!r}",
                field="log_level",
            )
        for name in (
            *("max_message_bytes", "default_deadline_s", "max_connection_age_s"),
            *("max_request_s", "stuck_s", "stall_s", "handshake_s"),
            *("max_connections", "max_connection_streams"),
        ):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} is above 0", field=name)
        for name in ("grace_s", "flush_s", "log_burst"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is 0 or more", field=name)
        if not 0 <= self.trace_sample_ratio <= 1:
            raise InvalidInputError("trace_sample_ratio is 0 to 1", field="trace_sample_ratio")

    def _check_security(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidInputError("tls_cert and tls_key go together: give both", field="tls_key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidInputError(
                "tls_client_ca needs tls_cert and tls_key", field="tls_client_ca"
            )
        if self.tls_cert is None and not self.insecure and not is_loopback(self.listen):
            raise InvalidInputError(
                f"{self.listen} can be reached from elsewhere, and nothing would be encrypted. "
                "Give --tls-cert and --tls-key, listen on 127.0.0.1 or [::1], or say --insecure if "
                "the network keeps strangers away.",
                field="listen",
            )
