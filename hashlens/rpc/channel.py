"""Opening a connection to a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from hashlens.errors import InvalidInputError
from hashlens.rpc.addresses import is_loopback
from hashlens.rpc.fresh_channel import AioFreshChannel, FreshChannel
from hashlens.rpc.tls import Pem, TlsFiles, channel_credentials, watched
from hashlens.rpc.tokens import checked_token
from hashlens.rpc.watched import Watched

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ChannelSecurity:
    """How a client knows its server, and the server its client.

    With all defaults a connection is neither encrypted nor authenticated. Files are read again
    when they change: a new token goes with the next call, and new certificates with a connection
    that the next call opens, while those in flight end on the old one.
    """

    tls: bool = False
    """Encrypt; any of the next three says so, too."""
    tls_ca: Path | None = None
    """PEM file of who has to have signed the server's certificate; None: the public authorities."""
    tls_cert: Path | None = None
    """PEM file of the client's own certificate, where the server asks for one."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    tls_name: str = ""
    """Name that the server's certificate has, if that is not the one it is reached by."""
    token_file: Path | None = None
    """File that holds a bearer token, in one line."""
    insecure: bool = False
    """Send a token even where it could be read on the way: without TLS to another machine."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidInputError("tls_cert and tls_key go together: give both", field="tls_key")
        if self.tls_name and not self.is_tls:
            raise InvalidInputError("tls_name needs tls or tls_ca", field="tls_name")

    @property
    def is_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or self.tls_ca is not None or self.tls_cert is not None

    def files(self) -> TlsFiles:
        """Return the certificates' files."""
        return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca)


class CallMetadata:
    """What every call of a client carries beside its request: its token, if it has one."""

    def __init__(self, security: ChannelSecurity) -> None:
        self._token: Watched[str] | None = None
        if security.token_file is not None:
            self._token = Watched("the token", [security.token_file], checked_token)

    def __call__(self) -> tuple[tuple[str, str], ...]:
        """Return it, as gRPC takes it."""
        if self._token is None:
            return ()
        return (("authorization", f"Bearer {self._token.value}"),)


def connect(target: str, options: Options, security: ChannelSecurity) -> grpc.Channel:
    """Return a channel for blocking calls.

    Parameters
    ----------
    target
        ``host:port``, or ``ipv4:host:port,host:port`` to go round several.
    options
        Of gRPC, see `hashlens.rpc.limits.channel_options`.
    security
        What is shown and asked for.

    Raises
    ------
    InvalidInputError
        A file cannot be used, or a token would be sent for others to read.
    """
    options = _options(target, options, security)
    if not security.is_tls:
        return grpc.insecure_channel(target, options)

    def opened(pem: Pem) -> grpc.Channel:
        return grpc.secure_channel(target, channel_credentials(pem), options)

    return FreshChannel(watched("the client's certificates", security.files()), opened)


def connect_aio(target: str, options: Options, security: ChannelSecurity) -> grpc.aio.Channel:
    """Return a channel for calls that are awaited; see `connect`."""
    options = _options(target, options, security)
    if not security.is_tls:
        return grpc.aio.insecure_channel(target, options)

    def opened(pem: Pem) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(target, channel_credentials(pem), options)

    return AioFreshChannel(watched("the client's certificates", security.files()), opened)


def _options(target: str, options: Options, security: ChannelSecurity) -> Options:
    """Return the options of a channel that gives no token away."""
    if security.tls_name:
        return [*options, ("grpc.ssl_target_name_override", security.tls_name)]
    if security.token_file is None or security.is_tls or security.insecure:
        return options
    if not all(is_loopback(address) for address in _addresses(target)):
        raise InvalidInputError(
            f"the token would travel to {target} for everybody on the way to read. Use TLS "
            "(tls_ca, or tls for a certificate of a public authority), or say insecure.",
            field="token_file",
        )
    # One that the environment names would be on the way, too.
    return [*options, ("grpc.enable_http_proxy", 0)]


def _addresses(target: str) -> Sequence[str]:
    """Return what a target names: one address, or several in gRPC's form for that."""
    scheme, _, several = target.partition(":")
    return several.split(",") if scheme in ("ipv4", "ipv6") else [target]
