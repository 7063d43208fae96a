"""Backbones by name: which network, and which of its activations is F7.

F7 is what the paper calls the last hidden layer before the classifier. Every backbone here but
`resnet9` is the torchvision network without its last linear layer, so the parameters keep
torchvision's names and its ImageNet weights load as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.models
from torch import nn

from encoder_service.model.resnet9 import WIDTH, ResNet9
from hashlens.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Backbone:
    """A network from image to F7."""

    name: str
    dim: int
    """Width of F7."""
    f7: str
    """Which activation is F7, in words."""
    f7_is_nonnegative: bool
    """Whether F7 comes out of a ReLU. Euclidean distance works either way."""
    min_size: int
    """Smallest input side in pixels that leaves the network something to see."""
    dropout: float
    """Drop rate between F7 and H while training; what torchvision has before its classifier."""
    build: Callable[[], nn.Module]
    """Make the module, ``[n, 3, s, s] -> [n, dim]``, with fresh weights."""
    imagenet: str = ""
    """Name of torchvision's ImageNet weights for it; empty if there are none."""
    head: str = ""
    """Prefix of the torchvision parameters left out: the ImageNet classifier."""


def _alexnet() -> nn.Module:
    network = torchvision.models.alexnet()
    network.classifier[6] = nn.Identity()
    return _module(network)


def _vgg16() -> nn.Module:
    network = torchvision.models.vgg16()
    # Its last dropout comes after F7; `HashNet` has one there for every backbone.
    network.classifier[5] = nn.Identity()
    network.classifier[6] = nn.Identity()
    return _module(network)


def _resnet(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = torchvision.models.get_model(name)
        network.fc = nn.Identity()
        return _module(network)

    return build


def _mobilenet_v3(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = torchvision.models.get_model(name)
        # Its dropout comes after F7; `HashNet` has one there for every backbone.
        network.classifier[2] = nn.Identity()
        network.classifier[3] = nn.Identity()
        return _module(network)

    return build


def _efficientnet_b0() -> nn.Module:
    network = torchvision.models.efficientnet_b0()
    network.classifier = nn.Identity()
    return _module(network)


def _convnext_tiny() -> nn.Module:
    network = torchvision.models.convnext_tiny()
    network.classifier[2] = nn.Identity()
    return _module(network)


def _module(network: object) -> nn.Module:
    """Give torchvision's untyped result a type."""
    assert isinstance(network, nn.Module)
    return network


_HARDSWISH = "the first classifier layer after its Hardswish, so values down to -0.375 occur"
_LAST_MAP = "the average over the last block's map, after its ReLU"

BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="resnet9",
            dim=8 * WIDTH,
            f7="the maximum over the last map, centred, on a sphere",
            f7_is_nonnegative=False,
            min_size=8,
            dropout=0.0,
            build=ResNet9,
        ),
        Backbone(
            name="mobilenet_v3_small",
            dim=1024,
            f7=_HARDSWISH,
            f7_is_nonnegative=False,
            min_size=32,
            dropout=0.2,
            build=_mobilenet_v3("mobilenet_v3_small"),
            imagenet="MobileNet_V3_Small_Weights.IMAGENET1K_V1",
            head="classifier.3.",
        ),
        Backbone(
            name="mobilenet_v3_large",
            dim=1280,
            f7=_HARDSWISH,
            f7_is_nonnegative=False,
            min_size=32,
            dropout=0.2,
            build=_mobilenet_v3("mobilenet_v3_large"),
            imagenet="MobileNet_V3_Large_Weights.IMAGENET1K_V2",
            head="classifier.3.",
        ),
        Backbone(
            name="efficientnet_b0",
            dim=1280,
            f7="the average over the last map, after its SiLU, so values down to -0.28 occur",
            f7_is_nonnegative=False,
            min_size=32,
            dropout=0.2,
            build=_efficientnet_b0,
            imagenet="EfficientNet_B0_Weights.IMAGENET1K_V1",
            head="classifier.",
        ),
        Backbone(
            name="resnet18",
            dim=512,
            f7=_LAST_MAP,
            f7_is_nonnegative=True,
            min_size=32,
            dropout=0.0,
            build=_resnet("resnet18"),
            imagenet="ResNet18_Weights.IMAGENET1K_V1",
            head="fc.",
        ),
        Backbone(
            name="resnet50",
            dim=2048,
            f7=_LAST_MAP,
            f7_is_nonnegative=True,
            min_size=32,
            dropout=0.0,
            build=_resnet("resnet50"),
            imagenet="ResNet50_Weights.IMAGENET1K_V2",
            head="fc.",
        ),
        Backbone(
            name="convnext_tiny",
            dim=768,
            f7="the average over the last map, after its layer norm, so of either sign",
            f7_is_nonnegative=False,
            min_size=32,
            dropout=0.0,
            build=_convnext_tiny,
            imagenet="ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
            head="classifier.2.",
        ),
        Backbone(
            name="alexnet",
            dim=4096,
            f7="the second fully connected layer after its ReLU, as in the paper",
            f7_is_nonnegative=True,
            min_size=63,
            dropout=0.5,
            build=_alexnet,
            imagenet="AlexNet_Weights.IMAGENET1K_V1",
            head="classifier.6.",
        ),
        Backbone(
            name="vgg16",
            dim=4096,
            f7="the second fully connected layer after its ReLU",
            f7_is_nonnegative=True,
            min_size=32,
            dropout=0.5,
            build=_vgg16,
            imagenet="VGG16_Weights.IMAGENET1K_V1",
            head="classifier.6.",
        ),
    )
}
"""Every backbone by name."""


def get_backbone(name: str) -> Backbone:
    """Return the backbone called `name`; InvalidInputError names those there are."""
    try:
        return BACKBONES[name]
    except KeyError:
        raise InvalidInputError(
            f"there is no backbone {name!r}. Use one of: {', '.join(BACKBONES)}.", field="backbone"
        ) from None


def load_imagenet(module: nn.Module, backbone: Backbone) -> None:
    """Load torchvision's ImageNet weights into a backbone, in place.

    Parameters
    ----------
    module
        What ``backbone.build()`` made.
    backbone
        Its entry.

    Raises
    ------
    InvalidInputError
        There are no such weights, or they are not in torch's cache and cannot be downloaded.
    """
    if not backbone.imagenet:
        raise InvalidInputError(
            f"there are no ImageNet weights for {backbone.name}. Use init 'scratch', or one of: "
            f"{', '.join(entry.name for entry in BACKBONES.values() if entry.imagenet)}.",
            field="init",
        )
    weights = torchvision.models.get_weight(backbone.imagenet)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        target = f"{torch.hub.get_dir()}/checkpoints/{weights.url.rsplit('/', 1)[-1]}"
        raise InvalidInputError(
            f"cannot get the ImageNet weights of {backbone.name} ({error}). Train where there is "
            f"internet, put the file {weights.url} at {target}, or use init 'scratch' or a "
            "Hashlens checkpoint.",
            field="init",
        ) from error
    module.load_state_dict(
        {name: tensor for name, tensor in state.items() if not name.startswith(backbone.head)}
    )
