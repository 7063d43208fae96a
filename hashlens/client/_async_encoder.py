"""The asynchronous client's verbs for the encoder service."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence

from hashlens import convert
from hashlens.client import wire
from hashlens.client._async_calls import AsyncCalls
from hashlens.client.stream_requests import EncodeRequests
from hashlens.errors import HashlensError
from hashlens.types import Encoded, FeatureDtype, ModelInfo
from hashlens.v1 import encoder_service_pb2 as enc


class AsyncEncoderCalls(AsyncCalls):
    """Images to embeddings."""

    async def model(self, *, deadline_s: float | None = None) -> ModelInfo:
        """Return what the encoder says of its model."""
        reply = await self._call(self._encoder.GetModel, enc.GetModelRequest(), deadline_s)
        return convert.model_from_proto(reply)

    async def encode(
        self,
        image: bytes,
        *,
        feature_dtype: FeatureDtype | None = None,
        with_activations: bool = False,
        deadline_s: float | None = None,
    ) -> Encoded:
        """Return one image's embedding.

        Parameters
        ----------
        image
            Bytes of a JPEG, PNG or WebP, or the first frame of a GIF, BMP or TIFF.
        feature_dtype
            Number format of the feature; None for the server's.
        with_activations
            Return H before the threshold as well.
        deadline_s
            Time for the call, in seconds; None for the client's.

        Raises
        ------
        InvalidInputError
            The bytes are no image that the encoder accepts.
        """
        request = self._wire.encode_request(image, feature_dtype, with_activations)
        reply = await self._call(self._encoder.Encode, request, deadline_s)
        return wire.encoded_of(reply.embedding, reply.timings)

    async def encode_batch(
        self,
        images: Sequence[bytes],
        *,
        feature_dtype: FeatureDtype | None = None,
        with_activations: bool = False,
        deadline_s: float | None = None,
    ) -> list[Encoded | HashlensError]:
        """Return an embedding, or the error in its place, for each of any number of images.

        They are sent in chunks; `deadline_s` is for each. See `encode`.
        """
        results: list[Encoded | HashlensError] = []
        for request in self._wire.encode_batches(images, feature_dtype, with_activations):
            reply = await self._call(self._encoder.EncodeBatch, request, deadline_s)
            results += self._wire.encode_results(reply)
        return results

    def encode_stream(
        self,
        images: AsyncIterable[bytes] | Iterable[bytes],
        *,
        feature_dtype: FeatureDtype | None = None,
        with_activations: bool = False,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[Encoded | HashlensError]:
        """Yield an embedding, or the error in its place, for each image, in their order.

        When the server stops or the connection ends, another call goes on with the first image that
        has no answer. Closing the iterator (`contextlib.aclosing` does) ends the call.

        Parameters
        ----------
        images
            Any number, taken in another task as answers come, a few ahead (`stream_items` and
            `chunk_bytes` of the client's configuration). What it raises is raised here, after the
            results of the images before.
        feature_dtype, with_activations
            See `encode`.
        deadline_s
            Time for the whole stream, in seconds; None: no end, but each answer has the client's.

        Raises
        ------
        DeadlineError
            While iterating: the time is over.
        UnavailableError
            While iterating: no server takes the images, although it was tried again.
        """
        requests = EncodeRequests(
            self._config, wire.encode_options(feature_dtype, with_activations)
        )
        return self._exchange(self._encoder.EncodeStream, requests, images, deadline_s)
