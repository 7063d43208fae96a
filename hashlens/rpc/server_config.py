"""What every server can be told."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hashlens.config import setting
from hashlens.errors import InvalidInputError
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
    max_connection_age_s: float = setting(
        300.0, "A connection is closed after this long, so that clients find new servers."
    )
    grace_s: float = setting(10.0, "Time that running calls get to end on SIGTERM, in seconds.")
    metrics_listen: str = setting(
        "", "Address and port of /metrics over HTTP, for Prometheus; empty: none."
    )
    log_level: str = setting("info", "Lowest level that is logged.")
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
        for name in ("listen", "metrics_listen"):
            value = getattr(self, name)
            host, _, port = value.rpartition(":")
            fits = bool(host) and port.isdecimal() and int(port) < 65536
            if not fits and (value or name == "listen"):
                raise InvalidInputError(f"{name} is host:port, not {value!r}", field=name)
        if self.log_level.upper() not in logging.getLevelNamesMapping():
            raise InvalidInputError(f"log_level {self.log_level!r} is none of logging's")
        for name in ("max_message_bytes", "default_deadline_s", "max_connection_age_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} is above 0", field=name)
        if self.log_burst < 0:
            raise InvalidInputError("log_burst is 0 or more", field="log_burst")
        if not 0 <= self.trace_sample_ratio <= 1:
            raise InvalidInputError("trace_sample_ratio is 0 to 1", field="trace_sample_ratio")
        if self.grace_s < 0:
            raise InvalidInputError("grace_s is 0 or more", field="grace_s")
