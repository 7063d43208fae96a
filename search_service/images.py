"""The search service as a client of the encoder service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from hashlens.client import AsyncClient, ClientConfig
from hashlens.errors import (
    DeadlineError,
    HashlensError,
    InternalError,
    InvalidInputError,
    PreconditionError,
    UnavailableError,
)
from hashlens.rpc import call
from hashlens.rpc.channel import ChannelSecurity
from hashlens.types import CollectionSpec, Encoded
from search_service import checks
from search_service.explain import Meanings

_CHUNK_IMAGES = 64
"""Images of one EncodeBatch: two of the encoder's default batches, well within its limits."""

_MODEL_S = 2.0
"""Longest that an explanation waits for the encoder to describe its model. Without it, the answer
comes with the bits that differ, unexplained."""


class ImageEncoder:
    """Has images encoded for a collection.

    Parameters
    ----------
    target
        ``host:port`` of the encoder service; None if there is none.
    max_message_bytes
        Largest request or reply.
    security
        How it is known, and what it is shown.
    """

    def __init__(
        self, target: str | None, max_message_bytes: int, security: ChannelSecurity
    ) -> None:
        self._target = target
        self._max_message_bytes = max_message_bytes
        self._security = security
        self._client: AsyncClient | None = None
        self._meanings: dict[str, Meanings] = {}  # by model id, which fixes the weights

    async def __aenter__(self) -> Self:
        if self._target is not None:
            self._client = AsyncClient(
                search=self._target,
                encoder=self._target,
                config=ClientConfig(
                    max_message_bytes=self._max_message_bytes,
                    chunk_items=_CHUNK_IMAGES,
                    security=self._security,
                ),
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    async def encode(
        self,
        image: bytes,
        spec: CollectionSpec,
        *,
        with_activations: bool,
        deadline_s: float,
        field: str,
    ) -> Encoded:
        """Return an image's embedding in the form that a collection compares.

        Raises
        ------
        InvalidInputError
            No image; the field path is that of the caller's request.
        PreconditionError
            No encoder is configured, or it has another model than the collection.
        UnavailableError
            The encoder is away.
        """
        client = self._connected(field)
        try:
            with call.calling("encode_call"):
                encoded = await client.encode(
                    image,
                    feature_dtype=spec.feature_dtype,
                    with_activations=with_activations,
                    deadline_s=deadline_s,
                )
        except HashlensError as error:
            raise self._explained(error, field) from None
        return _fitted(encoded, spec, field)

    async def encode_all(
        self,
        images: Sequence[bytes],
        spec: CollectionSpec,
        *,
        deadline_s: float,
        fields: Sequence[str],
    ) -> list[Encoded | HashlensError]:
        """Return an embedding, or the error in its place, for each image; see `encode`."""
        client = self._connected(fields[0])
        try:
            async with asyncio.timeout(deadline_s):
                with call.calling("encode_call"):
                    results = await client.encode_batch(
                        images, feature_dtype=spec.feature_dtype, deadline_s=deadline_s
                    )
        except TimeoutError:
            raise DeadlineError("encoding the images has not ended in time") from None
        except HashlensError as error:
            raise self._explained(error, fields[0]) from None
        if len(results) != len(images):
            raise InternalError(f"{len(images)} images gave {len(results)} embeddings")
        return [
            self._checked(result, spec, field)
            for result, field in zip(results, fields, strict=True)
        ]

    async def meanings(self, spec: CollectionSpec, *, deadline_s: float) -> Meanings:
        """Return what a collection's model makes of codes; never raises.

        The encoder is asked once for each model, and waited for at most half of `deadline_s`: an
        answer without meanings is better than none.
        """
        known = self._meanings.get(spec.model_id)
        if known is not None:
            return known
        if self._client is None:
            return Meanings(detail="This search service has no encoder to ask what the bits mean.")
        try:
            model = await self._client.model(deadline_s=min(_MODEL_S, max(deadline_s / 2, 0)))
            if (model.model_id, model.n_bits) != (spec.model_id, spec.n_bits):
                return Meanings(
                    detail=f"The encoder service at {self._target} has another model than the "
                    "collection, and cannot say what its bits mean."
                )
            return self._meanings.setdefault(spec.model_id, Meanings.of(model))
        except HashlensError as error:
            return Meanings(
                detail=f"The encoder service at {self._target} does not say what the bits mean: "
                f"{error.message}"
            )

    def _connected(self, field: str) -> AsyncClient:
        if self._client is None:
            raise PreconditionError(
                "this search service has no encoder: send embeddings, or start it with --encoder",
                field=field,
            )
        return self._client

    def _checked(
        self, result: Encoded | HashlensError, spec: CollectionSpec, field: str
    ) -> Encoded | HashlensError:
        """Return the result, or why it does not fit the collection."""
        if isinstance(result, HashlensError):
            return self._explained(result, field)
        try:
            return _fitted(result, spec, field)
        except HashlensError as error:
            return error

    def _explained(self, error: HashlensError, field: str) -> HashlensError:
        """Return the encoder's error in the terms of our own caller's request."""
        if isinstance(error, InvalidInputError):
            return InvalidInputError(error.message, field=field)
        if isinstance(error, UnavailableError):
            return UnavailableError(
                f"the encoder service at {self._target} is away: {error.message}"
            )
        return error


def _fitted(encoded: Encoded, spec: CollectionSpec, field: str) -> Encoded:
    """Return what a collection can compare of an embedding, or raise."""
    if spec.dim == 0:  # A collection of codes only keeps no feature and compares none.
        encoded = replace(encoded, embedding=replace(encoded.embedding, feature=None))
    checks.check_embedding(encoded.embedding, spec, field=field)
    return encoded
