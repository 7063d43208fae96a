"""A small residual network for small pictures.

torchvision's networks halve the picture five times before they look at it closely: made for 224 px,
they waste 28. This one has the shape of "ResNet-9", with which David Page trained CIFAR-10 in
seconds ("How to train your ResNet", 2018; best entry of Stanford's DAWNBench), at half its width:
1.6 million parameters, so that a checkpoint stays small. See docs/adr/0003.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional
from torch import Tensor, nn

WIDTH = 32
"""Channels of the first map; the last one has eight times as many."""


class ResNet9(nn.Module):
    """Eight 3 x 3 convolutions, a shortcut around two pairs of them, and F7 on a sphere.

    The last map's maximum, centred and scaled over the training images (batch normalisation without
    weights) and brought to length ``sqrt(dim)``: so Euclidean distances between features are
    angles, which rank better, see docs/adr/0003. Luo et al., "Bag of Tricks and a Strong Baseline
    for Deep Person Re-identification", CVPRW 2019, put such a neck there.

    Parameters
    ----------
    width
        Channels of the first map. F7 is eight times as wide.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = _convolution(3, width)
        self.stage1 = nn.Sequential(
            _convolution(width, 2 * width), nn.MaxPool2d(2), _Residual(2 * width)
        )
        self.stage2 = nn.Sequential(_convolution(2 * width, 4 * width), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(
            _convolution(4 * width, 8 * width), nn.MaxPool2d(2), _Residual(8 * width)
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.neck = nn.BatchNorm1d(8 * width, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return F7: float, shape ``[n, 8 * width]``, for images ``[n, 3, s, s]``."""
        maps = self.stage3(self.stage2(self.stage1(self.stem(images))))
        # In single precision also under autocast: features are compared with each other.
        centred = self.neck(torch.flatten(self.pool(maps), 1).float())
        return torch.nn.functional.normalize(centred, dim=1) * math.sqrt(centred.shape[1])


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.body(maps)  # type: ignore[no-any-return]


def _convolution(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    )
