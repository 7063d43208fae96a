"""Telling tools such as grpcurl what a server can be asked, where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection


def reflect(server: grpc.aio.Server, names: Sequence[str]) -> None:
    """Let a server describe the services of those full names, health and itself."""
    reflection.enable_server_reflection(
        (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
