"""The synchronous client's connections and how it calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import grpc

from hashlens.client._sync_streams import Exchange
from hashlens.client.stream_requests import StreamRequests
from hashlens.client.unanswered import Unanswered
from hashlens.client.wire import ClientConfig, Wire
from hashlens.rpc import limits
from hashlens.rpc.channel import connect
from hashlens.rpc.status import error_of_call
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import search_service_pb2_grpc as spb_grpc

T = TypeVar("T")
R = TypeVar("R")


class Calls:
    """What the verbs of `Client` are made of.

    Parameters
    ----------
    search, encoder, config
        See `Client`.
    """

    def __init__(self, search: str, encoder: str, config: ClientConfig | None) -> None:
        self._config = config or ClientConfig()
        self._wire = Wire(self._config)
        options = limits.channel_options(self._config.max_message_bytes)
        self._channels = {
            target: connect(target, options, self._config.security) for target in {search, encoder}
        }
        self._search = spb_grpc.SearchServiceStub(self._channels[search])
        self._encoder = enc_grpc.EncoderServiceStub(self._channels[encoder])

    def _call(self, method: Callable[..., Any], request: Any, deadline_s: float | None) -> Any:
        try:
            return method(
                request,
                timeout=self._config.deadline_s if deadline_s is None else deadline_s,
                metadata=self._wire.metadata(),
            )
        except grpc.RpcError as failure:
            raise error_of_call(failure) from None

    def _exchange(
        self,
        method: Callable[..., Any],
        requests: StreamRequests[T, R],
        items: Iterable[T],
        deadline_s: float | None,
    ) -> Generator[R]:
        def call(messages: Iterator[Any], left_s: float | None) -> Any:
            return method(messages, timeout=left_s, metadata=self._wire.metadata())

        exchange = Exchange(
            call,
            requests.build,
            requests.read,
            Unanswered(self._config.stream_items, self._config.chunk_bytes),
            self._config.deadline_s,
        )
        return exchange.results(items, deadline_s)
