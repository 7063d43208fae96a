"""A small untrained model, and what tests make with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from encoder_service.model.checkpoint import Checkpoint, save_checkpoint
from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other slow these small models down a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_checkpoint(n_bits: int = 20, crop: int = 32, seed: int = 0) -> Checkpoint:
    """Make a model with random weights whose bits differ from image to image."""
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
