"""What the service is held against: decode and ``model(batch)`` in a loop, in a process of its own.

The same decoder, preprocessing and fused network; for each size of batch one thread for the model
or as many as the service has, whichever is faster. A pool decodes the next batches while the model
works on one, as anybody would have it who only wants to get done. The network takes the batch as it
is, without the service's care for results that no batch size changes.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder_service.bench.pictures import make_pictures
from encoder_service.decode import DecodeLimits, decode
from encoder_service.encoder import Encoder
from encoder_service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from encoder_service.model.network import HashNet
from encoder_service.model.serving import fused
from encoder_service.preprocess import Preprocessing
from hashlens import codes

_AHEAD = 2
"""Batches that are being decoded beside the one in the model."""

_TRIALS = 5
"""Calls with one thread and with all, to find out which is faster."""

_SETTLING = 20
"""Images on which the normalisation of an untrained network settles."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What to run."""

    checkpoint: Path
    n_threads: int
    """CPU threads of the model; 0: what the service would take."""
    n_decode_threads: int
    batch: int
    """Images of one call."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a loop."""

    images_per_s: float
    cpu_ms: float
    """CPU time for an image."""
    median_ms: float
    """Time of one call."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What the bare model says of some images."""

    codes: NDArray[np.uint8]
    features: NDArray[np.float32]
    activations: NDArray[np.float32]


def write_untrained(backbone: str, path: Path, seed: int) -> None:
    """Write a checkpoint of a network with random weights, for 224 px."""
    torch.manual_seed(seed)
    network = HashNet(backbone, 48, 10, "batch")
    preprocessing = Preprocessing()
    # Means and variances that fit, or every image would have the same code.
    limits = DecodeLimits()
    images = [
        preprocessing(decode(data, limits)) for data in make_pictures("photo", _SETTLING, seed)
    ]
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.from_numpy(np.stack(images)))
    classes = tuple(f"class {number}" for number in range(10))
    save_checkpoint(Checkpoint(network.eval(), preprocessing, classes), path)


def answers(setup: Setup, images: Sequence[bytes]) -> Answers:
    """Return what the bare model says of some images."""
    model = _model(setup)
    found = [
        model(model.decoded(images[lo : lo + setup.batch]))
        for lo in range(0, len(images), setup.batch)
    ]
    return Answers(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def loop(setup: Setup, images: Sequence[bytes], seconds: float) -> Ran:
    """Encode images, again from the first after the last, for so long."""
    model = _model(setup)
    endless = cycle(images)

    def begin() -> list[Future[NDArray[np.float32]]]:
        return [model.begin(image) for image in islice(endless, setup.batch)]

    ahead = deque(begin() for _ in range(_AHEAD))
    model([future.result() for future in begin()])
    calls_ms: list[float] = []
    before_cpu_s, before_s = time.process_time(), time.perf_counter()
    while (began_s := time.perf_counter()) < before_s + seconds:
        batch = ahead.popleft()
        ahead.append(begin())
        model([future.result() for future in batch])
        calls_ms.append((time.perf_counter() - began_s) * 1e3)
    spent_s, cpu_s = time.perf_counter() - before_s, time.process_time() - before_cpu_s
    for batch in ahead:
        for future in batch:
            future.cancel()
    n = len(calls_ms) * setup.batch
    return Ran(n / spent_s, cpu_s / n * 1e3, float(np.median(calls_ms)))


def one_by_one(setup: Setup, images: Sequence[bytes], seconds: float) -> Ran:
    """Decode one image, put it through the model, then the next, for so long."""
    model = _model(setup)
    model([model.decode(images[0])])
    calls_ms: list[float] = []
    before_cpu_s, before_s = time.process_time(), time.perf_counter()
    for image in cycle(images):
        began_s = time.perf_counter()
        if calls_ms and began_s > before_s + seconds:
            break
        model([model.decode(image)])
        calls_ms.append((time.perf_counter() - began_s) * 1e3)
    spent_s, cpu_s = time.perf_counter() - before_s, time.process_time() - before_cpu_s
    return Ran(len(calls_ms) / spent_s, cpu_s / len(calls_ms) * 1e3, float(np.median(calls_ms)))


class _Model:
    """A network and its decoders."""

    def __init__(self, setup: Setup) -> None:
        checkpoint = load_checkpoint(setup.checkpoint)
        self._n_threads = Encoder(checkpoint, "cpu", setup.n_threads).n_threads
        self._faster: dict[int, int] = {}
        """Images of a call -> with how many threads."""
        self._network = copy.deepcopy(checkpoint.network)
        self._network.backbone = fused(self._network.backbone)
        self._network.eval().to(memory_format=torch.channels_last)
        self._preprocessing = checkpoint.preprocessing
        self._decoders = ThreadPoolExecutor(setup.n_decode_threads)

    def decode(self, image: bytes) -> NDArray[np.float32]:
        return self._preprocessing(decode(image, DecodeLimits(), self._preprocessing.least_px))

    def begin(self, image: bytes) -> Future[NDArray[np.float32]]:
        return self._decoders.submit(self.decode, image)

    def decoded(self, images: Sequence[bytes]) -> list[NDArray[np.float32]]:
        return list(self._decoders.map(self.decode, images))

    @torch.inference_mode()
    def __call__(
        self, images: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        batch = torch.from_numpy(np.stack(images)).to(memory_format=torch.channels_last)
        torch.set_num_threads(self._threads_for(batch))
        output = self._network(batch)
        h = output.activations.numpy()
        return codes.pack(h > 0.5), output.features.numpy(), h

    def _threads_for(self, batch: Tensor) -> int:
        """Find out once for each size, before anything is timed."""
        n_threads = self._faster.get(len(batch))
        if n_threads is None:
            took_s: dict[int, list[float]] = {1: [], self._n_threads: []}
            for _ in range(_TRIALS):
                for tried, found in took_s.items():
                    torch.set_num_threads(tried)
                    began_s = time.perf_counter()
                    self._network(batch)
                    found.append(time.perf_counter() - began_s)
            n_threads = min(took_s, key=lambda tried: statistics.median(took_s[tried]))
            self._faster[len(batch)] = n_threads
        return n_threads


@functools.lru_cache(1)
def _model(setup: Setup) -> _Model:
    """Load once in this process what is run again and again."""
    return _Model(setup)
