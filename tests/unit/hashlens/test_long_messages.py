"""An error's class reaches the caller, however long its message; a real socket."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from hashlens.errors import PreconditionError
from hashlens.rpc.interceptors import ErrorInterceptor
from hashlens.rpc.status import error_of_call


@pytest.mark.parametrize("quoted", ["x" * 30_000, "\u00e9\n%" * 10_000])
def test_a_long_message_is_cut(quoted: str) -> None:
    async def refuse(request: bytes, context: Any) -> bytes:
        raise PreconditionError(f"the embedding is of model {quoted}", field="query.model_id")

    async def run() -> None:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        handler = grpc.unary_unary_rpc_method_handler(refuse)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("t.T", {"Refuse": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    await channel.unary_unary("/t.T/Refuse")(b"", timeout=10)
        finally:
            await server.stop(0)
        error = error_of_call(caught.value)
        assert isinstance(error, PreconditionError)
        assert error.field == "query.model_id"
        assert error.message.startswith("the embedding is of model")
        assert error.message.endswith("...")

    asyncio.run(run())
