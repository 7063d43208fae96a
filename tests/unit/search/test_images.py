"""What the search service learns of its encoder's model, and how long it waits for that."""

from __future__ import annotations

import asyncio
import socket
import time

from hashlens.types import CollectionSpec
from search_service.explain import Meanings
from search_service.images import ImageEncoder

SPEC = CollectionSpec(name="photos", model_id="m", n_bits=8, dim=0)


def meanings(target: str | None, deadline_s: float) -> Meanings:
    async def ask() -> Meanings:
        async with ImageEncoder(target, 2**20) as images:
            return await images.meanings(SPEC, deadline_s=deadline_s)

    return asyncio.run(ask())


def test_no_encoder_has_no_meanings() -> None:
    found = meanings(None, 1.0)
    assert found.classifier is None
    assert "no encoder" in found.detail


def test_an_encoder_that_hangs_is_waited_for_half_of_the_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began_s = time.monotonic()
        found = meanings(f"127.0.0.1:{deaf.getsockname()[1]}", 1.0)
        waited_s = time.monotonic() - began_s
    assert found.classifier is None
    assert "does not say" in found.detail
    assert 0.4 < waited_s < 0.95


def test_no_time_left_is_no_error_of_its_own() -> None:
    # What comes after says that the deadline has passed.
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        found = meanings(f"127.0.0.1:{deaf.getsockname()[1]}", -1.0)
    assert found.classifier is None
