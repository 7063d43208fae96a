"""The synchronous client."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens.client import wire
from hashlens.client._sync_items import ItemCalls
from hashlens.client._sync_search import SearchCalls
from hashlens.client.wire import ClientConfig
from hashlens.errors import HashlensError, NotFoundError
from hashlens.rpc import limits
from hashlens.rpc.channel import connect
from hashlens.types import ServiceHealth


class Client(ItemCalls, SearchCalls):
    """Speaks to both services. Safe to share between threads; connects when first used.

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            channel.close()

    def health(self, *, deadline_s: float = 5.0) -> list[ServiceHealth]:
        """Return whether each service serves, and what it says of itself; never raises."""
        found = []
        # Also of one that does not serve.
        options = limits.channel_options(only_serving=False)
        for target in sorted(self._channels):
            channel = connect(target, options, self._config.security)
            check = health_pb2_grpc.HealthStub(channel).Check
            replies: list[health_pb2.HealthCheckResponse | None] = []
            trailing: Any = ()
            try:
                for name in wire.HEALTH_NAMES:
                    request = health_pb2.HealthCheckRequest(service=name)
                    try:
                        reply, call = self._call(check.with_call, request, deadline_s)
                    except NotFoundError:
                        if not name:
                            raise
                        replies.append(None)
                    else:
                        replies.append(reply)
                        trailing = trailing or call.trailing_metadata()
            except HashlensError as error:
                found.append(
                    ServiceHealth(
                        target=target, serving=False, detail=error.message, answered=False
                    )
                )
            else:
                found.append(wire.health_of(target, replies, trailing))
            finally:
                channel.close()
        return found
