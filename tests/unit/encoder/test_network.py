from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision

from encoder_service.model.backbones import BACKBONES, get_backbone, load_imagenet
from encoder_service.model.network import HashNet
from hashlens.errors import InvalidInputError


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_and_ranges(name: str) -> None:
    backbone = BACKBONES[name]
    network = HashNet(name, 13, 4).eval()
    side = backbone.min_size
    with torch.inference_mode():
        output = network(torch.randn(2, 3, side, side))
    assert output.features.shape == (2, backbone.dim)
    assert output.activations.shape == (2, 13)
    assert output.logits.shape == (2, 4)
    assert ((output.activations > 0) & (output.activations < 1)).all()
    if backbone.f7_is_nonnegative:
        assert output.features.min() >= 0
    else:
        assert output.features.min() >= -0.375


def test_the_widths_are_the_papers_and_torchvisions() -> None:
    assert {name: entry.dim for name, entry in BACKBONES.items()} == {
        "alexnet": 4096,
        "resnet18": 512,
        "resnet50": 2048,
        "mobilenet_v3_small": 1024,
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_the_classifier_sees_only_h(name: str) -> None:
    """Gradients of the scores with H held fixed must not reach the backbone."""
    network = HashNet(name, 6, 3).eval()
    side = BACKBONES[name].min_size
    output = network(torch.randn(2, 3, side, side))
    torch.testing.assert_close(output.logits, network.classifier(output.activations))
    rows = torch.zeros_like(output.activations)
    assert torch.equal(network.classifier(rows)[0], network.classifier.bias)


def test_f7_does_not_drop_out_in_evaluation() -> None:
    network = HashNet("alexnet", 8, 3)
    images = torch.randn(1, 3, 63, 63)
    network.eval()
    assert torch.equal(network(images).features, network(images).features)
    network.train()
    assert not torch.equal(network(images).features, network(images).features)


def test_alexnet_f7_is_after_the_relu_of_its_second_layer() -> None:
    network = HashNet("alexnet", 8, 3).eval()
    images = torch.randn(3, 3, 63, 63)
    model = network.backbone
    hidden = torch.flatten(model.avgpool(model.features(images)), 1)
    hidden = torch.relu(model.classifier[1](hidden))
    hidden = torch.relu(model.classifier[4](hidden))
    torch.testing.assert_close(network(images).features, hidden)


def test_first_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    network = HashNet("alexnet", 48, 10)
    assert math.isclose(network.hash_layer.weight.std().item(), 0.005, rel_tol=0.02)
    assert (network.hash_layer.bias == 1).all()
    assert math.isclose(network.classifier.weight.std().item(), 0.01, rel_tol=0.1)


def test_batch_norm_centres_every_bit() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    for norm, spread in (("none", 0.1), ("batch", 0.3)):
        network = HashNet("mobilenet_v3_small", 16, 3, norm)  # type: ignore[arg-type]
        share = (network(images).activations > 0.5).float().mean(0)
        if norm == "batch":
            assert ((share - 0.5).abs() < spread).all()
        else:
            # Bias 1: all bits begin on.
            assert (share == 1).all()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("vgg16", 48, 10), "backbone"),
        (("alexnet", 0, 10), "n_bits"),
        (("alexnet", 513, 10), "n_bits"),
        (("alexnet", 48, 1), "classes"),
        (("alexnet", 48, 10, "layer"), "hash_norm"),
    ],
)
def test_refuses(arguments: tuple[object, ...], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        HashNet(*arguments)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_an_unknown_backbone_names_those_there_are() -> None:
    with pytest.raises(InvalidInputError, match="alexnet, resnet18, resnet50, mobilenet_v3_small"):
        get_backbone("vit")


@pytest.mark.parametrize("name", BACKBONES)
def test_torchvision_weights_fit_without_their_head(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is where a download would have put the file, so the real loading code runs."""
    backbone = BACKBONES[name]
    weights = torchvision.models.get_weight(backbone.imagenet)
    state = getattr(torchvision.models, name)().state_dict()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = folder / weights.url.rsplit("/", 1)[-1]
    torch.save(state, file)
    module = backbone.build()
    load_imagenet(module, backbone)
    loaded = module.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith(backbone.head)}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_without_internet_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    # A proxy that refuses every connection stands for the missing internet.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    backbone = get_backbone("resnet18")
    with pytest.raises(InvalidInputError, match=r"internet.*resnet18-.*\.pth.*scratch") as caught:
        load_imagenet(backbone.build(), backbone)
    assert caught.value.field == "init"
