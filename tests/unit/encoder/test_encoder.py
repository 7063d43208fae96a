from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder_service import encoder as encoder_module
from encoder_service.encoder import Encoder
from encoder_service.forward_pass import resolve_device
from encoder_service.model.checkpoint import Checkpoint
from encoder_service.model.network import HashNet
from encoder_service.passes import Plan
from encoder_service.preprocess import Preprocessing
from encoder_service.servicer import if_small
from hashlens import codes
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.types import Classifier
from tests.unit.encoder.conftest import make_checkpoint

N = 40
IMAGES = np.random.default_rng(1).standard_normal((N, 3, 32, 32)).astype(np.float32)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_checkpoint(), "cpu")


@pytest.fixture(scope="module")
def one_by_one(encoder: Encoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, features and activations of `IMAGES`, each encoded alone."""
    alone = [encoder.encode(image[np.newaxis]) for image in IMAGES]
    return (
        np.concatenate([e.codes for e in alone]),
        np.concatenate([e.features for e in alone]),
        np.concatenate([e.activations for e in alone]),
    )


def test_shapes_dtypes_and_packing(encoder: Encoder) -> None:
    encoded = encoder.encode(IMAGES[:5])
    assert (encoded.codes.shape, encoded.codes.dtype) == ((5, 3), np.uint8)
    assert (encoded.features.shape, encoded.features.dtype) == ((5, 1024), np.float32)
    assert (encoded.activations.shape, encoded.activations.dtype) == ((5, 20), np.float32)
    np.testing.assert_array_equal(codes.unpack(encoded.codes, 20), encoded.activations > 0.5)
    assert (encoded.codes[:, -1] < 16).all(), "padding bits are zero"
    assert len(np.unique(encoded.codes, axis=0)) > 1, "the model tells these images apart"


def test_no_images(encoder: Encoder) -> None:
    encoded = encoder.encode(IMAGES[:0])
    assert encoded.codes.shape == (0, 3)
    assert encoded.features.shape == (0, 1024)
    assert encoded.activations.shape == (0, 20)


def test_agrees_with_the_network(encoder: Encoder) -> None:
    network = make_checkpoint().network
    with torch.inference_mode():
        output = network(torch.from_numpy(IMAGES))
    encoded = encoder.encode(IMAGES)
    np.testing.assert_allclose(encoded.features, output.features, atol=2e-4)
    np.testing.assert_allclose(encoded.activations, output.activations, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=35))
def test_neither_batch_size_nor_place_changes_an_embedding(
    encoder: Encoder, one_by_one: tuple[np.ndarray, ...], rows: list[int]
) -> None:
    encoded = encoder.encode(IMAGES[rows])
    np.testing.assert_array_equal(encoded.codes, one_by_one[0][rows])
    np.testing.assert_array_equal(encoded.features, one_by_one[1][rows])
    np.testing.assert_array_equal(encoded.activations, one_by_one[2][rows])


def test_a_bit_on_the_edge_does_not_flip() -> None:
    """A bias that puts H of one image exactly on the threshold, the worst case there is."""
    checkpoint = make_checkpoint()
    encoder = Encoder(checkpoint, "cpu")
    linear, norm = checkpoint.network.hash_layer, checkpoint.network.hash_norm
    assert isinstance(norm, torch.nn.BatchNorm1d)
    with torch.no_grad():
        feature = torch.from_numpy(encoder.encode(IMAGES[:1]).features)
        norm.running_mean.copy_(linear(feature)[0])
        norm.bias.zero_()
    alone = encoder.encode(IMAGES[:1])
    assert np.abs(alone.activations - 0.5).max() < 1e-5
    for n in range(2, N + 1):
        for batch, place in ((IMAGES[:n], 0), (np.roll(IMAGES[:n], n - 1, axis=0), n - 1)):
            np.testing.assert_array_equal(encoder.encode(batch).codes[place], alone.codes[0])


def test_other_memory_layouts_of_the_batch_give_the_same(
    encoder: Encoder, one_by_one: tuple[np.ndarray, ...]
) -> None:
    channels_last = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    every_second = np.repeat(IMAGES, 2, axis=0)[::2]
    unaligned = np.frombuffer(b"\0" + IMAGES.tobytes(), np.uint8)[1:].view(np.float32)
    for batch in (channels_last, every_second, unaligned.reshape(IMAGES.shape)):
        np.testing.assert_array_equal(encoder.encode(batch).features, one_by_one[1])


def test_two_encoders_of_one_model_agree(one_by_one: tuple[np.ndarray, ...]) -> None:
    np.testing.assert_array_equal(
        Encoder(make_checkpoint(), "cpu").encode(IMAGES).features, one_by_one[1]
    )


def test_works_in_another_thread(encoder: Encoder, one_by_one: tuple[np.ndarray, ...]) -> None:
    """As in the service, where the model's thread is not the one that made the encoder."""

    def work() -> tuple[np.ndarray, int]:
        encoder.warm_up()
        return encoder.encode(IMAGES).features, torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        features, n_threads = pool.submit(work).result()
    np.testing.assert_array_equal(features, one_by_one[1])
    assert encoder.plan is not None
    assert n_threads in (1, encoder.plan.n_threads_alone)


def test_tile_follows_the_input_size() -> None:
    for crop, tile in ((32, 8), (48, 8), (64, 4), (96, 2), (224, 1)):
        checkpoint = replace(make_checkpoint(), preprocessing=Preprocessing(resize=crop, crop=crop))
        assert Encoder(checkpoint, "cpu").tile == tile


@pytest.mark.parametrize("crop", [48, 224])
def test_no_number_of_threads_changes_a_result(crop: int) -> None:
    checkpoint = replace(make_checkpoint(), preprocessing=Preprocessing(resize=crop, crop=crop))
    batch = np.random.default_rng(0).standard_normal((7, 3, crop, crop)).astype(np.float32)
    wanted = Encoder(checkpoint, "cpu", n_threads=1).encode(batch)
    for n_threads in (2, 3):
        encoder = Encoder(checkpoint, "cpu", n_threads=n_threads)
        assert encoder.n_threads == n_threads
        together = encoder.encode(batch)
        np.testing.assert_array_equal(together.features, wanted.features)
        np.testing.assert_array_equal(together.activations, wanted.activations)
        for row in range(len(batch)):
            alone = encoder.encode(batch[row : row + 1])
            np.testing.assert_array_equal(alone.features[0], wanted.features[row])


def test_a_pass_alone_gets_all_threads_only_where_they_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_module, "_GAIN", float("inf"))  # Whatever the machine is like.
    encoder = Encoder(make_checkpoint(), "cpu", n_threads=2)
    encoder.warm_up()
    assert encoder.plan is not None
    alike = encoder.plan.n_threads_alone == 2

    def differs(*args: object) -> bool:
        return False

    monkeypatch.setattr(encoder_module, "same_bits", differs)
    other = Encoder(make_checkpoint(), "cpu", n_threads=2)
    other.warm_up()
    assert other.plan is not None
    assert other.plan.n_threads_alone == 1
    one = IMAGES[:1]
    np.testing.assert_array_equal(encoder.encode(one).features, other.encode(one).features)
    assert alike or encoder.plan == other.plan


