"""Where a server listens."""

from __future__ import annotations

import grpc

from hashlens.rpc.server_config import ServerConfig


def bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Have a server listen on what its configuration says, and return where: host and real port.

    Raises
    ------
    OSError
        The address cannot be had.
    """
    try:
        port = server.add_insecure_port(config.listen)
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {config.listen}: it is in use, or no address of this machine "
            f"({error})"
        ) from None
    return f"{config.listen.rpartition(':')[0]}:{port}"
