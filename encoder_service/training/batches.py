"""Batches, prepared by threads while the network learns from the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder_service.data.augment import PRESETS, augment
from encoder_service.data.images import ImageSet
from encoder_service.preprocess import Preprocessing
from encoder_service.training.distributed import Processes
from encoder_service.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from."""

    images: Tensor
    """Normalised float32, shape ``[n, 3, s, s]``, channels last in memory."""
    labels: Tensor
    """int64 ``[n]``, or float32 ``[n, n_classes]`` where an image may have several."""


class Batches:
    """The batches of a training. Every one follows from the seed, its epoch and its step alone.

    Parameters
    ----------
    images
        What is learned from; their side is the recipe's ``resize`` or ``crop``.
    preprocessing
        Its `normalise` turns pixels into input, here as in serving.
    recipe
        Batch size, augmentation, seed.
    group
        Each process takes its share of every batch.
    n_workers
        Threads that prepare batches.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        recipe: Recipe,
        group: Processes,
        n_workers: int,
    ) -> None:
        self._images = images
        self._preprocessing = preprocessing
        self._recipe = recipe
        self._group = group
        self._n_workers = max(1, n_workers)
        self._augmentation = PRESETS[recipe.augment]
        self.per_epoch = len(images) // recipe.batch_size

    def of_epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield an epoch's batches, from a step of it on, both counted from 0."""
        size = self._recipe.batch_size
        order = np.random.default_rng([self._recipe.seed, epoch]).permutation(len(self._images))
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(self._n_workers, thread_name_prefix="batch") as pool:
            try:
                for step in range(first_step, self.per_epoch):
                    rows = order[step * size : (step + 1) * size]
                    waiting.append(pool.submit(self._make, rows, epoch, step))
                    if len(waiting) > self._n_workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _make(self, rows: NDArray[np.int64], epoch: int, step: int) -> Batch:
        rank, world = self._group.rank, self._group.world
        mine = rows[rank::world]
        random = np.random.default_rng([self._recipe.seed, epoch, step, rank])
        pixels = augment(self._images.batch(mine), self._augmentation, self._recipe.crop, random)
        return Batch(to_input(pixels, self._preprocessing), to_labels(self._images.labels[mine]))


def to_input(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """Turn uint8 ``[n, s, s, 3]`` into the network's input, float32 ``[n, 3, s, s]``."""
    # Channels are last in memory already, which is the layout the convolutions like best.
    return torch.from_numpy(preprocessing.normalise(pixels)).permute(0, 3, 1, 2)


def to_labels(labels: NDArray[np.generic]) -> Tensor:
    """Turn class positions, or flags by class, into what a loss takes."""
    if labels.ndim == 2:
        return torch.from_numpy(labels.astype(np.float32))
    return torch.from_numpy(labels.astype(np.int64))
