"""Preprocessed images -> codes and features. No RPC, no asyncio: usable in a notebook.

checkpoint = load_checkpoint(default_checkpoint_path())
encoder = Encoder(checkpoint)
image = decode(path.read_bytes(), DecodeLimits(), encoder.preprocessing.least_px)
encoded = encoder.encode(encoder.preprocessing(image)[np.newaxis])
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from encoder_service.forward_pass import ForwardPass, Images, resolve_device
from encoder_service.model.checkpoint import Checkpoint
from encoder_service.model.serving import served
from encoder_service.passes import Plan, Traces, agreeing_sizes, cut, same_bits
from encoder_service.preprocess import Preprocessing
from hashlens import codes
from hashlens.cpus import usable_cpus
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.types import Classifier

Autocast = Literal["off", "bfloat16", "float16"]
"""Number format of the matrix products on CUDA; ``off`` is float32."""

_AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_SIZES = (1, 2, 4, 8, 16, 32)
"""Images of a pass on the CPU; larger ones cost no less for an image."""

_MAX_PIXELS = 32 * 48 * 48
"""Of one pass's images, as far as there are more than `_LARGE_SIDE_IMAGES`."""

_LARGE_SIDE_IMAGES = 4
"""Most images of a pass where they are large: more gain little, and trying them out takes long."""

_TIMINGS = 5
"""Of a pass with one thread and with all, to see which is faster."""

