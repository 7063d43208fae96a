"""A network as it is served: the same weights, fewer and steadier operations.

Two things change, both without touching the network that was given. Batch normalisation after a
convolution becomes part of the convolution. And linear layers work on one number of rows, because
the library behind them picks its algorithm, and so its rounding, by that number. See docs/adr/0010.
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from encoder_service.model.network import HashNet


def served(network: HashNet, n_rows: int) -> HashNet:
    """Return a network for inference.

    Parameters
    ----------
    network
        In evaluation mode. It is not changed; what is not fused shares its tensors.
    n_rows
        Rows on which linear layers work.
    """
    tensors = chain(network.parameters(), network.buffers())
    shared = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    shared.backbone = fused(shared.backbone)
    for name, module in list(shared.named_modules()):
        layer: nn.Module
        if isinstance(module, nn.Linear):
            layer = _LinearOfRows(module, n_rows)
        elif isinstance(module, nn.Conv2d) and _is_pointwise(module):
            layer = _ConvolutionOfPoints(module, n_rows)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(shared.get_submodule(parent), child, layer)
    return shared.eval()


def fused(module: nn.Module) -> nn.Module:
    """Return a module whose convolutions do what the batch normalisation after them did.

    While this works, no other thread may call a module: torch's tracing replaces the call itself.

    Parameters
    ----------
    module
        In evaluation mode; not changed. Tensors that need not change are shared.
    """
    if not any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
        return module
    traced = fx.symbolic_trace(module)
    modules = dict(traced.named_modules())
    for norm in list(traced.graph.nodes):
        if norm.op != "call_module" or not isinstance(modules[norm.target], nn.BatchNorm2d):
            continue
        before = norm.args[0]
        # One that feeds others too has to stay as it is.
        if before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = modules[before.target]
        if isinstance(convolution, nn.Conv2d):
            parent, _, child = before.target.rpartition(".")
            one = fuse_conv_bn_eval(convolution, modules[norm.target])
            setattr(traced.get_submodule(parent), child, one)
            norm.replace_all_uses_with(before)
            traced.graph.erase_node(norm)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _is_pointwise(layer: nn.Conv2d) -> bool:
    plain = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    return plain and layer.groups == 1


class _LinearOfRows(nn.Module):
    """A linear layer that takes so many rows at a time."""

    def __init__(self, linear: nn.Linear, n_rows: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.n_rows = n_rows

    def forward(self, rows: Tensor) -> Tensor:
        if rows.dim() != 2:  # one row for each pixel, so never few
            return nn.functional.linear(rows, self.weight, self.bias)
        return _by_rows(rows, self.weight, self.bias, self.n_rows)


class _ConvolutionOfPoints(nn.Module):
    """A 1 x 1 convolution; on maps of one pixel, as squeeze-and-excitation has, a linear layer."""

    def __init__(self, convolution: nn.Conv2d, n_rows: int) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.n_rows = n_rows

    def forward(self, maps: Tensor) -> Tensor:
        if maps.shape[-2:] != (1, 1):
            return nn.functional.conv2d(maps, self.weight, self.bias)
        found = _by_rows(maps.flatten(1), self.weight.flatten(1), self.bias, self.n_rows)
        return found[:, :, None, None]


def _by_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, n_rows: int) -> Tensor:
    """Apply a linear layer to so many rows at a time, the last ones filled up with zeros."""
    n = len(rows)
    if n == n_rows:
        return nn.functional.linear(rows, weight, bias)
    filled = nn.functional.pad(rows, (0, 0, 0, -n % n_rows))
    parts = filled.reshape(-1, n_rows, rows.shape[1]).unbind()
    return torch.cat([nn.functional.linear(part, weight, bias) for part in parts])[:n]
