"""Depthwise convolutions as matrix products: the same sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_service.training.depthwise import DenseDepthwise


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(2, 5),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
)
def test_dense_depthwise_is_a_convolution(
    n: int, channels: int, height: int, width: int, kernel: int, stride: int
) -> None:
    generator = torch.Generator().manual_seed(height * 100 + width)
    images = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64)
    layer = torch.nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )
    results = []
    for context in (DenseDepthwise(), torch.enable_grad()):
        inputs = images.clone().requires_grad_()
        layer.weight = torch.nn.Parameter(weight.clone())
        with context:
            output = layer(inputs)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        results.append((output, inputs.grad, layer.weight.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_other_convolutions_are_left_alone() -> None:
    images = torch.randn(2, 4, 3, 3)
    for layer in (
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Conv2d(4, 4, 3, groups=4, bias=True),
        torch.nn.Conv2d(4, 8, 3, groups=4, bias=False),
        torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
    ):
        plain = layer(images)
        with DenseDepthwise():
            assert torch.equal(layer(images), plain)
    with DenseDepthwise():
        assert F.conv2d(images, torch.ones(1, 4, 3, 3), padding="same").shape == (2, 1, 3, 3)
