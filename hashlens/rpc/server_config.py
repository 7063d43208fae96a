"""What every server can be told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from hashlens.config import setting
from hashlens.errors import InvalidInputError
from hashlens.rpc.addresses import is_loopback
from hashlens.rpc.limits import DEADLINE_S, MAX_MESSAGE_BYTES
from hashlens.rpc.logs import LogFormat


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
    log_level: str = setting("info", "Lowest level that is logged.")
    log_format: LogFormat = setting("text", "How logs are written.")

    def __post_init__(self) -> None:
        for name in ("listen", "metrics_listen"):
            value = getattr(self, name)
            host, _, port = value.rpartition(":")
            fits = bool(host) and port.isdecimal() and int(port) < 65536
            if not fits and (value or name == "listen"):
                raise InvalidInputError(f"{name} is host:port, not {value!r}", field=name)
        self._check_security()
        if self.log_level.upper() not in logging.getLevelNamesMapping():
            raise InvalidInputError(f"log_level {self.log_level!r} is none of logging's")
        for name in ("max_message_bytes", "default_deadline_s", "max_connection_age_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} is above 0", field=name)
        if self.grace_s < 0:
            raise InvalidInputError("grace_s is 0 or more", field="grace_s")

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
