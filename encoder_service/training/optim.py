"""Optimiser and schedule of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from encoder_service.model.network import HashNet
from encoder_service.training.recipe import Recipe
from hashlens.errors import InvalidInputError


def make_optimizer(network: HashNet, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimiser of what is not frozen.

    Parameters
    ----------
    network
        As `freeze` left it.
    recipe
        Learning rates by part, weight decay (never on biases and norms), momentum.

    Raises
    ------
    InvalidInputError
        Nothing is left to learn.
    """
    groups = list(_groups(network, recipe))
    if not groups:
        raise InvalidInputError("everything is frozen: nothing can learn.", field="freeze")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    return torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        fused=True,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the learning rate's schedule over so many steps."""
    if recipe.schedule == "step":
        every = recipe.decay_every_steps or max(1, steps // 2)
        return torch.optim.lr_scheduler.StepLR(optimizer, every, gamma=0.1)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        # Of fewer than five steps, torch's rising part has no length.
        total_steps=max(steps, 5),
        pct_start=0.25,
        cycle_momentum=False,
        final_div_factor=1000,
    )


def freeze(network: HashNet, prefixes: str) -> None:
    """Keep parameters of the backbone as they are.

    Parameters
    ----------
    network
        Changed in place.
    prefixes
        Of parameter names, with commas between; ``all`` for the whole backbone; empty for none.

    Raises
    ------
    InvalidInputError
        A prefix is no parameter's.
    """
    for prefix in (part.strip() for part in prefixes.split(",") if part.strip()):
        found = [
            parameter
            for name, parameter in network.backbone.named_parameters()
            if prefix == "all" or name == prefix or name.startswith(f"{prefix}.")
        ]
        if not found:
            blocks = dict.fromkeys(name.split(".")[0] for name, _ in _parameters(network.backbone))
            raise InvalidInputError(
                f"no parameter of {network.backbone_name} begins with {prefix!r}. Its parts are: "
                f"{', '.join(blocks)}.",
                field="freeze",
            )
        for parameter in found:
            parameter.requires_grad_(False)


def frozen_modules(network: HashNet) -> tuple[nn.Module, ...]:
    """Return the backbone's modules all of whose parameters are frozen.

    They have to stay in evaluation mode, or batch normalisation would go on to learn means.
    """
    return tuple(
        module
        for module in network.backbone.modules()
        if (own := list(module.parameters())) and not any(p.requires_grad for p in own)
    )


def _groups(network: HashNet, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield parameters that share learning rate and weight decay."""
    scales = _backbone_scales(network, recipe)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in _parameters(network):
        if not parameter.requires_grad:
            continue
        scale = scales.get(name, 1.0)
        if name.startswith("classifier."):
            scale = recipe.classifier_learning_rate_scale
        if name.endswith(".bias"):
            scale *= recipe.bias_learning_rate_scale
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        merged.setdefault((scale * recipe.learning_rate, decay), []).append(parameter)
    for (learning_rate, decay), parameters in merged.items():
        yield {"params": parameters, "lr": learning_rate, "weight_decay": decay}


def _backbone_scales(network: HashNet, recipe: Recipe) -> dict[str, float]:
    """Return the learning rate's factor for each parameter of the backbone, by name.

    A block is a child of the backbone, or a child of a child that is a plain sequence: in AlexNet
    each layer, in a ResNet each residual block.
    """
    blocks: dict[str, list[str]] = {}
    for name, _ in _parameters(network.backbone):
        parts = name.split(".")
        sequence = isinstance(getattr(network.backbone, parts[0]), nn.Sequential)
        blocks.setdefault(".".join(parts[: 2 if sequence else 1]), []).append(name)
    scales = {}
    for depth, names in enumerate(reversed(blocks.values())):
        for name in names:
            scales[f"backbone.{name}"] = (
                recipe.backbone_learning_rate_scale * recipe.depth_learning_rate_decay**depth
            )
    return scales


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())
