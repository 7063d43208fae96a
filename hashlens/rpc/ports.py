"""Where a server listens."""

from __future__ import annotations

import logging

import grpc

from hashlens.rpc.addresses import is_loopback
from hashlens.rpc.server_config import ServerConfig
from hashlens.rpc.tls import TlsFiles, server_credentials

logger = logging.getLogger(__name__)


def bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Have a server listen on what its configuration says, and return where: host and real port.

    Raises
    ------
    OSError
        The address cannot be had.
    InvalidInputError
        A file of the certificate cannot be used.
    """
    try:
        if config.tls_cert is None:
            port = server.add_insecure_port(config.listen)
        else:
            files = TlsFiles(cert=config.tls_cert, key=config.tls_key, ca=config.tls_client_ca)
            port = server.add_secure_port(config.listen, server_credentials(files))
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {config.listen}: it is in use, or no address of this machine "
            f"({error})"
        ) from None
    if not is_loopback(config.listen):
        _warn_if_open(config)
    return f"{config.listen.rpartition(':')[0]}:{port}"


def _warn_if_open(config: ServerConfig) -> None:
    if config.tls_cert is None:
        logger.warning(
            "%s is not encrypted: who is on the way reads and changes all", config.listen
        )
    if config.tokens is None and config.tls_client_ca is None:
        logger.warning(
            "whoever reaches %s may read, write and drop: give --tokens or --tls-client-ca",
            config.listen,
        )
