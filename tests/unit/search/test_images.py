"""What the search service learns of its encoder's model, and how long it waits for that."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import numpy as np
import pytest

from hashlens.client import AsyncClient
from hashlens.rpc.channel import ChannelSecurity
from hashlens.types import CollectionSpec, ModelInfo
from hashlens.v1 import encoder_service_pb2 as enc
from search_service import images as images_module
from search_service.explain import Meanings
from search_service.images import ImageEncoder

SPEC = CollectionSpec(name="photos", model_id="m", n_bits=8, dim=0)


def meanings(target: str | None, deadline_s: float) -> Meanings:
    async def ask() -> Meanings:
        async with ImageEncoder(target, 2**20, ChannelSecurity()) as images:
            return await images.meanings(SPEC, deadline_s=deadline_s)

    return asyncio.run(ask())


def test_no_encoder_has_no_meanings() -> None:
    found = meanings(None, 1.0)
    assert found.classifier is None
    assert "no encoder" in found.detail


def test_an_encoder_that_hangs_is_waited_for_half_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed_s: list[float] = []
    model = AsyncClient.model

    async def noted(self: AsyncClient, *, deadline_s: float) -> ModelInfo:
        allowed_s.append(deadline_s)
        return await model(self, deadline_s=deadline_s)

    monkeypatch.setattr(AsyncClient, "model", noted)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began_s = time.monotonic()
        found = meanings(f"127.0.0.1:{deaf.getsockname()[1]}", 1.0)
        waited_s = time.monotonic() - began_s
    assert found.classifier is None
    assert "does not say" in found.detail
    assert allowed_s == [0.5]
    assert waited_s > 0.4


def test_no_time_left_is_no_error_of_its_own() -> None:
    # What comes after says that the deadline has passed.
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        found = meanings(f"127.0.0.1:{deaf.getsockname()[1]}", -1.0)
    assert found.classifier is None


# --- encoders of others, which say what they like ---


def describing(said: enc.GetModelResponse) -> grpc.GenericRpcHandler:
    """Answer GetModel with one thing, whatever it is."""

    async def get_model(request: enc.GetModelRequest, context: object) -> enc.GetModelResponse:
        return said

    handler = grpc.unary_unary_rpc_method_handler(
        get_model,
        request_deserializer=enc.GetModelRequest.FromString,
        response_serializer=enc.GetModelResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("hashlens.v1.EncoderService", {"GetModel": handler})


def model(n_classes: int, n_bits: int = 8, model_id: str = "m") -> enc.GetModelResponse:
    weights = np.ones((n_classes, n_bits), dtype="<f4")
    return enc.GetModelResponse(
        model_id=model_id,
        n_bits=n_bits,
        classes=[str(i) for i in range(n_classes)],
        classifier=enc.Classifier(weights=weights.tobytes(), bias=bytes(4 * n_classes)),
    )


@pytest.mark.parametrize(
    ("said", "detail"),
    [
        (model(2), ""),
        (model(2, model_id="other"), "another model"),
        # The id is the collection's, but its codes are not of this length.
        (model(2, n_bits=16), "another model"),
        (model(0), "does not say"),
        (model(40_000), "too large"),
    ],
)
def test_what_an_encoder_says_of_its_model(
    monkeypatch: pytest.MonkeyPatch, said: enc.GetModelResponse, detail: str
) -> None:
    monkeypatch.setattr(images_module, "_MODEL_S", 30.0)

    async def ask() -> Meanings:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((describing(said),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with ImageEncoder(f"127.0.0.1:{port}", 2**23, ChannelSecurity()) as images:
                return await images.meanings(SPEC, deadline_s=60)
        finally:
            await server.stop(None)

    found = asyncio.run(ask())
    assert (found.classifier is None) == (detail != "")
    assert (detail in found.detail) if detail else not found.detail
