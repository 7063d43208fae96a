"""One process among several that train together, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import nn

from hashlens.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this one is."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes files and reports."""
        return self.rank == 0

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network, with its gradients averaged over the processes."""
        if self.world == 1:
            return network
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
            return nn.parallel.DistributedDataParallel(network, device_ids=[device.index])
        return nn.parallel.DistributedDataParallel(network)

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Add up, over the processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total]

    def agree(self, value: float, device: torch.device) -> float:
        """Return the leading process's value in all of them."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        torch.distributed.broadcast(shared, 0)
        return float(shared)


ALONE = Processes()
"""The only process."""


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the others, if `torchrun` says there are any; leave them at the end.

    Parameters
    ----------
    device
        Where this process trains: NCCL joins CUDA devices, Gloo CPUs.

    Raises
    ------
    InvalidInputError
        The environment speaks of several processes, but not of all that joining them needs.
    """
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
    except ValueError as error:
        raise InvalidInputError(f"WORLD_SIZE and RANK are numbers: {error}.") from error
    if world == 1:
        yield ALONE
        return
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world
        )
    except ValueError as error:
        raise InvalidInputError(
            f"WORLD_SIZE is {world}, but {error}. Start several processes with torchrun."
        ) from error
    try:
        yield Processes(rank, world)
    finally:
        torch.distributed.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return this process's own CUDA device where `torchrun` started one process for each."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
