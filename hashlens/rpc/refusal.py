"""Refusing a call before its request is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from hashlens.errors import HashlensError

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def refusing(error: Callable[[], HashlensError]) -> Handler:
    """Return a handler that raises an error, whatever is called.

    It is of the kind for a stream of requests, whatever the call is: a handler of that kind is
    entered before the first message is read, and this one reads none.

    Parameters
    ----------
    error
        Makes the error of one call.
    """

    async def refuse(
        requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        raise error()

    return grpc.stream_unary_rpc_method_handler(refuse)