def test_facts(encoder: Encoder) -> None:
    checkpoint = make_checkpoint()
    assert encoder.model_id == checkpoint.model_id
    assert encoder.backbone == "mobilenet_v3_small"
    assert (encoder.n_bits, encoder.dim) == (20, 1024)
    assert encoder.classes == ("cat", "dog", "Ähre")
    assert encoder.metrics == {"test_accuracy": 0.5}
    assert encoder.data_licence == "CC0"
    assert encoder.device == torch.device("cpu")


def test_the_classifier_is_the_networks(checkpoint: Checkpoint) -> None:
    classifier = Encoder(checkpoint, device="cpu").classifier
    h = np.random.default_rng(0).random((5, checkpoint.n_bits)).astype(np.float32)
    want = checkpoint.network.classifier(torch.from_numpy(h)).detach().numpy()
    assert h @ classifier.weights.T + classifier.bias == pytest.approx(want, abs=1e-5)
    assert classifier.weights.dtype == classifier.bias.dtype == np.float32
    before = classifier.weights.copy()
    with torch.no_grad():
        checkpoint.network.classifier.weight.zero_()
    assert np.array_equal(classifier.weights, before), "a copy"


@pytest.mark.parametrize(("n_classes", "is_small"), [(1020, True), (1021, False)])
def test_a_classifier_of_more_than_a_megabyte_stays_at_home(n_classes: int, is_small: bool) -> None:
    classifier = Classifier(
        np.zeros((n_classes, 256), dtype=np.float32), np.zeros(n_classes, dtype=np.float32)
    )
    assert if_small(classifier) is (classifier if is_small else None)


def test_alexnet_end_to_end() -> None:
    """The paper's own network, from an image."""
    torch.manual_seed(0)
    network = HashNet("alexnet", 48, 10)
    encoder = Encoder(
        Checkpoint(network, Preprocessing(resize=72, crop=64), tuple("abcdefghij")), "cpu"
    )
    picture = Image.effect_noise((80, 90), 50).convert("RGB")
    image = encoder.preprocessing(picture)
    alone = encoder.encode(image[np.newaxis])
    assert alone.codes.shape == (1, 6)
    assert alone.features.shape == (1, 4096)
    assert alone.features.min() >= 0
    crowd = encoder.encode(np.stack([image] * 11))
    np.testing.assert_array_equal(crowd.features, np.repeat(alone.features, 11, axis=0))


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 3, 32, 32)),
        np.zeros((3, 32, 32), np.float32),
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((1, 3, 48, 48), np.float32),
    ],
)
def test_wrong_batches(encoder: Encoder, batch: np.ndarray) -> None:
    with pytest.raises(InvalidInputError, match=r"a batch is float32 \[n, 3, 32, 32\]"):
        encoder.encode(batch)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta", "cuda:99"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        resolve_device(device)
    assert caught.value.field == "device"


