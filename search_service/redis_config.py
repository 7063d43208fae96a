"""Where Redis is, how it is known, and what it is shown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from hashlens.config import setting
from hashlens.errors import InvalidInputError
from hashlens.rpc.addresses import is_loopback

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RedisConfig:
    """Options of who connects to Redis."""

    redis_url: str | None = setting(
        None,
        "Redis or Valkey, redis://..., rediss://... (TLS) or unix://...; without, one is started "
        "beside the data.",
        secret=True,
    )
    redis_username: str | None = setting(None, "ACL user to log in as; without, the default user.")
    redis_password_file: Path | None = setting(
        None, "File with the password, in one line; read again at each connection."
    )
    redis_tls_ca: Path | None = setting(
        None, "PEM file of who signs Redis's certificate; without, public authorities."
    )
    redis_tls_cert: Path | None = setting(None, "PEM file of the certificate that Redis is shown.")
    redis_tls_key: Path | None = setting(None, "PEM file of its private key.")

    def store_url(self) -> str | None:
        """Return where Redis is, with all that connecting needs; None for one of our own.

        The URL names the file of a password, not the password; one that `redis_url` holds stays in
        it. Logs a warning if a password would travel unencrypted.

        Raises
        ------
        InvalidInputError
            The options do not go together, or a file is not there.
        """
        files = {
            "password_file": self.redis_password_file,
            "ssl_ca_certs": self.redis_tls_ca,
            "ssl_certfile": self.redis_tls_cert,
            "ssl_keyfile": self.redis_tls_key,
        }
        options = {name: str(path.resolve()) for name, path in files.items() if path is not None}
        if self.redis_url is None:
            if options or self.redis_username:
                raise InvalidInputError(
                    "the other redis_ options are for a Redis of your own: give redis_url",
                    field="redis_url",
                )
            return None
        try:
            parts = urlsplit(self.redis_url)
            has_password = bool(self.redis_password_file or parts.password)
        except ValueError:
            return self.redis_url  # Whoever connects says so, without repeating it.
        if (self.redis_tls_cert is None) != (self.redis_tls_key is None):
            raise InvalidInputError(
                "redis_tls_cert and redis_tls_key go together: give both", field="redis_tls_key"
            )
        if self.redis_tls_ca or self.redis_tls_cert:
            if parts.scheme != "rediss":
                raise InvalidInputError(
                    "for redis_tls_ca and redis_tls_cert, redis_url begins with rediss://",
                    field="redis_url",
                )
        elif parts.scheme == "redis" and has_password and not _is_here(parts.hostname):
            logger.warning(
                "the password for Redis travels unencrypted: use rediss:// if others can listen"
            )
        for path in files.values():
            _check_readable(path)
        if self.redis_username:
            options["username"] = self.redis_username
        if not options:
            return self.redis_url
        joint = "&" if parts.query else "?"
        return f"{self.redis_url}{joint}{urlencode(options)}"


def _is_here(host: str | None) -> bool:
    return host is None or is_loopback(f"[{host}]:0" if ":" in host else f"{host}:0")


def _check_readable(path: Path | None) -> None:
    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}.") from None
