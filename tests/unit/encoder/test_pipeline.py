"""The pipeline from bytes to embeddings: what does not change a result, and what costs nothing."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoder_service import pipeline as pipeline_module
from encoder_service.config import EncoderConfig
from encoder_service.decode import DecodeLimits
from encoder_service.encoder import Encoder
from encoder_service.pipeline import EncodePipeline
from hashlens.errors import DeadlineError, InvalidInputError, OverloadedError
from hashlens.types import Encoded, FeatureDtype
from tests.support.pictures import picture
from tests.unit.encoder.conftest import make_checkpoint

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def file_of(number: int) -> bytes:
    """A picture unlike all others, in one of several formats and sizes."""
    name = ("red", "blue", "green")[number % 3]
    image = picture(name, number, (30 + number, 70 - number))
    out = io.BytesIO()
    image.save(out, FORMATS[number % len(FORMATS)])
    return out.getvalue()


FILES = [file_of(number) for number in range(24)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_checkpoint(), "cpu")


def piping(
    encoder: Encoder, scenario: Callable[[EncodePipeline], Awaitable[None]], **settings: Any
) -> None:
    async def run() -> None:
        async with EncodePipeline(encoder, EncoderConfig(**settings)) as pipeline:
            await scenario(pipeline)

    asyncio.run(asyncio.wait_for(run(), 60))


async def encode(pipeline: EncodePipeline, image: bytes, deadline_s: float = 30) -> Encoded:
    return await pipeline.encode(
        image, deadline_s=deadline_s, feature_dtype=FeatureDtype.F32, with_activations=True
    )


def bits_of(encoded: Encoded) -> tuple[bytes, bytes, bytes]:
    embedding = encoded.embedding
    assert embedding.feature is not None
    assert embedding.activations is not None
    return embedding.code, embedding.feature.tobytes(), embedding.activations.tobytes()


@pytest.fixture(scope="module")
def alone(encoder: Encoder) -> list[tuple[bytes, bytes, bytes]]:
    """Each file's embedding, encoded with nobody else about."""
    found = []

    async def scenario(pipeline: EncodePipeline) -> None:
        for image in FILES:
            encoded = await encode(pipeline, image)
            assert encoded.timings.batch_items == 1
            found.append(bits_of(encoded))

    piping(encoder, scenario)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_company_never_changes_an_embedding(
    encoder: Encoder, alone: list[tuple[bytes, bytes, bytes]], seed: int
) -> None:
    """Any files, in any order and number, in batches of any size, from any number of threads."""
    rng = np.random.default_rng(seed)
    sizes: set[int] = set()

    async def scenario(pipeline: EncodePipeline) -> None:
        for _ in range(4):
            rows = rng.integers(0, len(FILES), rng.integers(1, 60))
            found = await asyncio.gather(*(encode(pipeline, FILES[row]) for row in rows))
            sizes.update(encoded.timings.batch_items for encoded in found)
            assert [bits_of(encoded) for encoded in found] == [alone[row] for row in rows]

    max_batch = int(rng.integers(2, 40))
    piping(
        encoder,
        scenario,
        max_batch=max_batch,
        max_wait_ms=float(rng.choice([0, 2, 20])),
        n_decode_threads=int(rng.integers(1, 4)),
    )
    assert max(sizes) > 1
    assert max(sizes) <= max_batch


def test_embeddings_are_the_encoders(encoder: Encoder, alone: list[Any]) -> None:
    decoded = [
        encoder.preprocessing(pipeline_module.decode(image, DecodeLimits())) for image in FILES
    ]
    encoded = encoder.encode(np.stack(decoded))
    assert [code for code, _, _ in alone] == [code.tobytes() for code in encoded.codes]
    assert len({code for code, _, _ in alone}) > 1
    assert [feature for _, feature, _ in alone] == [f.tobytes() for f in encoded.features]


