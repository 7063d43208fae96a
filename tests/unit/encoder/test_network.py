from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision

from encoder_service.model.backbones import BACKBONES, get_backbone, load_imagenet
from encoder_service.model.network import HashNet
from hashlens.errors import InvalidInputError


@pytest.fixture(scope="module", params=BACKBONES)
def network(request: pytest.FixtureRequest) -> HashNet:
    """One of each backbone, made once."""
    with torch.device("meta"):
        network = HashNet(request.param, 13, 4).eval()
    network.to_empty(device="cpu")
    # The same few numbers again and again: drawing them all takes seconds for the large ones.
    numbers = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            scaled = numbers * math.sqrt(2 / tensor[0].numel())
            repeated = scaled.repeat(math.ceil(tensor.numel() / len(numbers)))
            tensor.copy_(repeated[: tensor.numel()].view_as(tensor))
        else:
            tensor.fill_(name.endswith(("weight", "running_var")))
    return network


def noise(network: HashNet, n: int) -> torch.Tensor:
    side = BACKBONES[network.backbone_name].min_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_shapes_and_ranges(network: HashNet) -> None:
    backbone = BACKBONES[network.backbone_name]
    with torch.inference_mode():
        output = network(noise(network, 2))
    assert output.features.shape == (2, backbone.dim)
    assert output.activations.shape == (2, 13)
    assert output.logits.shape == (2, 4)
    assert torch.isfinite(output.features).all()
    assert not torch.equal(output.features[0], output.features[1])
    assert ((output.activations >= 0) & (output.activations <= 1)).all()
    torch.testing.assert_close(output.activations, torch.sigmoid(output.scores))
    if backbone.f7_is_nonnegative:
        assert output.features.min() >= 0
    elif backbone.f7.endswith("values down to -0.375 occur"):
        assert -0.375 <= output.features.min() < 0


def test_f7_does_not_depend_on_the_other_images(network: HashNet) -> None:
    images = noise(network, 3)
    others = images.clone()
    others[1:] = 50 * others[1:] + 7
    with torch.inference_mode():
        assert torch.equal(network(images).features[0], network(others).features[0])


def test_the_classifier_sees_only_h(network: HashNet) -> None:
    with torch.inference_mode():
        output = network(noise(network, 2))
        torch.testing.assert_close(output.logits, network.classifier(output.activations))
        rows = torch.zeros_like(output.activations)
        assert torch.equal(network.classifier(rows)[0], network.classifier.bias)


def test_the_widths_are_the_papers_and_torchvisions() -> None:
    assert {name: entry.dim for name, entry in BACKBONES.items()} == {
        "resnet9": 256,
        "mobilenet_v3_small": 1024,
        "mobilenet_v3_large": 1280,
        "efficientnet_b0": 1280,
        "resnet18": 512,
        "resnet50": 2048,
        "convnext_tiny": 768,
        "alexnet": 4096,
        "vgg16": 4096,
    }


def test_resnet9_is_small() -> None:
    """So that a checkpoint with 48 bits stays below 8 MB."""
    network = HashNet("resnet9", 48, 10, "batch")
    assert sum(tensor.nbytes for tensor in network.state_dict().values()) < 8_000_000


def test_there_are_no_imagenet_weights_for_resnet9() -> None:
    backbone = get_backbone("resnet9")
    with pytest.raises(InvalidInputError, match="init 'scratch', or one of: mobilenet_v3") as e:
        load_imagenet(backbone.build(), backbone)
    assert e.value.field == "init"
    assert "resnet9" not in e.value.message.split("one of")[1]


def test_f7_of_resnet9_is_on_a_sphere() -> None:
    network = HashNet("resnet9", 8, 3)
    images = torch.randn(20, 3, 16, 16)
    for mode in (True, False):
        lengths = network.train(mode)(images).features.norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((20,), 16.0))


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
        (("vgg11", 48, 10), "backbone"),
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
    with pytest.raises(InvalidInputError, match=r"resnet9, mobilenet_v3_small, .*, alexnet, vgg16"):
        get_backbone("vit")


@pytest.mark.parametrize("name", [name for name, entry in BACKBONES.items() if entry.imagenet])
def test_torchvision_weights_fit_without_their_head(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is where a download would have put the file, so the real loading code runs."""
    backbone = BACKBONES[name]
    weights = torchvision.models.get_weight(backbone.imagenet)
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)().state_dict()
        module = backbone.build()
    module.to_empty(device="cpu")
    # Each tensor full of a number of its own, stored once: the real files have half a gigabyte.
    state = {
        key: torch.full((), position, dtype=tensor.dtype).expand(tensor.shape)
        for position, (key, tensor) in enumerate(shapes.items())
    }
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    torch.save(state, folder / weights.url.rsplit("/", 1)[-1])
    load_imagenet(module, backbone)
    loaded = module.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith(backbone.head)}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


@pytest.mark.usefixtures("no_internet")
def test_without_internet_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    backbone = get_backbone("resnet18")
    with pytest.raises(InvalidInputError, match=r"internet.*resnet18-.*\.pth.*scratch") as caught:
        load_imagenet(backbone.build(), backbone)
    assert caught.value.field == "init"
