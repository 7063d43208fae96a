"""Sizes of pass: which agree, and how a batch is cut into them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from encoder_service.encoder import Encoder
from encoder_service.forward_pass import steady_sigmoid
from encoder_service.model.backbones import BACKBONES
from encoder_service.model.network import HashNet
from encoder_service.model.serving import fused, served
from encoder_service.passes import agreeing_sizes, cut, same_bits
from tests.unit.encoder.conftest import make_checkpoint


def test_only_sizes_that_give_the_same_bits_agree() -> None:
    def traces(images: NDArray[np.float32]) -> NDArray[np.uint32]:
        found = images.reshape(len(images), -1)[:, :2].copy().view(np.uint32)
        if len(images) == 2:
            found[1, 1] ^= 1  # one bit of one layer of one image
        return found

    assert agreeing_sizes(traces, 8, (1, 2, 4, 8, 16), (3, 4, 4)) == (1, 4, 8, 16)
    assert agreeing_sizes(traces, 2, (1, 2, 4), (3, 4, 4)) == (2,)


def test_one_other_bit_in_one_layer_is_not_the_same() -> None:
    def traces(images: NDArray[np.float32]) -> NDArray[np.uint32]:
        return images.reshape(len(images), -1)[:, :5].copy().view(np.uint32)

    def other(images: NDArray[np.float32]) -> NDArray[np.uint32]:
        found = traces(images)
        found[-1, -1] ^= 1
        return found

    for size in (1, 4, 8):
        assert same_bits(traces, traces, size, (3, 4, 4))
        assert not same_bits(traces, other, size, (3, 4, 4))


@pytest.mark.parametrize("sizes", [(1,), (8,), (1, 2, 4), (2, 4, 8, 16, 32), (8, 32)])
@pytest.mark.parametrize("n_beside", [1, 2, 5])
def test_cut_covers_the_batch_once_with_little_padding(
    sizes: tuple[int, ...], n_beside: int
) -> None:
    for n in range(100):
        passes = cut(n, sizes, n_beside)
        assert [row for rows, _ in passes for row in range(n)[rows]] == list(range(n))
        assert all(size in sizes and 0 < len(range(n)[rows]) <= size for rows, size in passes)
        padding = sum(size for _, size in passes) - n
        assert padding < sizes[0] or padding <= n / 7


def test_cut_by_example() -> None:
    sizes = (2, 4, 8, 16, 32)
    assert [size for _, size in cut(1, sizes)] == [2]
    assert [size for _, size in cut(3, sizes)] == [4]
    assert [size for _, size in cut(31, sizes)] == [32]
    assert [size for _, size in cut(37, sizes)] == [32, 4, 2]
    assert cut(0, sizes) == []
    assert [size for _, size in cut(32, sizes, 2)] == [16, 16]
    assert [size for _, size in cut(20, sizes, 2)] == [8, 8, 4]
    assert [size for _, size in cut(2, sizes, 2)] == [2]
    assert [size for _, size in cut(8, (1, 2, 4), 2)] == [4, 4]


@pytest.mark.parametrize("n_bits", [1, 12, 31, 48, 64, 100, 256])
def test_no_row_changes_another_ones_sigmoid(n_bits: int) -> None:
    scores = torch.randn(33, n_bits, generator=torch.Generator().manual_seed(n_bits))
    together = steady_sigmoid(scores)
    torch.testing.assert_close(together, torch.sigmoid(scores), atol=3e-7, rtol=0)
    for n in (1, 2, 3, 8):
        apart = torch.cat([steady_sigmoid(part) for part in scores.split(n)])
        assert torch.equal(apart, together)


def test_an_encoder_says_which_sizes_it_uses() -> None:
    encoder = Encoder(make_checkpoint(), "cpu")
    assert encoder.plan is None
    encoder.warm_up()
    assert encoder.plan is not None
    sizes = encoder.plan.sizes
    assert encoder.tile in sizes
    assert list(sizes) == sorted(set(sizes))


def settled(backbone: str) -> HashNet:
    """A network whose batch normalisation does something."""
    torch.manual_seed(0)
    network = HashNet(backbone, 12, 3, "batch")
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return network.eval()


@pytest.mark.parametrize("backbone", ["resnet9", "resnet18", "mobilenet_v3_small", "alexnet"])
def test_served_says_the_same_and_leaves_the_network_alone(backbone: str) -> None:
    network = settled(backbone)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    images = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        want, got = network(images), served(network, 4)(images)
    scale = float(want.features.abs().max())
    torch.testing.assert_close(got.features, want.features, atol=1e-4 * scale, rtol=1e-3)
    torch.testing.assert_close(got.activations, want.activations, atol=1e-4, rtol=1e-3)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in network.modules()] == kinds


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in ("vgg16",)])
def test_no_normalisation_is_left_after_a_convolution(backbone: str) -> None:
    with torch.device("meta"):
        module = BACKBONES[backbone].build().eval()
    kinds = {type(part) for part in fused(module).modules()}
    assert nn.Conv2d in kinds
    assert nn.BatchNorm2d not in kinds


def test_a_convolution_that_feeds_others_too_keeps_its_normalisation() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.convolution(x)
            return y + self.norm(y)

    module = Forked().eval()
    module.norm.running_mean.fill_(0.5)
    images = torch.randn(2, 3, 4, 4)
    kept = fused(module)
    assert any(isinstance(part, nn.BatchNorm2d) for part in kept.modules())
    assert torch.equal(kept(images), module(images))
