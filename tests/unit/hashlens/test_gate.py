"""What is refused while a server starts or stops; a real socket."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from hashlens.errors import UnavailableError
from hashlens.rpc.interceptors import ErrorInterceptor, GateInterceptor
from hashlens.rpc.status import error_of_call


def test_a_start_and_a_stop_are_no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        gate = GateInterceptor()
        server = grpc.aio.server(interceptors=[ErrorInterceptor(), gate])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{port}", [("grpc.enable_retries", 0)]
            ) as channel:
                for act in (lambda: None, gate.close):
                    act()
                    with pytest.raises(grpc.RpcError) as caught:
                        await channel.unary_unary("/strange/\x1bName")(b"", timeout=30)
                    assert isinstance(error_of_call(caught.value), UnavailableError)
        finally:
            await server.stop(0)

    asyncio.run(run())
    assert not [record for record in caplog.records if record.name.startswith("hashlens")]
