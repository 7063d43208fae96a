"""Who learns how fast, and what stays as it is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from encoder_service.model.network import HashNet
from encoder_service.training.average import WeightAverage
from encoder_service.training.optim import (
    freeze,
    frozen_modules,
    make_optimizer,
    make_schedule,
)
from encoder_service.training.recipe import make_recipe
from hashlens.errors import InvalidInputError
from tests.support.training import flat_weights, make_trainer, small_recipe


def small_network(backbone: str = "resnet9") -> HashNet:
    torch.manual_seed(0)
    return HashNet(backbone, 8, 3, "batch")


def settings_by_name(
    network: HashNet, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[float, float]]:
    """Return (learning rate, weight decay) of each parameter that learns."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found


# --- groups ---


def test_lin2015_has_the_authors_rates() -> None:
    network = HashNet("alexnet", 8, 3)
    recipe = make_recipe("lin2015")
    optimizer = make_optimizer(network, recipe)
    found = settings_by_name(network, optimizer)
    assert found.keys() == {name for name, _ in network.named_parameters()}
    for name, (learning_rate, decay) in found.items():
        factor = (10 if name.startswith("classifier.") else 1) * (2 if ".bias" in name else 1)
        assert math.isclose(learning_rate, 0.001 * factor), name
        assert decay == (0 if name.endswith(".bias") else 5e-4), name
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.9, False)}


def test_lin2015_takes_a_tenth_after_25000_steps() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.001)
    schedule = make_schedule(optimizer, make_recipe("lin2015"), 50_000)
    rates = []
    for _ in range(50_000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:25_000] == [0.001] * 25_000
    assert all(math.isclose(rate, 0.0001) for rate in rates[25_000:])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 50])
