"""Stores that serve their files to each other, each over a real gRPC server, in one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc

from hashlens.rpc.channel import ChannelSecurity
from hashlens.rpc.interceptors import ErrorInterceptor
from hashlens.v1 import replica_service_pb2_grpc as rpb_grpc
from search_service.replication.client import GrpcPeers
from search_service.replication.servicer import ReplicaServicer, ServingLimits
from search_service.storage import Store, StoreConfig

MAX_MESSAGE_BYTES = 16 << 20


class ReplicaServer:
    """A gRPC server with nothing but `ReplicaService`, in a thread of its own."""

    def __init__(self, limits: ServingLimits) -> None:
        self.servicer = ReplicaServicer(limits)
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> str:
        self._thread.start()
        assert self._ready.wait(60)
        return self.address

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server: Any = grpc.aio.server(interceptors=[ErrorInterceptor()])
        rpb_grpc.add_ReplicaServiceServicer_to_server(self.servicer, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(0.2)
        await self.servicer.close()


@contextmanager
def replica(
    config: StoreConfig, *, max_copies: int = 2, bytes_per_s: float = 0.0, read_s: float = 20.0
) -> Iterator[Store]:
    """Open a store that serves its files, and copies those of others."""
    server = ReplicaServer(ServingLimits(max_copies, bytes_per_s))
    address = server.start()
    try:
        peers = GrpcPeers(MAX_MESSAGE_BYTES, ChannelSecurity(), read_s=read_s)
        with Store.open(replace(config, address=address), peers) as store:
            server.servicer.serve(store)
            yield store
    finally:
        server.stop()
