"""Servers beside the main one: health without TLS for probes, and what an operator looks into."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_channelz.v1 import channelz

from hashlens.rpc import health
from hashlens.rpc.health import HealthServicer
from hashlens.rpc.interceptors import ErrorInterceptor
from hashlens.rpc.server_config import ServerConfig

logger = logging.getLogger(__name__)


_IDLE_MS = 60_000
"""A connection without a call is closed then: it has a place that a probe may need."""


@asynccontextmanager
async def side_servers(config: ServerConfig, servicer: HealthServicer) -> AsyncIterator[None]:
    """Run those that the configuration asks for while the block runs; then end them at once.

    Raises
    ------
    OSError
        An address cannot be had.
    """
    servers = []
    try:
        for address, is_admin in ((config.health_listen, False), (config.admin_listen, True)):
            if not address:
                continue
            server = grpc.aio.server(
                interceptors=[ErrorInterceptor()],
                # They get probes and a look now and then; what is large is not meant for them.
                options=[
                    ("grpc.so_reuseport", 0),
                    ("grpc.max_receive_message_length", 1 << 16),
                    ("grpc.max_concurrent_streams", 100),
                    ("grpc.max_allowed_incoming_connections", config.max_connections),
                    ("grpc.server_handshake_timeout_ms", int(config.handshake_s * 1000)),
                    ("grpc.max_connection_idle_ms", _IDLE_MS),
                ],
            )
            health.add_to(server, servicer)
            if is_admin:
                channelz.add_channelz_servicer(server)
            try:
                port = server.add_insecure_port(address)
            except RuntimeError as error:
                raise OSError(
                    f"cannot listen on {address}: it is in use, or no address of this machine "
                    f"({error})"
                ) from None
            await server.start()
            servers.append(server)
            what = "channelz and health" if is_admin else "health"
            logger.info("%s on %s:%d", what, address.rpartition(":")[0], port)
        yield
    finally:
        for server in servers:
            await server.stop(0)