def test_one_cycle_rises_to_the_peak_and_falls_to_nothing(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = make_schedule(optimizer, small_recipe(learning_rate=0.3), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) <= 0.3 + 1e-12
    if steps == 50:
        peak = rates.index(max(rates))
        assert math.isclose(rates[peak], 0.3, rel_tol=0.01)
        assert 10 <= peak <= 14
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert rates[-1] < 0.001


def test_depth_decides_the_rate() -> None:
    network = small_network("alexnet")
    recipe = make_recipe(
        "orthohash",
        backbone="alexnet",
        learning_rate=1.0,
        backbone_learning_rate_scale=0.5,
        depth_learning_rate_decay=0.9,
        classifier_learning_rate_scale=4.0,
    )
    rates = {
        n: lr for n, (lr, _) in settings_by_name(network, make_optimizer(network, recipe)).items()
    }
    # From F7 back to the first convolution.
    layers = ["classifier.4", "classifier.1", *(f"features.{i}" for i in (10, 8, 6, 3, 0))]
    for depth, layer in enumerate(layers):
        assert math.isclose(rates[f"backbone.{layer}.weight"], 0.5 * 0.9**depth), layer
        assert math.isclose(rates[f"backbone.{layer}.bias"], 0.5 * 0.9**depth), layer
    assert rates["hash_layer.weight"] == 1.0
    assert rates["classifier.weight"] == 4.0


def test_a_residual_block_learns_at_one_rate() -> None:
    network = small_network("resnet18")
    recipe = small_recipe(backbone="resnet18", depth_learning_rate_decay=0.5)
    rates = {
        n: lr for n, (lr, _) in settings_by_name(network, make_optimizer(network, recipe)).items()
    }
    by_block: dict[str, set[float]] = {}
    for name, rate in rates.items():
        if name.startswith("backbone.layer"):
            by_block.setdefault(name[len("backbone.") : len("backbone.layer1.0")], set()).add(rate)
    assert len(by_block) == 8
    assert all(len(found) == 1 for found in by_block.values())
    ordered = [by_block[name].pop() for name in sorted(by_block)]
    assert all(math.isclose(b / a, 2) for a, b in itertools.pairwise(ordered))


def test_norms_and_biases_do_not_decay() -> None:
    network = small_network()
    found = settings_by_name(network, make_optimizer(network, small_recipe(weight_decay=0.3)))
    parameters = dict(network.named_parameters())
    assert {decay for _, decay in found.values()} == {0.0, 0.3}
    for name, (_, decay) in found.items():
        assert decay == (0.3 if parameters[name].ndim > 1 else 0.0), name


@pytest.mark.parametrize(
    ("changes", "kind"), [({}, torch.optim.SGD), ({"optimizer": "adamw"}, torch.optim.AdamW)]
)
def test_optimisers(changes: dict[str, Any], kind: type) -> None:
    assert isinstance(make_optimizer(small_network(), small_recipe(**changes)), kind)


def test_no_momentum_means_no_nesterov() -> None:
    optimizer = make_optimizer(small_network(), small_recipe(momentum=0.0))
    assert not optimizer.param_groups[0]["nesterov"]


# --- freezing ---


def test_frozen_parts_stay_as_they_are() -> None:
    """Their parameters, and the means and variances of their batch normalisation."""
    trainer = make_trainer(small_recipe(freeze="stem, stage1", ema=0.0, epochs=1))
    before = {name: t.clone() for name, t in trainer.state()["network"].items()}
    list(trainer.fit())
    changed = {
        name for name, t in trainer.result.state_dict().items() if not torch.equal(t, before[name])
    }
    frozen = ("backbone.stem.", "backbone.stage1.")
    free = {name for name in before if not name.startswith(frozen)}
    # Batch normalisation takes the bias before it out again, so all that moves it is rounding.
    assert free - {"hash_layer.bias"} <= changed <= free


def test_all_of_the_backbone_frozen() -> None:
    trainer = make_trainer(small_recipe(freeze="all", ema=0.0, epochs=1))
    before = {name: t.clone() for name, t in trainer.state()["network"].items()}
    list(trainer.fit())
    changed = {
        name for name, t in trainer.result.state_dict().items() if not torch.equal(t, before[name])
    }
    free = {name for name in before if not name.startswith("backbone.")}
    assert free - {"hash_layer.bias"} <= changed <= free  # As above.


def test_dropout_beyond_the_frozen_part_stays_on() -> None:
    network = small_network("alexnet")
    freeze(network, "features")
    dropouts = [m for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    inner = {id(m) for module in frozen_modules(network) for m in module.modules()}
    assert not any(id(dropout) in inner for dropout in dropouts)


@pytest.mark.parametrize("prefix", ["layer1", "ste", "stem.0.weights", "hash_layer"])
def test_an_unknown_part_is_refused_and_the_known_ones_named(prefix: str) -> None:
    with pytest.raises(InvalidInputError, match=r"stem, stage1, stage2, stage3") as caught:
        freeze(small_network(), f"stage3,{prefix}")
    assert caught.value.field == "freeze"
    assert repr(prefix) in caught.value.message


def test_one_parameter_can_be_named() -> None:
    network = small_network()
    freeze(network, "stem.0.weight")
    still = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert still == ["backbone.stem.0.weight"]


def test_nothing_left_to_learn() -> None:
    network = small_network().requires_grad_(False)
    with pytest.raises(InvalidInputError, match="nothing can learn"):
        make_optimizer(network, small_recipe())


# --- averaged weights ---


def test_the_average_against_its_definition() -> None:
    network = small_network()
    average = WeightAverage(network, 0.5)
    expected = flat_weights(network)
    for step in range(1, 16):
        torch.manual_seed(step)
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        # The warm-up ends at step 8: (1 + 8) / (10 + 8) = 0.5.
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * flat_weights(network)
        average.update(network, step)
    torch.testing.assert_close(flat_weights(average.network), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in average.network.parameters())


def test_counters_are_copied_not_averaged() -> None:
    network = small_network()
    average = WeightAverage(network, 0.9)
    network.hash_norm.num_batches_tracked += 7
    average.update(network, 1)
    assert int(average.network.hash_norm.num_batches_tracked) == 7
    assert average.network.hash_norm.num_batches_tracked.dtype == torch.int64
