"""The search service and an empty echo on one server, for `hashlens bench serve`.

``python -m search_service.bench.host`` takes the options of ``python -m search_service``. The echo
is a method of the same server: the same process, event loop, interceptors and connection. What is
left between it and a search is what a search costs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import grpc
from google.protobuf.empty_pb2 import Empty

from hashlens.config import options
from hashlens.rpc import logs, server
from search_service.config import SearchConfig

ECHO = "/hashlens.bench.Echo/Echo"
"""Full name of the method: an empty message in, the same out."""


async def _echo(request: Empty, _: grpc.aio.ServicerContext[Empty, Empty]) -> Empty:
    return request


def _add_echo(server: grpc.aio.Server) -> None:
    service, method = ECHO[1:].split("/")
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
        _echo, request_deserializer=Empty.FromString, response_serializer=Empty.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )


@click.command()
@options(SearchConfig, "search")
def main(config: SearchConfig) -> None:
    """Serve SearchService and an echo."""
    logs.set_up(config.log_format, config.log_level, config.log_burst)
    # As the service's own main does, and for the same reason.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from search_service.servicer import SearchServicer

    class EchoingServicer(SearchServicer):
        """The search servicer, and the echo beside it."""

        def register(self, server: grpc.aio.Server) -> None:
            """Add both to a server."""
            super().register(server)
            _add_echo(server)

    sys.exit(server.run(config, EchoingServicer(config)))


if __name__ == "__main__":
    main(prog_name="python -m search_service.bench.host")
