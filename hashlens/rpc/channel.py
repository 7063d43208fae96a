"""Opening a connection to a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ChannelSecurity:
    """How a client knows its server, and the server its client."""


def connect(target: str, options: Options, security: ChannelSecurity) -> grpc.Channel:
    """Return a channel for blocking calls.

    Parameters
    ----------
    target
        ``host:port``.
    options
        Of gRPC, see `hashlens.rpc.limits.channel_options`.
    security
        What is shown and asked for.
    """
    return grpc.insecure_channel(target, options)


def connect_aio(target: str, options: Options, security: ChannelSecurity) -> grpc.aio.Channel:
    """Return a channel for calls that are awaited; see `connect`."""
    return grpc.aio.insecure_channel(target, options)
