"""EncoderService: protobuf to the pipeline and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc

from encoder_service.config import EncoderConfig
from encoder_service.encode_stream import EncodeStream
from encoder_service.encoder import Encoder
from encoder_service.method_limits import METHOD_LIMITS
from encoder_service.metrics import EncoderMetrics
from encoder_service.model.checkpoint import default_checkpoint_path, load_checkpoint
from encoder_service.pipeline import EncodePipeline
from hashlens import convert
from hashlens.errors import HashlensError, InvalidInputError
from hashlens.rpc.deadline import deadline_s
from hashlens.rpc.health import ServiceState
from hashlens.rpc.limits import check_size
from hashlens.rpc.metrics import Metric
from hashlens.rpc.status import status_of
from hashlens.types import Classifier, Encoded, FeatureDtype, ModelInfo
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc

logger = logging.getLogger(__name__)

_MAX_CLASSIFIER_BYTES = 2**20
"""A larger classifier stays out of GetModel, which is asked for often."""

_Context = grpc.aio.ServicerContext[Any, Any]


class EncoderServicer(enc_grpc.EncoderServiceServicer):
    """Answers the RPCs; a `hashlens.rpc.server.Service`.

    Parameters
    ----------
    config
        See `EncoderConfig`.
    """

    names: Sequence[str] = ("hashlens.v1.EncoderService",)

    method_limits: Mapping[str, int] = METHOD_LIMITS

    def __init__(self, config: EncoderConfig) -> None:
        self._config = config
        self._state = ServiceState(is_ready=False, reasons=("loading the checkpoint",))
        self.stopping = asyncio.Event()
        self._stack = AsyncExitStack()
        self._metrics = EncoderMetrics()
        self._pipeline: EncodePipeline
        self._model: ModelInfo

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer to a server."""
        enc_grpc.add_EncoderServiceServicer_to_server(self, server)

    def listens(self, address: str) -> None:
        """Do nothing: nobody is told."""

    async def warm_up(self) -> None:
        """Load the checkpoint and run the model once."""
        config = self._config
        path = config.checkpoint or default_checkpoint_path()
        encoder = await asyncio.to_thread(
            lambda: Encoder(
                load_checkpoint(path, sha256=config.checkpoint_sha256),
                device=config.device,
                n_threads=config.n_threads,
                autocast=config.autocast,
                compile=config.compile,
            )
        )
        self._state = ServiceState(is_ready=False, reasons=("warming up the model",))
        self._pipeline = await self._stack.enter_async_context(EncodePipeline(encoder, config))
        self._model = ModelInfo(
            model_id=encoder.model_id,
            backbone=encoder.backbone,
            n_bits=encoder.n_bits,
            dim=encoder.dim,
            classes=encoder.classes,
            preprocessing=encoder.preprocessing.to_json(),
            metrics=encoder.metrics,
            licence=encoder.data_licence,
            max_image_bytes=config.max_image_bytes,
            max_image_pixels=config.max_image_pixels,
            max_batch_items=config.max_batch_items,
            max_message_bytes=config.max_message_bytes,
            feature_dtype=FeatureDtype(config.feature_dtype),
            device=str(encoder.device),
            classifier=if_small(encoder.classifier),
        )
        self._state = ServiceState()
        logger.info(
            "model %s: %s, %d bits, F7 %d wide, on %s",
            encoder.model_id,
            encoder.backbone,
            encoder.n_bits,
            encoder.dim,
            encoder.device,
        )
        if encoder.plan is not None:
            logger.info(
                "passes of %s images; %d threads for one that is alone, %d in all",
                ", ".join(map(str, encoder.plan.sizes)),
                encoder.plan.n_threads_alone,
                encoder.n_threads,
            )

    def state(self) -> ServiceState:
        """Return how the service is."""
        return self._state

    def drain(self) -> None:
        """Have streams that would go on for ever end: they look at `stopping`."""
        self.stopping.set()

    def metrics(self) -> Iterable[Metric]:
        """Return what Prometheus is told."""
        return self._metrics.collect(self._pipeline, self._model, self._config)

    async def close(self) -> None:
        """Stop the threads."""
        await self._stack.aclose()

    async def Encode(  # noqa: N802 - the contract's name
        self, request: enc.EncodeRequest, context: _Context
    ) -> enc.EncodeResponse:
        """Encode one image."""
        encoded = await self._encode(
            request.image, request.options, deadline_s(context, self._config), field="image"
        )
        return enc.EncodeResponse(
            embedding=convert.embedding_to_proto(encoded.embedding),
            timings=convert.encode_timings_to_proto(encoded.timings),
        )

    async def EncodeBatch(  # noqa: N802 - the contract's name
        self, request: enc.EncodeBatchRequest, context: _Context
    ) -> enc.EncodeBatchResponse:
        """Encode several images, each by itself."""
        n = len(request.images)
        if n > self._config.max_batch_items:
            raise InvalidInputError(
                f"{n} images: at most {self._config.max_batch_items} fit one EncodeBatch; "
                "send several",
                field="images",
            )
        convert.dtype_from_proto(request.options.feature_dtype, field="options.feature_dtype")
        left_s = deadline_s(context, self._config)
        results = await asyncio.gather(
            *(
                self._encode_result(image, request.options, left_s, field=f"images[{i}]")
                for i, image in enumerate(request.images)
            )
        )
        reply = enc.EncodeBatchResponse(results=results)
        check_size(
            reply.ByteSize(), self._config.max_message_bytes, "send fewer images, or ask for F16"
        )
        return reply

    async def EncodeStream(  # noqa: N802 - the contract's name
        self, requests: AsyncIterator[enc.EncodeStreamRequest], context: _Context
    ) -> AsyncIterator[enc.EncodeStreamResponse]:
        """Encode images as they come, each by itself, and answer in their order."""
        stream = EncodeStream(self._pipeline, self._config, self.stopping)
        async for reply in stream.answers(requests, context):
            yield reply

    async def GetModel(  # noqa: N802 - the contract's name
        self, request: enc.GetModelRequest, context: _Context
    ) -> enc.GetModelResponse:
        """Describe the model."""
        return convert.model_to_proto(self._model)

    async def _encode_result(
        self, image: bytes, options: enc.EncodeOptions, left_s: float, *, field: str
    ) -> enc.EncodeResult:
        try:
            encoded = await self._encode(image, options, left_s, field=field)
        except HashlensError as error:
            return enc.EncodeResult(error=status_of(error))
        return enc.EncodeResult(
            embedding=convert.embedding_to_proto(encoded.embedding),
            timings=convert.encode_timings_to_proto(encoded.timings),
        )

    async def _encode(
        self, image: bytes, options: enc.EncodeOptions, left_s: float, *, field: str
    ) -> Encoded:
        dtype = convert.dtype_from_proto(options.feature_dtype, field="options.feature_dtype")
        try:
            with self._metrics.image():
                encoded = await self._pipeline.encode(
                    image,
                    deadline_s=left_s,
                    feature_dtype=dtype,
                    omit_feature=options.omit_feature,
                    with_activations=options.with_activations,
                )
            self._metrics.observe(encoded.timings, is_alone=field == "image")
            return encoded
        except InvalidInputError as error:
            raise (error if error.field else error.within(field)) from None


def if_small(classifier: Classifier) -> Classifier | None:
    """Return the classifier, or None if it would make GetModel heavy."""
    n_bytes = classifier.weights.nbytes + classifier.bias.nbytes
    return classifier if n_bytes <= _MAX_CLASSIFIER_BYTES else None