class Gate:
    """Holds up whoever comes by, and remembers what came."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.passed: list[Any] = []
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, what: Any, *rest: Any) -> Any:
        self.passed.append(what)
        self.entered.set()
        assert self.open.wait(30)
        return self._function(what, *rest)

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


def test_an_image_whose_caller_left_is_not_decoded(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipeline_module.decode)
    monkeypatch.setattr(pipeline_module, "decode", gate)

    async def scenario(pipeline: EncodePipeline) -> None:
        first = asyncio.create_task(encode(pipeline, FILES[0]))
        await gate.until_entered()
        left = asyncio.create_task(encode(pipeline, FILES[1]))
        stays = asyncio.create_task(encode(pipeline, FILES[2]))
        await asyncio.sleep(0)
        assert pipeline.n_admitted == 3
        left.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, stays)
        assert pipeline.n_admitted == 0

    piping(encoder, scenario, n_decode_threads=1)
    assert gate.passed == [FILES[0], FILES[2]]


def test_an_image_whose_deadline_passed_is_not_decoded(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipeline_module.decode)
    monkeypatch.setattr(pipeline_module, "decode", gate)

    async def scenario(pipeline: EncodePipeline) -> None:
        first = asyncio.create_task(encode(pipeline, FILES[0]))
        await gate.until_entered()
        late = asyncio.create_task(encode(pipeline, FILES[1], deadline_s=0.01))
        await asyncio.sleep(0)  # Its time begins.
        await asyncio.sleep(0.02)
        gate.open.set()
        with pytest.raises(DeadlineError, match="waited to be decoded"):
            await late
        await first

    piping(encoder, scenario, n_decode_threads=1)
    assert gate.passed == [FILES[0]]


def test_an_image_whose_caller_left_while_it_waited_does_not_reach_the_model(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    gate = Gate(encoder.encode)

    async def scenario(pipeline: EncodePipeline) -> None:
        monkeypatch.setattr(
            encoder, "encode", lambda batch: batches.append(len(batch)) or gate(batch)
        )
        first = asyncio.create_task(encode(pipeline, FILES[0]))
        await gate.until_entered()
        others = [asyncio.create_task(encode(pipeline, image)) for image in FILES[1:4]]
        late = asyncio.create_task(encode(pipeline, FILES[4], deadline_s=25))
        for _ in range(3000):
            if pipeline.batcher.n_waiting == 4:
                break
            await asyncio.sleep(0.01)
        assert pipeline.batcher.n_waiting == 4
        others[1].cancel()
        # Its time is over now: a short one might be over before it is decoded.
        min(pipeline.batcher._queue, key=lambda waiting: waiting.deadline_ns).deadline_ns = 0
        await asyncio.sleep(0)
        gate.open.set()
        with pytest.raises(DeadlineError, match="waited for the model"):
            await late
        await asyncio.gather(first, others[0], others[2])
        counts = pipeline.batcher.counts
        assert (counts.n_left, counts.n_late) == (1, 1)

    piping(encoder, scenario)
    assert batches == [1, 2]


def test_no_image_is_said_and_nobody_waits_for_it(encoder: Encoder) -> None:
    async def scenario(pipeline: EncodePipeline) -> None:
        good = asyncio.create_task(encode(pipeline, FILES[0]))
        with pytest.raises(InvalidInputError):
            await encode(pipeline, b"no image")
        await good
        assert pipeline.n_admitted == 0

    piping(encoder, scenario, max_wait_ms=60_000)


def test_too_many_images_are_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipeline_module.decode)
    monkeypatch.setattr(pipeline_module, "decode", gate)

    async def scenario(pipeline: EncodePipeline) -> None:
        accepted = [asyncio.create_task(encode(pipeline, FILES[row])) for row in range(2)]
        await gate.until_entered()
        with pytest.raises(OverloadedError) as caught:
            await encode(pipeline, FILES[2])
        assert caught.value.retry_after_s > 0
        gate.open.set()
        await asyncio.gather(*accepted)

    piping(encoder, scenario, max_queue=2, max_batch_items=2)


def large_jpeg() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((900, 700), 60).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def test_a_large_jpeg_is_reduced_if_the_model_says_so() -> None:
    whole = make_checkpoint()
    draft = replace(whole, preprocessing=replace(whole.preprocessing, jpeg_draft=True))
    data = large_jpeg()
    found = {}
    for checkpoint in (whole, draft):
        encoder = Encoder(checkpoint, "cpu")
        least_px = checkpoint.preprocessing.least_px
        wanted = encoder.preprocessing(pipeline_module.decode(data, DecodeLimits(), least_px))

        async def scenario(
            pipeline: EncodePipeline, encoder: Encoder = encoder, wanted: Any = wanted
        ) -> None:
            encoded = await encode(pipeline, data)
            feature = encoder.encode(wanted[np.newaxis]).features[0].tobytes()
            assert bits_of(encoded)[1] == feature
            found[encoder.model_id] = feature

        piping(encoder, scenario)
    assert len(set(found.values())) == len(found) == 2


def test_a_large_image_is_brought_to_size(encoder: Encoder) -> None:
    async def scenario(pipeline: EncodePipeline) -> None:
        encoded = await encode(pipeline, large_jpeg())
        assert encoded.timings.decode_ns > 0
        assert encoded.timings.total_ns >= encoded.timings.decode_ns

    piping(encoder, scenario)
