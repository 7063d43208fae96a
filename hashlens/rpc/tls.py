"""Certificates of both ends, read again when their files change."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from hashlens.errors import InvalidInputError
from hashlens.rpc.watched import Watched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of one end of a connection; gRPC takes TLS 1.2 and 1.3, nothing older."""

    cert: Path | None = None
    """What is shown to the other end, with the certificates in between."""
    key: Path | None = None
    """Its private key, not encrypted."""
    ca: Path | None = None
    """Who has to have signed what the other end shows."""

    def paths(self) -> list[Path]:
        """Return the files there are."""
        return [path for path in (self.cert, self.key, self.ca) if path is not None]


@dataclass(frozen=True, kw_only=True, repr=False)
class Pem:
    """What `TlsFiles` held at one moment: a key and a certificate that belong together."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


def watched(what: str, files: TlsFiles) -> Watched[Pem]:
    """Return the contents of PEM files that are used, kept up to date.

    Raises
    ------
    InvalidInputError
        A file cannot be read, is no PEM, or the key is not the certificate's.
    """

    def parse(*contents: bytes) -> Pem:
        # `Watched` reads again afterwards, so the library has checked these very bytes.
        _check(files)
        by_path = dict(zip(files.paths(), contents, strict=True))

        def content(path: Path | None) -> bytes | None:
            return None if path is None else by_path[path]

        return Pem(cert=content(files.cert), key=content(files.key), ca=content(files.ca))

    return Watched(what, files.paths(), parse)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return what a TLS server shows and asks for, as its files say at each handshake.

    With a `ca`, a client without a certificate that it signed is turned away in the handshake.

    Raises
    ------
    InvalidInputError
        See `watched`.
    """
    pems = watched("the server's certificate", files)
    in_use = pems.value

    def changed() -> grpc.ServerCertificateConfiguration | None:
        # Called by gRPC's own threads before a handshake.
        nonlocal in_use
        try:
            newest = pems.value
        except Exception:
            logger.exception("the server's certificate could not be read again")
            return None
        if newest is in_use:
            return None
        in_use = newest
        return _configuration(newest)

    # None, whatever the stubs say, where nothing has changed.
    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], changed)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(in_use), fetch, require_client_authentication=files.ca is not None
    )


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """Return what a client shows and asks for; without a `ca` it trusts the public ones."""
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None
    assert pem.cert is not None
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)


def _check(files: TlsFiles) -> None:
    """Raise InvalidInputError unless the files can be used together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if files.cert is not None:
        try:
            # Asked for a password, the library would turn to the terminal.
            context.load_cert_chain(files.cert, files.key, password=lambda: "")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or "is there a password on the key?"
            raise InvalidInputError(
                f"{files.cert} and {files.key} are no certificate and its private key, in PEM and "
                f"without a password ({reason})."
            ) from None
    if files.ca is not None:
        try:
            context.load_verify_locations(files.ca)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or "nothing in it"
            raise InvalidInputError(
                f"{files.ca} holds no certificates in PEM ({reason})."
            ) from None