def test_auto_finds_what_is_there() -> None:
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == wanted
    assert resolve_device("cpu") == torch.device("cpu")


def test_bad_settings() -> None:
    with pytest.raises(InvalidInputError, match="n_threads"):
        Encoder(make_checkpoint(), "cpu", -1)
    with pytest.raises(InvalidInputError, match="autocast"):
        Encoder(make_checkpoint(), "cpu", autocast="int8")  # type: ignore[arg-type]


# --- CUDA ---


@pytest.mark.gpu
@needs_cuda
def test_cuda_agrees_with_the_cpu() -> None:
    cpu = Encoder(make_checkpoint(), "cpu").encode(IMAGES)
    gpu = Encoder(make_checkpoint(), "cuda").encode(IMAGES)
    np.testing.assert_allclose(gpu.features, cpu.features, atol=1e-3)
    np.testing.assert_allclose(gpu.activations, cpu.activations, atol=1e-3)
    sure = np.abs(cpu.activations - 0.5) > 1e-3
    assert ((gpu.activations > 0.5) == (cpu.activations > 0.5))[sure].all()


@pytest.mark.gpu
@needs_cuda
def test_cuda_neither_batch_size_nor_place_changes_an_embedding() -> None:
    encoder = Encoder(make_checkpoint(), "cuda")
    want = np.concatenate([encoder.encode(image[np.newaxis]).features for image in IMAGES])
    rng = np.random.default_rng(0)
    for n in range(1, N + 1):
        rows = rng.integers(0, N, n)
        np.testing.assert_array_equal(encoder.encode(IMAGES[rows]).features, want[rows])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_cuda_autocast_is_close(autocast: str) -> None:
    cpu = Encoder(make_checkpoint(), "cpu").encode(IMAGES)
    gpu = Encoder(make_checkpoint(), "cuda", autocast=autocast).encode(IMAGES)  # type: ignore[arg-type]
    assert gpu.features.dtype == np.float32
    np.testing.assert_allclose(gpu.activations, cpu.activations, atol=0.1)


@pytest.mark.gpu
@needs_cuda
def test_cuda_out_of_memory_splits_the_pass_once() -> None:
    """A network that needs the memory of the whole device for a full tile, and half for half."""
    checkpoint = make_checkpoint()
    encoder = Encoder(checkpoint, "cuda")
    want = encoder.encode(IMAGES)
    total = torch.cuda.get_device_properties(0).total_memory
    sizes: list[int] = []

    def greedy(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(len(inputs[0]))
        torch.empty(int(total * len(inputs[0]) / encoder.tile), dtype=torch.uint8, device="cuda")

    hook = encoder._forward._network.register_forward_pre_hook(greedy)
    # Half of the device may be in use: the hook's request for half must still fit.
    torch.cuda.empty_cache()
    got = encoder.encode(IMAGES[: encoder.tile])
    hook.remove()
    assert sizes == [encoder.tile, encoder.tile // 2, encoder.tile // 2]
    np.testing.assert_allclose(got.features, want.features[: encoder.tile], atol=1e-3)


# --- torch.compile ---

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.mark.slow
@pytest.mark.timeout(900)  # The compiler takes half a minute of CPU, which a busy machine may lack.
@needs_compiler
def test_compiled_is_close_and_no_company_changes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.manual_seed(0)
    network = HashNet("alexnet", 12, 3).eval()
    checkpoint = Checkpoint(network, Preprocessing(resize=64, crop=64), ("a", "b", "c"))
    images = np.random.default_rng(2).standard_normal((9, 3, 64, 64)).astype(np.float32)
    want = Encoder(checkpoint, "cpu").encode(images)
    encoder = Encoder(checkpoint, "cpu", compile=True)
    encoder.warm_up()
    assert encoder.plan == Plan((encoder.tile,), encoder.n_threads)
    crowd = encoder.encode(images)
    np.testing.assert_allclose(crowd.features, want.features, atol=1e-4)
    np.testing.assert_allclose(crowd.activations, want.activations, atol=1e-4)
    for row in range(len(images)):
        alone = encoder.encode(images[row : row + 1])
        np.testing.assert_array_equal(alone.features[0], crowd.features[row])


def test_compiling_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> object:
        def call(images: torch.Tensor) -> None:
            raise RuntimeError("no compiler found")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    encoder = Encoder(make_checkpoint(), "cpu", compile=True)
    with pytest.raises(PreconditionError, match="leave compile off"):
        encoder.warm_up()
