"""A running mean of the weights, which ranks better than the last step's."""

from __future__ import annotations

import copy

import torch

from encoder_service.model.network import HashNet


class WeightAverage:
    """Exponential mean of parameters and buffers, in a network of its own.

    Early on the mean is over the few steps there were: the decay is at most (1 + step) / (10 +
    step).

    Parameters
    ----------
    network
        What is averaged; copied.
    decay
        Share of the mean that a step leaves, 0 to 1.
    """

    def __init__(self, network: HashNet, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: HashNet, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        theirs = network.state_dict()
        for name, mean in self.network.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(theirs[name], share)
            else:
                mean.copy_(theirs[name])
