"""Image bytes to embedding: decode and preprocess in a pool, then the batcher."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from encoder_service.batcher import Batcher
from encoder_service.config import EncoderConfig
from encoder_service.decode import DecodeLimits, decode
from encoder_service.encoder import Encoder
from hashlens.cpus import NICENESS_OF_WORK, lower_priority, usable_cpus
from hashlens.errors import DeadlineError, InvalidInputError, OverloadedError
from hashlens.types import Embedding, Encoded, EncodeTimings, FeatureDtype

_Outputs = tuple[bytes, NDArray[np.float32], NDArray[np.float32]]
"""Packed code, F7, H."""


class EncodePipeline:
    """Encodes images for one event loop.

    Parameters
    ----------
    encoder
        The model; called in one thread only.
    config
        Limits and sizes.
    """

    def __init__(self, encoder: Encoder, config: EncoderConfig) -> None:
        self._encoder = encoder
        self._config = config
        self._limits = DecodeLimits(
            max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels
        )
        self._decoders = ThreadPoolExecutor(
            config.n_decode_threads or usable_cpus(),
            thread_name_prefix="decode",
            initializer=lower_priority,
            initargs=(NICENESS_OF_WORK,),
        )
        self._batcher: Batcher[_Outputs] = Batcher(
            self._run_model,
            max_batch=config.max_batch,
            max_wait_ms=config.max_wait_ms,
            max_queue=config.max_queue,
        )
        self._n_admitted = 0

    @property
    def n_admitted(self) -> int:
        """Images in the works: decoded, waiting or in the model."""
        return self._n_admitted

    @property
    def batcher(self) -> Batcher[_Outputs]:
        """Where decoded images wait for the model."""
        return self._batcher

    async def __aenter__(self) -> Self:
        await self._batcher.__aenter__()
        await self._batcher.run_alone(self._encoder.warm_up)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._batcher.__aexit__(*error)
        await asyncio.to_thread(self._decoders.shutdown, wait=True, cancel_futures=True)

    @property
    def n_waiting(self) -> int:
        """Images that wait for the model."""
        return self._batcher.n_waiting

    async def encode(
        self,
        image: bytes,
        *,
        deadline_s: float,
        feature_dtype: FeatureDtype | None,
        omit_feature: bool = False,
        with_activations: bool = False,
    ) -> Encoded:
        """Return an image's embedding.

        Parameters
        ----------
        image
            Bytes of an image file.
        deadline_s
            When the caller stops waiting, in seconds from now.
        feature_dtype
            Number format of the feature; None for the configured one.
        omit_feature, with_activations
            What to leave out, what to add.

        Raises
        ------
        InvalidInputError
            The bytes are no image within the limits, or F7 overflows float16.
        OverloadedError
            Too many images are in the works.
        DeadlineError
            The deadline passed before the image was decoded, or before the model saw it.
        """
        if self._n_admitted >= self._config.max_queue:
            raise OverloadedError(
                f"{self._n_admitted} images are in the works: slow down, or add encoders",
                retry_after_s=self._batcher.backlog_s(self._n_admitted),
            )
        self._n_admitted += 1
        try:
            started_ns = time.monotonic_ns()
            deadline_ns = started_ns + int(deadline_s * 1e9)
            with self._batcher.coming():
                # Cancelled with this task: a caller who leaves while this waits for a thread costs
                # no decoding.
                tensor, decode_ns = await asyncio.get_running_loop().run_in_executor(
                    self._decoders, self._decode, image, deadline_ns
                )
            batched = await self._batcher.submit(tensor, deadline_ns)
        finally:
            self._n_admitted -= 1
        code, feature, activations = batched.value
        embedding = Embedding(
            code=code,
            n_bits=self._encoder.n_bits,
            model_id=self._encoder.model_id,
            feature=None if omit_feature else self._as_dtype(feature, feature_dtype),
            activations=activations if with_activations else None,
        )
        total_ns = time.monotonic_ns() - started_ns
        return Encoded(
            embedding=embedding,
            timings=EncodeTimings(
                decode_ns=decode_ns,
                # Waiting for a decoder counts as queueing, too.
                queue_ns=total_ns - decode_ns - batched.inference_ns,
                inference_ns=batched.inference_ns,
                total_ns=total_ns,
                batch_items=batched.batch_items,
            ),
        )

    def _decode(self, image: bytes, deadline_ns: int) -> tuple[NDArray[np.float32], int]:
        started_ns = time.monotonic_ns()
        if deadline_ns <= started_ns:
            raise DeadlineError("the deadline passed while the image waited to be decoded")
        preprocessing = self._encoder.preprocessing
        tensor = preprocessing(decode(image, self._limits, preprocessing.least_px))
        return tensor, time.monotonic_ns() - started_ns

    def _run_model(self, batch: list[NDArray[np.float32]]) -> list[_Outputs]:
        encoded = self._encoder.encode(batch)
        return [
            (code.tobytes(), feature, activations)
            for code, feature, activations in zip(
                encoded.codes, encoded.features, encoded.activations, strict=True
            )
        ]

    def _as_dtype(
        self, feature: NDArray[np.float32], dtype: FeatureDtype | None
    ) -> NDArray[np.float32] | NDArray[np.float16]:
        chosen = dtype or FeatureDtype(self._config.feature_dtype)
        if chosen is FeatureDtype.F32:
            return feature
        with np.errstate(over="ignore"):
            narrowed = feature.astype(np.float16)
        if not np.isfinite(narrowed).all():
            raise InvalidInputError(
                "a number of this image's feature overflows float16: ask for F32",
                field="options.feature_dtype",
            )
        return narrowed
