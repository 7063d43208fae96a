"""Sizes and times that both ends of a channel agree on."""

from __future__ import annotations

import json
from typing import Any

from hashlens.errors import InvalidInputError

MAX_MESSAGE_BYTES = 64 * 2**20
"""Default for the largest request or reply: 1000 hits with 4096-d float32 features are 16 MiB."""

DEADLINE_S = 30.0
"""Default time for one call, in seconds."""


def channel_options(
    max_message_bytes: int = MAX_MESSAGE_BYTES, *, only_serving: bool = True
) -> list[tuple[str, Any]]:
    """Return the options of every channel that Hashlens opens.

    A channel to several servers goes round those whose health says that they serve: one that
    starts or stops is left out before it has refused anything. `only_serving` False asks whoever
    is there.

    Calls are retried by gRPC itself, within their deadline, and only when the server was
    unavailable, or cancelled the call itself: that is what gRPC does to calls that reach a server
    just when it stops. Each of our calls may be repeated (writes carry a request id).
    """
    service_config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": ""}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
    }
    if only_serving:
        service_config["healthCheckConfig"] = {"serviceName": ""}
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.enable_retries", 1),
        # A server that was started anew is found again soon, however long it was away.
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]


def check_size(size_bytes: int, max_message_bytes: int, advice: str) -> None:
    """Raise InvalidInputError, ending in `advice`, for a message above the limit."""
    if size_bytes > max_message_bytes:
        raise InvalidInputError(
            f"the message would be {size_bytes} bytes, above the limit of {max_message_bytes}: "
            f"{advice}"
        )
