"""EncodeStream: images as they come, each encoded by itself, answered in their order."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from encoder_service.config import EncoderConfig
from encoder_service.pipeline import EncodePipeline
from hashlens import convert
from hashlens.errors import DeadlineError, HashlensError, InvalidInputError, OverloadedError
from hashlens.rpc.item_stream import ItemStream, StreamLimits
from hashlens.rpc.status import status_of
from hashlens.types import Encoded
from hashlens.v1 import encoder_service_pb2 as enc

_PAUSE_S = (0.005, 0.25)
"""Soonest and latest that an image is offered again to a pipeline that was full."""


class EncodeStream:
    """Answers one call.

    Parameters
    ----------
    pipeline
        Encodes the images, for other calls as well.
    config
        The server's.
    stopping
        Set when the server stops.
    """

    def __init__(
        self, pipeline: EncodePipeline, config: EncoderConfig, stopping: asyncio.Event
    ) -> None:
        self._pipeline = pipeline
        self._config = config
        self._stopping = stopping

    def answers(
        self,
        requests: AsyncIterator[enc.EncodeStreamRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[enc.EncodeStreamResponse]:
        """Yield an answer for each image, in their order; raises as `ItemStream.answers`."""
        limits = StreamLimits(
            window=self._config.max_stream_window,
            window_bytes=self._config.max_stream_bytes,
            idle_s=self._config.stream_idle_s,
        )
        stream = ItemStream(self._begin, context, self._config, limits, self._stopping)
        return stream.answers(requests)

    def _begin(
        self, request: enc.EncodeStreamRequest, ends_s: float
    ) -> asyncio.Future[enc.EncodeStreamResponse]:
        # No part of the request itself, which would hold the image twice.
        options = enc.EncodeOptions()
        options.CopyFrom(request.options)
        return asyncio.create_task(self._answer(request.image, options, request.tag, ends_s))

    async def _answer(
        self, image: bytes, options: enc.EncodeOptions, tag: int, ends_s: float
    ) -> enc.EncodeStreamResponse:
        try:
            encoded = await self._encoded(image, options, ends_s)
        except HashlensError as error:
            result = enc.EncodeResult(error=status_of(error))
        else:
            result = enc.EncodeResult(
                embedding=convert.embedding_to_proto(encoded.embedding),
                timings=convert.encode_timings_to_proto(encoded.timings),
            )
        return enc.EncodeStreamResponse(tag=tag, result=result)

    async def _encoded(self, image: bytes, options: enc.EncodeOptions, ends_s: float) -> Encoded:
        """Encode one image; while the pipeline is full, the stream waits rather than fails."""
        dtype = convert.dtype_from_proto(options.feature_dtype, field="options.feature_dtype")
        soonest_s, pause_s = _PAUSE_S
        while True:
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineError("the image has not had its turn in time: allow more time")
            try:
                return await self._pipeline.encode(
                    image,
                    deadline_s=left_s,
                    feature_dtype=dtype,
                    omit_feature=options.omit_feature,
                    with_activations=options.with_activations,
                )
            except OverloadedError as error:
                wait_s = min(max(error.retry_after_s, soonest_s), pause_s)
                await asyncio.sleep(min(wait_s * random.uniform(0.5, 1.0), left_s))
            except InvalidInputError as error:
                raise (error if error.field else error.within("image")) from None
