"""How much time a handler has."""

from __future__ import annotations

from typing import Any, cast

import grpc

from hashlens.errors import DeadlineError
from hashlens.rpc.server_config import ServerConfig

_ANSWER_S = 0.5
"""Time kept back from a call's deadline for its answer to travel, at most a fifth of it."""


def deadline_s(context: grpc.aio.ServicerContext[Any, Any], config: ServerConfig) -> float:
    """Return the time that a handler has, in seconds.

    A little less than what the client set, so that an answer such as "Redis is away" still reaches
    it before it gives up.

    Raises
    ------
    DeadlineError
        None is left.
    """
    # None, whatever the stubs say, when the client set no deadline.
    left_s = cast(float | None, context.time_remaining())
    if left_s is None:
        return config.default_deadline_s
    if left_s <= 0:
        raise DeadlineError("the deadline passed before the call was begun")
    return left_s - min(_ANSWER_S, left_s / 5)
