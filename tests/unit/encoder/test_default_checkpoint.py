"""The bundled model, by the demo's protocol: image bytes in, nearest garments out."""

from __future__ import annotations

import io

import numpy as np
import pytest

from encoder_service.data.idx import FASHION_MNIST_CLASSES, enlarge
from encoder_service.decode import DecodeLimits, decode
from encoder_service.encoder import Encoder
from encoder_service.evaluation.encodings import Encodings
from encoder_service.evaluation.evaluate import evaluate_encodings
from encoder_service.model.checkpoint import default_checkpoint_path, load_checkpoint
from hashlens import codes
from hashlens.cli.demo_data import load_demo_images

N_QUERIES = 200


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_checkpoint(default_checkpoint_path()), "cpu", n_threads=1)


def test_what_it_is(encoder: Encoder) -> None:
    path = default_checkpoint_path()
    assert path.stat().st_size <= 8_000_000
    assert encoder.n_bits == 48
    assert encoder.classes == FASHION_MNIST_CLASSES
    assert "Zalando SE, MIT" in encoder.data_licence
    assert "Zalando SE" in path.with_name("README.md").read_text()
    # The targets that it was chosen by; docs/training.md has what was measured.
    assert encoder.metrics["split_coarse_map_full"] >= 0.90
    assert encoder.metrics["split_two_stage_precision_at_10"] >= 0.93
    assert encoder.metrics["lin2015_coarse_map_at_1000"] >= 0.93
    assert encoder.metrics["lin2015_two_stage_map_at_1000"] >= 0.94


def encode_files(encoder: Encoder, images: np.ndarray, labels: np.ndarray, kind: str) -> Encodings:
    tensors = []
    for image in images:
        buffer = io.BytesIO()
        enlarge(image).save(buffer, kind)
        tensors.append(encoder.preprocessing(decode(buffer.getvalue(), DecodeLimits())))
    encoded = encoder.encode(np.stack(tensors))
    features = encoded.features.astype(np.float16)
    return Encodings(encoded.codes, encoder.n_bits, features, labels.astype(np.int64))


@pytest.fixture(scope="module")
def stored(encoder: Encoder) -> Encodings:
    """A third of the database keeps this fast; fewer right answers make the task no easier."""
    return encode_files(encoder, *sample(N_QUERIES, N_QUERIES + 1500), "PNG")


def sample(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = load_demo_images()
    rows = np.random.default_rng(0).permutation(len(images))[start:stop]
    return images[rows], labels[rows]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_finds_the_same_kind_of_garment(encoder: Encoder, stored: Encodings, kind: str) -> None:
    asked = encode_files(encoder, *sample(0, N_QUERIES), kind)
    result = evaluate_encodings(
        stored, asked, protocol="split", classes=FASHION_MNIST_CLASSES, rankings=["two_stage"]
    )
    precision = result.rankings["two_stage"].precision_at_10
    assert precision is not None
    assert precision >= 0.90


def test_its_bits_are_all_used(stored: Encodings) -> None:
    share = codes.unpack(stored.codes, 48).mean(axis=0)
    assert ((share > 0.02) & (share < 0.98)).all()


def test_batches_do_not_change_the_codes(encoder: Encoder) -> None:
    images, labels, _ = load_demo_images()
    together = encode_files(encoder, images[:50], labels[:50], "PNG")
    for row in range(0, 50, 7):
        alone = encode_files(encoder, images[row : row + 1], labels[row : row + 1], "PNG")
        np.testing.assert_array_equal(alone.features[0], together.features[row])
        np.testing.assert_array_equal(alone.codes[0], together.codes[row])
