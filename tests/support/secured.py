"""A server with all services and nothing behind them, that can be secured like a real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import grpc
from google.protobuf.descriptor import MethodDescriptor

from hashlens.rpc import health
from hashlens.rpc.auth import access
from hashlens.rpc.interceptors import ErrorInterceptor
from hashlens.rpc.ports import bind
from hashlens.rpc.reflection import reflect
from hashlens.rpc.server_config import ServerConfig
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import replica_service_pb2 as rpb
from hashlens.v1 import replica_service_pb2_grpc as rpb_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc

METHODS: list[MethodDescriptor] = [
    method
    for file in (enc, spb, rpb)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
"""All methods of the contract."""


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


class Entries(grpc.aio.ServerInterceptor):
    """Notes what is reached behind the other interceptors."""

    def __init__(self) -> None:
        self.of: list[str] = []

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        self.of.append(f"handler of {method}")
        parse = handler.request_deserializer

        def parsed(data: bytes) -> Any:
            self.of.append(f"request of {method}")
            return parse(data)

        return handler._replace(request_deserializer=parsed)


class _Encoder(enc_grpc.EncoderServiceServicer):
    async def GetModel(  # noqa: N802
        self, request: Any, context: Any
    ) -> enc.GetModelResponse:
        await asyncio.sleep(0.002)
        return enc.GetModelResponse()


N_PARTS = 40
"""Parts of a StreamBall."""


class _Search(spb_grpc.SearchServiceServicer):
    def __init__(self, go_on: asyncio.Event) -> None:
        self._go_on = go_on

    async def StreamBall(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncIterator[spb.StreamBallResponse]:
        yield spb.StreamBallResponse()
        await self._go_on.wait()
        for _ in range(N_PARTS - 1):
            yield spb.StreamBallResponse()


class SecuredServer:
    """Runs in a thread. `GetModel` and `StreamBall` answer, the rest is UNIMPLEMENTED.

    A `StreamBall` ends after `go_on`: until then there is its first part only.
    """

    def __init__(self, **options: Any) -> None:
        self.config = ServerConfig(**options)
        self.entries = Entries()
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._go_on = asyncio.Event()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    @property
    def target(self) -> str:
        """Where it is, by the name in its certificate."""
        return f"localhost:{self.port}"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def go_on(self) -> None:
        """Let every StreamBall, begun or not, come to its end."""
        self._loop.call_soon_threadsafe(self._go_on.set)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60)
        if self._problem is not None:
            self._thread.join(60)
            raise self._problem
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as problem:
            self._problem = problem
        finally:
            self._loop.close()
            self._ready.set()

    async def _serve(self) -> None:
        interceptors = [ErrorInterceptor(), *access(self.config.tokens), self.entries]
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[("grpc.max_receive_message_length", self.config.max_message_bytes)],
        )
        enc_grpc.add_EncoderServiceServicer_to_server(_Encoder(), server)  # type: ignore[no-untyped-call]
        spb_grpc.add_SearchServiceServicer_to_server(_Search(self._go_on), server)  # type: ignore[no-untyped-call]
        rpb_grpc.add_ReplicaServiceServicer_to_server(rpb_grpc.ReplicaServiceServicer(), server)  # type: ignore[no-untyped-call]
        checks = health.HealthServicer([])
        health.add_to(server, checks)
        checks.note(health.ServiceState(), is_open=True)
        if self.config.reflection:
            reflect(server, ["hashlens.v1.EncoderService"])
        self.address = bind(server, self.config)
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(0.2)
