"""Bytes to a request, inside the handler, so that what cannot be read is refused like all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from hashlens.errors import InvalidInputError


def parsed(deserialize: Callable[[bytes], Any] | None, data: Any) -> Any:
    """Return the request that some bytes are; without a `deserialize`, what is given.

    gRPC itself would call bytes that are none UNKNOWN, and write a traceback to the log.

    Raises
    ------
    InvalidInputError
        They are no message of the call.
    """
    if deserialize is None:
        return data
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidInputError(
            "the request's bytes are no message of this call: check the proto"
        ) from None
