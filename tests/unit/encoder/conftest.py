"""A small untrained model, and what tests make with it."""

from __future__ import annotations

import gzip
import struct
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from encoder_service.data.idx import FASHION_MNIST_PATH
from encoder_service.model.checkpoint import Checkpoint, save_checkpoint
from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST_PATH.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """On a busy machine, threads that wait for each other slow these small models down a lot."""
    torch.set_num_threads(1)


@pytest.fixture
def no_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that refuses every connection stands for the missing internet."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # Of the first call that there was, with the proxies of then; and it is not to keep these.
    monkeypatch.setattr(urllib.request, "_opener", None)


def make_checkpoint(n_bits: int = 20, crop: int = 32, seed: int = 0) -> Checkpoint:
    """Make a model with random weights whose bits differ from image to image."""
    # Sums over a batch round by the number of threads; one model is to be one model everywhere.
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = HashNet("mobilenet_v3_small", n_bits, 3, "batch")
        network.train()
        with torch.no_grad():
            # Running means and variances that fit, or every image would look the same.
            for _ in range(3):
                network(torch.randn(16, 3, crop, crop))
            for module in network.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.momentum = 1.0
            network(torch.randn(32, 3, crop, crop))
    return Checkpoint(
        network=network,
        preprocessing=Preprocessing(resize=crop, crop=crop),
        classes=("cat", "dog", "Ähre"),
        recipe={"epochs": 2, "flip": True},
        metrics={"test_accuracy": 0.5},
        data_licence="CC0",
    )


@pytest.fixture
def checkpoint() -> Checkpoint:
    return make_checkpoint()


@pytest.fixture
def checkpoint_file(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, path)
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file, gzipped if the name says so."""
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_small_fashion_mnist(
    folder: Path,
    n_train: int = 200,
    n_test: int = 60,
    prefixes: tuple[str, str] = ("train", "t10k"),
    suffix: str = ".gz",
) -> None:
    """Write files like Fashion-MNIST's, with ten classes that are easy to tell apart."""
    rng = np.random.default_rng(0)
    for prefix, n in zip(prefixes, (n_train, n_test), strict=True):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = divmod(int(label), 4)
            image[top * 9 : top * 9 + 9, left * 7 : left * 7 + 7] = 230
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
