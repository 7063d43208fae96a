"""The encoder service in this process, on a real port: tests may look into its pipeline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from encoder_service.config import EncoderConfig
from encoder_service.pipeline import EncodePipeline
from encoder_service.servicer import EncoderServicer
from hashlens.rpc.interceptors import ErrorInterceptor


@dataclass
class InProcess:
    """A server that runs."""

    target: str
    servicer: EncoderServicer
    loop: asyncio.AbstractEventLoop

    @property
    def pipeline(self) -> EncodePipeline:
        """What encodes."""
        return self.servicer._pipeline

    @property
    def n_admitted(self) -> int:
        """Images in the works."""
        return self.pipeline._n_admitted

    @property
    def n_tasks(self) -> int:
        """Tasks of the event loop."""
        return len(asyncio.all_tasks(self.loop))


@contextmanager
def encoder_in_process(config: EncoderConfig, **options: int) -> Iterator[InProcess]:
    """Run the service in a thread; `options` are gRPC's, without their prefix."""
    ready = threading.Event()
    running: list[InProcess] = []
    over: list[asyncio.Event] = []

    async def serve() -> None:
        servicer = EncoderServicer(config)
        await servicer.warm_up()
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=[(f"grpc.{name}", value) for name, value in options.items()],
        )
        servicer.register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        over.append(asyncio.Event())
        loop = asyncio.get_running_loop()
        running.append(InProcess(f"127.0.0.1:{port}", servicer, loop))
        ready.set()
        await over[0].wait()
        servicer.drain()
        await server.stop(2)
        await servicer.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield running[0]
    finally:
        running[0].loop.call_soon_threadsafe(over[0].set)
        thread.join(60)
        assert not thread.is_alive()
