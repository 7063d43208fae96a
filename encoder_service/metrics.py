"""What Prometheus is told of the encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from encoder_service.config import EncoderConfig
from encoder_service.pipeline import EncodePipeline
from hashlens.rpc import call
from hashlens.rpc.metrics import Counter, Histogram, Metric, StageTimes, gauge, info
from hashlens.rpc.status import reason_of
from hashlens.types import EncodeTimings, ModelInfo

_BATCH_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class EncoderMetrics:
    """Counts images, whether they came by themselves or with others."""

    def __init__(self) -> None:
        self._stages = StageTimes(
            "hashlens_encoder_stage_seconds",
            "Stages of an image: decoding, waiting (for a decoder, company and the model), and "
            "its batch's forward pass.",
            ("decode", "queue", "inference"),
        )
        self._images = Counter("hashlens_encoder_images", "Images, by outcome.", ["outcome"])
        self._batches = Histogram(
            "hashlens_encoder_batch_images",
            "Images that shared a forward pass, as each of them saw it.",
            bounds=_BATCH_IMAGES,
        )
        self._ok = self._images.of("ok")
        self._batch = self._batches.of()

    @contextmanager
    def image(self) -> Iterator[None]:
        """Count the block as one image, by what becomes of it."""
        try:
            yield
        except Exception as error:
            self._images.of(reason_of(error)).add()
            raise
        self._ok.add()

    def observe(self, timings: EncodeTimings, *, is_alone: bool) -> None:
        """Count what one image cost, a moment after it was encoded.

        Parameters
        ----------
        is_alone
            Whether the call has no other: then its stages become spans.
        """
        stages = (
            ("decode", timings.decode_ns),
            ("queue", timings.queue_ns),
            ("inference", timings.inference_ns),
        )
        self._stages.observe(stages)
        self._batch.observe(timings.batch_items)
        now = call.current()
        if is_alone and now is not None:
            now.note_stages(stages)

    def collect(
        self, pipeline: EncodePipeline, model: ModelInfo, config: EncoderConfig
    ) -> Iterator[Metric]:
        """Return what there is to say at this moment."""
        for family in (self._stages, self._images, self._batches):
            yield family.collect()
        yield gauge(
            "hashlens_encoder_admitted_images",
            "Images being decoded, waiting, or in the model.",
            pipeline.n_admitted,
        )
        yield gauge(
            "hashlens_encoder_queue_images", "Images that wait for the model.", pipeline.n_waiting
        )
        yield gauge("hashlens_encoder_queue_limit", "Most that are admitted.", config.max_queue)
        yield info(
            "hashlens_model_info",
            "The model that is served.",
            {
                "model_id": model.model_id,
                "backbone": model.backbone,
                "bits": str(model.n_bits),
                "dim": str(model.dim),
                "device": model.device,
            },
        )