_GAIN = 0.9
"""What the time with all threads must be of that with one: they also keep others from the CPUs."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """What `Encoder.encode` returns; row i belongs to image i."""

    codes: NDArray[np.uint8]
    """Packed codes, shape ``[n, ceil(n_bits / 8)]``, see `hashlens.codes`."""
    features: NDArray[np.float32]
    """F7, shape ``[n, dim]``."""
    activations: NDArray[np.float32]
    """H, in 0..1, shape ``[n, n_bits]``; a bit is set where it exceeds 0.5."""


class Encoder:
    """A model that is ready to run.

    The library behind a forward pass picks its algorithm by the batch's shape, and two algorithms
    round differently: enough to move F7 in its last digits and, now and then, to flip a bit whose
    H is near 0.5. So one size of pass, `tile`, decides; others are used where a trial at the start
    shows that they round alike, and the last pass is padded. An image's embedding does not depend
    on how many others it comes with, nor on its place among them, nor on the number of threads. It
    may differ in the last digits between kinds of CPU, and between CPU and CUDA. See docs/adr/0010.

    On the CPU, the passes of a batch run side by side, one thread each. A batch of one pass gets
    all threads, if that changes no bit and is faster. After torch.compile, passes go one by one.

    Make encoders before others encode: torch's tracing, which this does, is for one thread.

    Parameters
    ----------
    checkpoint
        The model; its network is moved to the device.
    device
        ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA where there is a device.
    n_threads
        CPU threads of the model; 0: one per CPU.
    autocast
        Number format on CUDA; without effect on the CPU. It moves F7 and H by about a hundredth,
        so use one setting for a whole collection.
    compile
        Let torch.compile make code for the network: takes a C++ compiler, and time at the start,
        for which only one size of pass is used. It moves F7 and H in their last digits, so use one
        setting for a whole collection.

    Raises
    ------
    InvalidInputError
        There is no such device, or a value is out of its range.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        n_threads: int = 0,
        *,
        autocast: Autocast = "off",
        compile: bool = False,  # noqa: A002 - the option's name
    ) -> None:
        if n_threads < 0:
            raise InvalidInputError(f"n_threads is 0 or more, not {n_threads}.", field="n_threads")
        if autocast not in get_args(Autocast):
            raise InvalidInputError(
                f"autocast is one of {', '.join(get_args(Autocast))}; not {autocast!r}.",
                field="autocast",
            )
        self._checkpoint = checkpoint
        self._device = resolve_device(device)
        self._tile = _tile(checkpoint.preprocessing.crop, self._device)
        self._n_threads = n_threads or usable_cpus()
        if self._device.type != "cpu" or (compile and self._tile > 1):
            self._n_threads = 1  # Within a small pass they wait for each other more than they save.
        checkpoint.network.to(self._device).to(memory_format=torch.channels_last)
        network = served(checkpoint.network, self._tile).to(memory_format=torch.channels_last)
        self._forward = ForwardPass(
            network,
            self._device,
            checkpoint.preprocessing.crop,
            autocast=_AUTOCAST_DTYPES.get(autocast),
            compiles=compile,
        )
        self._compiles = compile
        self._plan: Plan | None = None
        self._threads: ThreadPoolExecutor | None = None
        if self._n_threads > 1 and not compile:
            self._threads = ThreadPoolExecutor(
                self._n_threads,
                thread_name_prefix="pass",
                initializer=functools.partial(torch.set_num_threads, 1),
            )

    @property
    def model_id(self) -> str:
        """Hash of weights, preprocessing and architecture, 32 hex characters."""
        return self._checkpoint.model_id

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self._checkpoint.backbone

    @property
    def n_bits(self) -> int:
        """Code length, in bits."""
        return self._checkpoint.n_bits

    @property
    def dim(self) -> int:
        """Width of F7."""
        return self._checkpoint.dim

    @property
    def classes(self) -> tuple[str, ...]:
        """What the model was trained to tell apart."""
        return self._checkpoint.classes

    @property
    def preprocessing(self) -> Preprocessing:
        """Turns a decoded image into what `encode` takes."""
        return self._checkpoint.preprocessing

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured after training."""
        return self._checkpoint.metrics

    @property
    def data_licence(self) -> str:
        """Licence and source of the data it was trained on."""
        return self._checkpoint.data_licence

    @property
    def classifier(self) -> Classifier:
        """The last layer, which reads the class scores off H; copies."""
        layer = self._checkpoint.network.classifier
        return Classifier(
            layer.weight.detach().cpu().numpy().copy(), layer.bias.detach().cpu().numpy().copy()
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def tile(self) -> int:
        """Images of the forward pass that decides how results round."""
        return self._tile

    @property
    def plan(self) -> Plan | None:
        """How batches are computed; None before the first `encode`."""
        return self._plan

    @property
    def n_threads(self) -> int:
        """CPU threads of the model."""
        return self._n_threads

    def encode(self, batch: Images) -> EncodedBatch:
        """Encode images. One call at a time.

        Parameters
        ----------
        batch
            float32, shape ``[n, 3, s, s]`` with the side the preprocessing gives, or n arrays of
            shape ``[3, s, s]``; n may be 0.

        Returns
        -------
        EncodedBatch
            New arrays.

        Raises
        ------
        InvalidInputError
            An image has another shape or dtype.
        LimitError
            The device's memory does not hold even half a pass.
        """
        side = self.preprocessing.crop
        for image in (batch,) if isinstance(batch, np.ndarray) else batch:
            if image.dtype != np.float32 or image.shape[-3:] != (3, side, side):
                raise self._wrong(image)
            if image.ndim != (4 if image is batch else 3):
                raise self._wrong(image)
        if self._plan is None:
            self._plan = self._find_plan()
        n = len(batch)
        features = np.empty((n, self.dim), dtype=np.float32)
        activations = np.empty((n, self.n_bits), dtype=np.float32)

        def run(one: tuple[slice, int]) -> None:
            rows, size = one
            features[rows], activations[rows] = self._forward(batch[rows], size)

        passes = cut(n, self._plan.sizes, self._n_threads if self._threads else 1)
        if len(passes) > 1 and self._threads is not None:
            for _ in self._threads.map(run, passes):
                pass
        else:
            _set_threads(self._plan.n_threads_alone)
            for one in passes:
                run(one)
        return EncodedBatch(codes.pack(activations > 0.5), features, activations)

    def warm_up(self) -> None:
        """Find the sizes of pass and run each, so that the first request does not pay for it.

        Call it in the thread that will call `encode`.

        Raises
        ------
        PreconditionError
            `compile` was asked for, and cannot be done here.
        """
        side = self.preprocessing.crop
        try:
            self.encode(np.zeros((1, 3, side, side), dtype=np.float32))
        except Exception as error:
            if not self._compiles:
                raise
            raise PreconditionError(
                f"torch.compile does not work here ({type(error).__name__}). Install a C++ "
                "compiler, or leave compile off."
            ) from error

    def _wrong(self, image: NDArray[np.float32]) -> InvalidInputError:
        side = self.preprocessing.crop
        return InvalidInputError(
            f"a batch is float32 [n, 3, {side}, {side}], not {image.dtype} {list(image.shape)}. "
            "Use the encoder's own preprocessing.",
            field="batch",
        )

    def _find_plan(self) -> Plan:
        _set_threads(1)
        # On CUDA, a pass that is not full costs little more than a smaller one.
        if self._device.type != "cpu" or self._compiles:
            return Plan((self._tile,), self._n_threads)
        side = self.preprocessing.crop
        shape = (3, side, side)
        fits = max(_MAX_PIXELS // (side * side), _LARGE_SIDE_IMAGES)
        sizes = [size for size in _SIZES if size <= fits]
        agreeing = agreeing_sizes(self._forward.traces, self._tile, sizes, shape)
        return Plan(agreeing, self._n_threads_alone(agreeing[0], shape))

    def _n_threads_alone(self, size: int, shape: tuple[int, ...]) -> int:
        """Return how many threads a pass gets that has no others beside it."""
        if self._n_threads == 1:
            return 1
        one, all_ = self._traces_with(1), self._traces_with(self._n_threads)
        if not same_bits(one, all_, size, shape):
            return 1
        images = np.zeros((size, *shape), dtype=np.float32)
        took_s: dict[int, list[float]] = {1: [], self._n_threads: []}
        for _ in range(_TIMINGS):
            for n_threads, found in took_s.items():
                _set_threads(n_threads)
                began_s = time.perf_counter()
                self._forward(images, size)
                found.append(time.perf_counter() - began_s)
        one_s, all_s = map(statistics.median, took_s.values())
        return self._n_threads if all_s < _GAIN * one_s else 1

    def _traces_with(self, n_threads: int) -> Traces:
        def traces(images: NDArray[np.float32]) -> NDArray[np.uint32]:
            _set_threads(n_threads)
            return self._forward.traces(images)

        return traces


def _set_threads(n_threads: int) -> None:
    """Set how many threads the passes have that the calling thread runs: OpenMP keeps that."""
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)


def _tile(side: int, device: torch.device) -> int:
    """Choose the size of pass that decides how results round: one that costs little when not full.

    At 48 px, 8 images take little longer than one, see docs/adr/0002. At 224 px one image keeps the
    CPU busy by itself, and padding would be pure waste.
    """
    if device.type == "cuda":
        return 32
    return max(1, min(8, 8 * 48 * 48 // (side * side)))
