"""The asynchronous client; a test keeps its verbs those of `Client`."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens.client import wire
from hashlens.client._async_items import AsyncItemCalls
from hashlens.client._async_search import AsyncSearchCalls
from hashlens.client.wire import ClientConfig
from hashlens.errors import HashlensError
from hashlens.rpc import limits
from hashlens.rpc.channel import connect_aio
from hashlens.rpc.status import error_of_call
from hashlens.types import ServiceHealth


class AsyncClient(AsyncItemCalls, AsyncSearchCalls):
    """`hashlens.Client` with its verbs awaited, for one event loop.

    Every call has a deadline and raises a subclass of `HashlensError`. A client reads its own
    writes: its searches wait until the answering replica has applied them.

    Parameters
    ----------
    search
        ``host:port`` of the search service.
    encoder
        ``host:port`` of the encoder service.
    config
        Deadlines and limits.
    """

    def __init__(
        self,
        search: str = wire.SEARCH_TARGET,
        encoder: str = wire.ENCODER_TARGET,
        *,
        config: ClientConfig | None = None,
    ) -> None:
        super().__init__(search, encoder, config)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            await channel.close()

    async def health(self, *, deadline_s: float = 5.0) -> list[ServiceHealth]:
        """Return whether each service serves, and what it says of itself; never raises."""
        found = []
        # Also of one that does not serve.
        options = limits.channel_options(only_serving=False)
        for target in sorted(self._channels):
            channel = connect_aio(target, options, self._config.security)
            check = health_pb2_grpc.HealthStub(channel).Check
            replies: list[health_pb2.HealthCheckResponse | None] = []
            trailing: Any = ()
            try:
                for name in wire.HEALTH_NAMES:
                    request = health_pb2.HealthCheckRequest(service=name)
                    call = check(request, timeout=deadline_s)
                    try:
                        replies.append(await call)
                    except grpc.RpcError as failure:
                        if not name or failure.code() is not grpc.StatusCode.NOT_FOUND:
                            raise error_of_call(failure) from None
                        replies.append(None)
                    else:
                        trailing = trailing or await call.trailing_metadata()
            except HashlensError as error:
                found.append(
                    ServiceHealth(
                        target=target, serving=False, detail=error.message, answered=False
                    )
                )
            else:
                found.append(wire.health_of(target, replies, trailing))
            finally:
                await channel.close()
        return found
